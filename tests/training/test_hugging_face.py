"""Training from a Hugging Face folder and to one, and evaluating either kind of weights, on any layout."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import import_folder
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.cli.train import _verify_export
from flagscale_like.config import Parallel
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.stream import read_stream
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.errors import DataError
from flagscale_like.recipes.evaluate import evaluate_stream
from flagscale_like.runtime.parallel import parallel_context
from tests.commands import run_commands
from tests.families import tiny
from tests.harness import cli, run_ranks, tiny_config, write_yaml
from tests.training.test_layouts import losses, train_run

TEXT = "The loss of a model does not depend on how many processes compute it. " * 12


def from_folder(folder, run_dir, layout, **changes):
    return tiny_config(
        run_dir,
        model=HfFolder(folder).arch.model_dump(),
        parallel=layout,
        checkpoint__init_from_hf=str(folder),
        train__steps=2,
        optimizer__warmup_steps=0,
        **changes,
    )


@pytest.mark.parametrize("name", ["qwen3", "baichuan2-13b"])
def test_training_from_a_folder_is_the_same_on_every_layout_and_exports_what_it_trained(name, tmp_path):
    folder = tiny.make(name, tmp_path)
    runs = {"one": (1, {}), "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2})}
    found = {}
    for run, (ranks, layout) in runs.items():
        run_ranks(ranks, train_run, from_folder(folder, tmp_path / run, layout, checkpoint__export_hf=True))
        found[run] = losses(tmp_path / run)
    assert found["tp2 sp pp2"] == [pytest.approx(pair, rel=1e-5) for pair in found["one"]]
    for run in runs:
        exported, native = (
            HfFolder(tmp_path / run / "hf"),
            CheckpointReader(tmp_path / run / "checkpoints/step_00000002"),
        )
        assert exported.arch.family == native.arch.family == HfFolder(folder).arch.family
        for rule in exported.rules:
            assert torch.equal(exported.full(rule.core), native.full(rule.core)[: rule.shape[0]]), rule.core
        key = "decoder.layers.1.mlp.linear_fc1.weight"
        assert not torch.equal(exported.full(key), HfFolder(folder).full(key))  # it was trained
    assert not list(tmp_path.glob("*/.tmp-hf-*"))


def test_a_run_on_several_ranks_verifies_its_export_and_says_where_it_cannot(tmp_path, monkeypatch, capsys):
    folder = tiny.make("qwen3", tmp_path)
    config = from_folder(folder, tmp_path / "run", {"tp": 2}, checkpoint__export_hf=True)
    path = write_yaml(config, tmp_path / "run.yaml")
    ((trained,), (other,)) = run_commands([["train", str(path)]], tmp_path, ranks=2)
    assert (trained.exit_code, other.exit_code) == (0, 0), trained.error
    assert "verified: transformers' logits differ from the native model's by" in trained.printed
    assert "verified" not in other.printed
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    _verify_export(config, 2)
    assert "not verified: the check needs 0.0 GiB of memory, 0.0 are free" in capsys.readouterr().out


def test_an_imported_checkpoint_starts_the_same_run_as_the_folder(tmp_path):
    folder = tiny.make("qwen2", tmp_path)
    import_folder(folder, tmp_path / "native")
    run_ranks(1, train_run, from_folder(folder, tmp_path / "a", {}))
    config = tiny_config(
        tmp_path / "b",
        model=HfFolder(folder).arch.model_dump(),
        checkpoint__load=str(tmp_path / "native"),
        train__steps=2,
        optimizer__warmup_steps=0,
    )
    run_ranks(1, train_run, config)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_folder_of_another_model_is_refused_with_both_values(tmp_path):
    folder = tiny.make("qwen2", tmp_path)
    config = from_folder(folder, tmp_path / "run", {})
    other = config.model_copy(update={"model": config.model.model_copy(update={"qkv_bias": False})})
    with pytest.raises(AssertionError, match=r"model\.qkv_bias: True saved, False configured"):
        run_ranks(1, train_run, other)


def test_a_run_may_start_with_other_positions_and_says_so_but_not_go_on_with_others(tmp_path):
    folder = tiny.make("llama3", tmp_path)
    config = tiny_config(tmp_path / "run", train__steps=1, optimizer__warmup_steps=0, checkpoint__export_hf=True)
    values = config.model_dump(mode="json", exclude_defaults=True)
    del values["model"]
    values["checkpoint"]["init_from_hf"] = str(folder)
    values["model"] = {"position": {"scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}}
    values["train"]["seq_length"] = 128
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    train = ["train", str(tmp_path / "run.yaml")]
    on, changed = ["train.steps=2"], ["model.position.scaling.factor=8.0"]
    ((first, again, other, alibi),) = run_commands(
        [
            train,
            [*train, *on],
            [*train, *on, *changed],
            [
                *train,
                f"run_dir={tmp_path / 'x'}",
                "train.seq_length=32",
                "checkpoint.export_hf=false",
                "model.position={kind: alibi, scaling: null}",
            ],
        ]
    )
    assert first.exit_code == 0, first.error
    assert "model.position.scaling is {'kind': 'yarn', 'factor': 4.0" in first.printed
    assert "model.position.base" not in first.printed  # the folder's stays: 500000
    assert again.exit_code == 0, again.error
    assert "is of another model: model.position" in other.error
    assert "is of another model: model.position" in alibi.error
    arch = HfFolder(tmp_path / "run" / "hf").arch
    assert (arch.position.base, arch.position.scaling.kind, arch.position.scaling.factor) == (500000.0, "yarn", 4.0)


def test_an_export_that_cannot_be_written_is_refused_before_training(tmp_path):
    config = tiny_config(tmp_path / "run", model__position={"kind": "alibi"}, checkpoint__export_hf=True)
    with pytest.raises(AssertionError, match="a model with alibi cannot be written as llama"):
        run_ranks(1, train_run, config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_command_line_reads_the_model_from_the_folder_it_starts_from(tmp_path):
    folder = tiny.make("smollm2", tmp_path)
    config = tiny_config(tmp_path / "run", train__steps=1, optimizer__warmup_steps=0, checkpoint__export_hf=True)
    values = config.model_dump(mode="json", exclude_defaults=True)
    del values["model"]
    values["checkpoint"]["init_from_hf"] = str(folder)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (trained,), _ = run_commands([["train", str(tmp_path / "run.yaml"), "parallel.pp=2"]], ranks=2)
    assert trained.exit_code == 0, trained.error
    assert f"starting from the weights of {folder}" in trained.printed
    assert f"exported {tmp_path / 'run' / 'hf'}" in trained.printed
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """(text file, tokenizer folder, .bin prefix)"""
    root = tmp_path_factory.mktemp("text")
    (root / "text.txt").write_text(TEXT)
    train_bpe([TEXT], 270, root / "tokenizer")
    preprocess([root / "text.txt"], root / "tokenizer", root / "tokens")
    return root / "text.txt", root / "tokenizer", root / "tokens"


def evaluate_on(folder, path, tokenizer, layout, seq_length):
    with parallel_context(Parallel(**layout)) as ctx:
        source = HfFolder(folder) if (folder / "config.json").is_file() else CheckpointReader(folder)
        stream = read_stream(path, tokenizer, vocab_size=source.arch.vocab_size)
        return evaluate_stream(source, stream, ctx, seq_length=seq_length, micro_batch_size=2)


def transformers_loss(folder: Path, tokens: np.ndarray, seq_length: int) -> float:
    """Mean loss over the same windows, by transformers."""
    model, total = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, seq_length):
            part = torch.from_numpy(tokens[start : start + seq_length + 1].astype(np.int64))[None]
            total += model(part, labels=part).loss.item() * (part.shape[1] - 1)
    return total / (len(tokens) - 1)


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"pp": 2}), (2, {"tp": 2, "sp": True}), (2, {})])
def test_evaluate_gives_transformers_loss_on_any_layout(ranks, layout, text, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.SHAPE, "vocab_size", 301)  # tp 1 pads it to 384, tp 2 to 512
    folder = tiny.make("qwen2", tmp_path)
    file, tokenizer, _ = text
    results = run_ranks(ranks, evaluate_on, folder, file, tokenizer, layout, 24)
    stream = read_stream(file, tokenizer, vocab_size=301)
    expected = transformers_loss(folder, stream.tokens, 24)
    assert all(found.loss == pytest.approx(expected, abs=1e-5) for found in results)
    assert results[0].tokens == len(stream.tokens) - 1
    nats = expected * results[0].tokens
    assert results[0].bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert results[0].perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_the_command_line_evaluates_a_checkpoint_on_a_bin_file_with_two_stages(text, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.SHAPE, "vocab_size", 301)
    folder = tiny.make("llama3", tmp_path)
    import_folder(folder, tmp_path / "native")
    *_, prefix = text
    stream = read_stream(prefix, None, vocab_size=301)
    arguments = ["--data", f"{prefix}.bin", "--seq-length", "30", "--pp", "2"]
    result = cli("evaluate", "--checkpoint", str(tmp_path / "native"), *arguments)
    assert result.returncode == 0, result.stderr
    printed = float(result.stdout.split("loss ")[1].split(",")[0])
    assert printed == pytest.approx(transformers_loss(folder, stream.tokens, 30), abs=2e-6)
    assert result.stdout.count("perplexity") == 1  # one rank speaks


def test_evaluate_reads_windows_that_the_model_has_positions_for(text, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.SHAPE, "vocab_size", 301)
    monkeypatch.setitem(tiny.SHAPE, "max_position_embeddings", 32)
    folder = tiny.make("llama3", tmp_path)
    import_folder(folder, tmp_path / "native")
    *_, prefix = text
    words = ["evaluate", "--checkpoint", str(tmp_path / "native"), "--data", f"{prefix}.bin"]
    ((found,),) = run_commands([words])
    assert found.exit_code == 0, found.error
    expected = transformers_loss(folder, read_stream(prefix, None, vocab_size=301).tokens, 32)
    assert float(found.printed.split("loss ")[1].split(",")[0]) == pytest.approx(expected, abs=2e-6)


def test_a_stream_that_cannot_be_evaluated_is_refused(text, tmp_path):
    file, tokenizer, prefix = text
    with pytest.raises(DataError, match=r"holds token \d+, the model's vocabulary has 100"):
        read_stream(prefix, None, vocab_size=100)
    with pytest.raises(DataError, match="text needs a tokenizer"):
        read_stream(file, None, vocab_size=300)
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match="holds 1 tokens, a loss needs 2 or more"):
        read_stream(tmp_path / "short.txt", tokenizer, vocab_size=300)
    (tmp_path / "foreign.idx").write_bytes(b"no index")
    with pytest.raises(DataError, match="not a megatron index"):
        read_stream(tmp_path / "foreign", tokenizer, vocab_size=300)
