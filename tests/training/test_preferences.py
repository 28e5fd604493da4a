"""Runs on pairs of answers: they learn the preference, alike on every layout, and go on exactly; the reference is stored."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.data.index_file import read_lengths, read_tokens
from flagscale_like.data.preprocess import preprocess_chat
from flagscale_like.data.shards import ChatOptions
from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.commands import run_commands
from tests.data.chats import CHATML, make_tokenizer, write_chats
from tests.data.pairs import write_pairs
from tests.harness import run_ranks, tiny_config

LAYOUTS = {
    "tp2 sp pp2": (4, {"parallel": {"tp": 2, "sp": True, "pp": 2}}),
    "pp2 vpp2, recomputed": (2, {"parallel": {"pp": 2, "vpp": 2}, "train__recompute": "full"}),
    "dp2, two packs": (2, {"train__micro_batch_size": 2}),
    "cp2, two packs": (2, {"parallel": {"cp": 2}, "train__micro_batch_size": 2}),
}
OBJECTIVES = {"dpo": {"kind": "dpo", "sft": 0.1}, "reward": {"kind": "reward", "heads": 3, "center": 0.01}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources of pairs, one of conversations, their tokenizer; and `base`, a run of one step on random tokens."""
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = make_tokenizer(folder / "tok")
    for name, count, seed in (("pairs", 120, 0), ("more", 60, 1)):
        write_pairs(folder / f"{name}.jsonl", count, seed=seed)
        preprocess_chat([folder / f"{name}.jsonl"], tokenizer, folder / name, ChatOptions(CHATML, pairs=True))
    write_chats(folder / "chats.jsonl", 20)
    preprocess_chat([folder / "chats.jsonl"], tokenizer, folder / "chats", ChatOptions(CHATML))
    base = tiny_config(folder / "base", model__vocab_size=300, train__steps=2, checkpoint={"interval": 2})
    run_ranks(1, faults.train_run, base)
    return folder


def pair_config(run_dir, folder, objective, *, names=("pairs", "more"), **changes):
    sources = [{"path": str(folder / name)} for name in names]
    changes = {
        "data": {"sources": sources, "tokenizer": str(folder / "tok"), "split": "80,20,0"},
        "model__vocab_size": 300,
        "train__seq_length": 128,
        "train__global_batch_size": 4,
        "train__steps": 4,
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0},
        "checkpoint": {"interval": 2, "load": str(folder / "base")},
        "objective": objective,
        **changes,
    }
    return tiny_config(run_dir, **changes)


def train_all(configs):
    """Train several runs in one process after another; what each said, and the error that ended it."""
    found = []
    for config in configs:
        found.append(faults.train_and_listen(config))
        if dist.is_initialized():  # after an error
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return found


def numbers(run_dir):
    """What every step reported of its pairs."""
    names = ("dpo loss", "reward loss", "rewards/", "log-probability/", "grad-norm")
    steps = [record for record in read_metrics(Path(run_dir)) if "iteration-time" in record]
    return [{k: v for k, v in r.items() if k.startswith(names) and not k.endswith("/mean")} for r in steps]


def step_rewards(found):
    return [step["rewards/accuracy"] for step in found]


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory):
    """Four steps of each objective on one process."""
    runs = tmp_path_factory.mktemp("one")
    configs = {name: pair_config(runs / name, folder, objective) for name, objective in OBJECTIVES.items()}
    ((*outcomes,),) = run_ranks(1, train_all, list(configs.values()))
    assert [error for _, error in outcomes] == [None, None]
    return configs, dict(zip(configs, (said for said, _ in outcomes), strict=True))


def test_a_run_says_what_the_reference_is_and_that_the_head_is_drawn(one_process):
    _, said = one_process
    (note,) = [line for line in said["dpo"] if "the reference's log-probabilities of" in line]
    assert note.startswith("computed the reference's log-probabilities of 360 answers: ")
    (head,) = [line for line in said["reward"] if "value head" in line]
    assert head.startswith("not loaded: output_layer.weight: the value head (3 x 64) is drawn, ")
    assert head.endswith("is a language model")
    (first, *_) = [line for line in said["dpo"] if line.startswith("step 1/4")]
    assert "| rewards/accuracy " in first
    assert "| rewards/margin " in first


def test_at_the_first_step_the_model_is_its_reference(one_process):
    configs, _ = one_process
    first = numbers(configs["dpo"].run_dir)[0]
    nll = -first["log-probability/chosen"]
    assert first["rewards/margin"] == pytest.approx(0.0, abs=1e-5)
    assert 10 < nll < 200  # of about 8 tokens, each of about ln 300 nats
    assert first["dpo loss"] > np.log(2)  # the sft term comes on top
    plain = first["dpo loss"] - np.log(2)
    assert plain == pytest.approx(0.1 * 5.7, rel=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_on_pairs_alike(layout, one_process, folder, tmp_path):
    ranks, changes = LAYOUTS[layout]
    expected, _ = one_process
    configs = [pair_config(tmp_path / name, folder, OBJECTIVES[name], **changes) for name in expected]
    for outcomes in run_ranks(ranks, train_all, configs):
        assert [error for _, error in outcomes] == [None, None]
    for config, name in zip(configs, expected, strict=True):
        found, wanted = numbers(config.run_dir), numbers(expected[name].run_dir)
        assert found[0] == pytest.approx(wanted[0], rel=1e-4, abs=1e-5), name
        assert found[1:] == [pytest.approx(step, rel=3e-3, abs=3e-3) for step in wanted[1:]], name
    a, b = (load_file(Path(run) / "reference.safetensors") for run in (expected["dpo"].run_dir, configs[0].run_dir))
    assert a.keys() == b.keys()
    assert len(a) == 2
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-5)


def copy_to_step_2(config, target):
    shutil.copytree(config.run_dir, target, ignore=shutil.ignore_patterns("step_00000004", "latest", "tensorboard"))
    return target


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_on_pairs_goes_on_exactly_and_on_another_layout(name, one_process, folder, tmp_path):
    config = one_process[0][name]
    again = pair_config(copy_to_step_2(config, tmp_path / "again"), folder, OBJECTIVES[name])
    ((said, error),) = run_ranks(1, faults.train_and_listen, again)
    assert error is None
    assert numbers(again.run_dir)[-2:] == numbers(config.run_dir)[-2:]
    if name == "dpo":
        assert [line for line in said if line.startswith("the reference's log-probabilities are in ")]
    other = pair_config(copy_to_step_2(config, tmp_path / "other"), folder, OBJECTIVES[name], parallel={"tp": 2})
    assert [error for _, error in run_ranks(2, faults.train_and_listen, other)] == [None, None]
    wanted = [pytest.approx(step, rel=3e-3, abs=3e-3) for step in numbers(config.run_dir)]
    assert numbers(other.run_dir) == wanted


def test_a_reference_of_something_else_is_refused(one_process, folder, tmp_path):
    config = one_process[0]["dpo"]

    def fork(name, *, step_2=True):
        target = copy_to_step_2(config, tmp_path / name)
        if not step_2:
            shutil.rmtree(target / "checkpoints")
        return target

    lost = fork("lost")
    (lost / "reference.safetensors").unlink()
    damaged = fork("damaged")
    data = bytearray((damaged / "reference.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "reference.safetensors").write_bytes(data)
    other_base = tiny_config(tmp_path / "base", model__vocab_size=300, train__steps=2, train__seed=5)
    begun = {"interval": 2, "load": str(other_base.run_dir)}
    configs = [
        other_base,
        pair_config(lost, folder, OBJECTIVES["dpo"]),
        pair_config(damaged, folder, OBJECTIVES["dpo"]),
        pair_config(fork("data"), folder, OBJECTIVES["dpo"], names=("pairs",)),
        pair_config(fork("base of another", step_2=False), folder, OBJECTIVES["dpo"], checkpoint=begun),
        pair_config(fork("same", step_2=False), folder, OBJECTIVES["dpo"]),
        pair_config(tmp_path / "new", folder, OBJECTIVES["dpo"], checkpoint=begun),
    ]
    ((_, *found),) = run_ranks(1, train_all, configs)
    errors = [error for _, error in found]
    assert "reference.safetensors: is missing, and the weights of step 2 are no longer the reference's" in errors[0]
    assert "is damaged, its checksum is another" in errors[1]
    assert "was computed with other sources (2, now 1)" in errors[2]
    assert f"was computed with other weights ({folder}/base/checkpoints/step_00000002, now {tmp_path}/base" in errors[3]
    assert errors[4:] == [None, None]
    assert [line for line in found[4][0] if line.startswith("the reference's log-probabilities are in ")]
    # A checkpoint of one run beside the reference of another, of the same data.
    mixed = copy_to_step_2(config, tmp_path / "mixed")
    shutil.copyfile(tmp_path / "new" / "reference.safetensors", mixed / "reference.safetensors")
    ((_, error),) = run_ranks(1, faults.train_and_listen, pair_config(mixed, folder, OBJECTIVES["dpo"]))
    assert "was trained with other log-probabilities of the reference" in error


def test_with_lora_the_reference_is_the_model_without_its_adapters(folder, tmp_path):
    """A lost file is computed again by a trained run on another layout, with the adapters off: it is the stored one."""
    options = {"lora": {"rank": 4}, "optimizer": {"lr": 1e-2}}
    config = pair_config(tmp_path / "run", folder, {"kind": "dpo"}, **options)
    ((_, error),) = run_ranks(1, faults.train_and_listen, config)
    assert error is None
    assert numbers(config.run_dir)[-1]["rewards/accuracy"] > 0.9  # the adapters do something
    lost = copy_to_step_2(config, tmp_path / "lost")
    (lost / "reference.safetensors").unlink()
    other = pair_config(lost, folder, {"kind": "dpo"}, parallel={"tp": 2}, **options)
    (said, error), _ = run_ranks(2, faults.train_and_listen, other)
    assert error is None
    assert [line for line in said if "answers, again, with the adapters off: " in line]
    stored, again = (load_file(Path(run) / "reference.safetensors") for run in (config.run_dir, lost))
    assert stored.keys() == again.keys()
    for key in stored:
        np.testing.assert_allclose(stored[key], again[key], rtol=1e-5)
    assert numbers(lost) == [pytest.approx(step, rel=1e-2, abs=1e-2) for step in numbers(config.run_dir)]


def test_runs_learn_the_preference_and_show_it_on_held_out_pairs(folder, tmp_path):
    changes = {"train__steps": 12, "train__eval_interval": 12, "train__eval_steps": 2, "train__log_interval": 4}
    changes["optimizer"] = {"lr": 2e-3, "initial_loss_scale": 1024.0}
    configs = [pair_config(tmp_path / name, folder, OBJECTIVES[name], **changes) for name in OBJECTIVES]
    for precision, name in (("bf16", "dpo"), ("fp16", "reward")):
        options = {**changes, "train__precision": precision}
        configs.append(pair_config(tmp_path / precision, folder, OBJECTIVES[name], **options))
    ((*found,),) = run_ranks(1, train_all, configs)
    for config, (said, error) in zip(configs, found, strict=True):
        assert error is None
        (last,) = [r for r in read_metrics(Path(config.run_dir)) if "rewards/accuracy validation" in r]
        assert last["rewards/accuracy validation"] > 0.9, config.run_dir
        assert last["rewards/margin validation"] > 0.1
        metric = "dpo loss" if config.objective.kind == "dpo" else "reward loss"
        assert {f"{metric} validation", f"{metric} validation/pairs", f"{metric} validation/more"} <= last.keys()
        assert [line for line in said if "validation loss" in line and "rewards/accuracy" in line]
        assert numbers(config.run_dir)[-1]["rewards/accuracy"] > 0.9
    assert (tmp_path / "dpo" / "loss.png").stat().st_size > 1000


def test_selection_and_the_guard_work_on_pairs_and_what_was_read_is_known_by_line(folder, tmp_path):
    sources = [{"path": str(folder / name)} for name in ("pairs", "more")]
    data = {"sources": sources, "tokenizer": str(folder / "tok"), "split": "80,20,0", "selection": {"interval": 2}}
    monitors = {"layers": {"interval": 1}, "effective_rank": {"interval": 2}}
    config = pair_config(tmp_path / "run", folder, {"kind": "dpo"}, data=data, monitors=monitors)
    for _, error in run_ranks(2, faults.train_and_listen, config):
        assert error is None
    names = {name for record in read_metrics(tmp_path / "run") for name in record}
    assert {"selection/weight/pairs", "selection/loss/more", "layer-grad-norm/layers.1"} <= names
    ((shown,),) = run_commands([["data", "locate", "--run", str(tmp_path / "run"), "--step", "2", "--json"]])
    sample = json.loads(shown.printed.splitlines()[0])
    chosen, rejected = sample["parts"][:2]
    assert (chosen["file"], chosen["line"]) == (rejected["file"], rejected["line"])
    line = json.loads(Path(chosen["file"]).read_text().splitlines()[chosen["line"] - 1])
    assert line["chosen"] in chosen["text"]
    assert line["rejected"] in rejected["text"]


def test_sources_that_do_not_hold_what_the_objective_reads_are_refused(folder, tmp_path):
    start = {"interval": 0}
    configs = [
        pair_config(tmp_path / "a", folder, {"kind": "dpo"}, names=("chats",), checkpoint=start),
        pair_config(tmp_path / "b", folder, {"kind": "next_token"}, names=("pairs",), checkpoint=start),
        pair_config(tmp_path / "c", folder, {"kind": "dpo"}, train__seq_length=32, checkpoint=start),
    ]
    ((*found,),) = run_ranks(1, train_all, configs)
    conversations, pairs, short = (error for _, error in found)
    assert (
        f"data source {folder}/chats: holds conversations, objective.kind dpo reads pairs of answers" in conversations
    )
    assert "make them with `data pairs IN --tokenizer" in conversations
    assert "holds pairs, of which objective.kind next_token would learn the rejected answers too" in pairs
    assert "take more than train.seq_length (32)" in short
    assert "run `data pairs --length 32 --long drop`" in short


def test_a_reward_model_is_exported_to_transformers_and_imported_back(one_process, folder, tmp_path):
    run, out, native = one_process[0]["reward"].run_dir, tmp_path / "hf", tmp_path / "native"
    commands = [
        ["convert", "export", "--checkpoint", run, "--out", str(out), "--dtype", "fp32"],
        ["convert", "import", "--hf", str(out), "--out", str(native)],
        ["convert", "export", "--checkpoint", run, "--out", str(tmp_path / "x"), "--as", "aquila"],
        ["generate", "--checkpoint", run, "--prompt", "And"],
        ["score", "--hf", str(out), "--pairs", str(folder / "more"), "--out", str(tmp_path / "scores.jsonl")],
        ["score", "--checkpoint", run, "--pairs", str(folder / "chats")],
    ]
    ((exported, imported, other, generated, scored, no_pairs),) = run_commands(commands)
    assert "verified: transformers' logits differ from the native model's by" in exported.printed
    assert imported.exit_code == 0
    assert "a reward model cannot be written as aquila: transformers has no class with scores for it" in other.error
    assert "is a reward model, its value head has 3 outputs; the model is a language model" in generated.error
    before, after = CheckpointReader(Path(run) / "checkpoints" / "step_00000004"), CheckpointReader(native)
    for key in after.keys():
        rows = len(after.full(key))
        assert torch.equal(after.full(key), before.full(key)[:rows]), key
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert (model.config.num_labels, list(model.score.weight.shape)) == (3, [3, 64])
    assert re.match(r"rewards of 60 pairs: the chosen answer has the higher one in [\d.]+%, by ", scored.printed)
    assert f"{folder}/chats: holds no pairs: make them with `data pairs IN" in no_pairs.error
    # transformers, on the tokens of one answer alone, gives the rewards that `score` read in a row of pairs.
    record = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[7])
    assert (record["file"], record["line"]) == (f"{folder}/more.jsonl", 8)
    lengths = read_lengths(str(folder / "more"))
    for side, document in (("chosen", 14), ("rejected", 15)):
        ids = torch.from_numpy(read_tokens(str(folder / "more"), lengths, document).astype(np.int64))[None]
        with torch.no_grad():
            assert model(ids).logits[0].tolist() == pytest.approx(record[side], abs=1e-4)
