"""Dynamic data selection in training: noise is dropped, alike on every layout, and resumed bit for bit."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest

from flagscale_like.data import pretrain
from flagscale_like.data.draws import read_draws
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.provenance import Provenance, draws_of_states, locate, open_order, read_journal, readings_of
from flagscale_like.data.selection import SourcesDataset
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.errors import DataError
from flagscale_like.training import source_selection, trail
from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.commands import command
from tests.harness import run_ranks, tiny_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three sources: sentences from a few words, letters at random, and more of the sentences, held out."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog"]
    letters = "abcdefghijklmnopqrstuvwxyz "
    texts = {
        "useful": lambda: " ".join(rng.choice(words) for _ in range(60)),
        "noise": lambda: "".join(rng.choice(letters) for _ in range(240)),
        "target": lambda: " ".join(rng.choice(words) for _ in range(60)),
    }
    for name, make in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": make()}) + "\n" for _ in range(150)))
    tokenizer = train_bpe((folder / "useful.jsonl").read_text().splitlines(), 270, folder / "tokenizer")
    for name in texts:
        preprocess([folder / f"{name}.jsonl"], tokenizer.folder, folder / name)
    return folder


def selecting(run_dir, corpus, *, rule="progress", **changes):
    selection = {"rule": rule, "interval": 2, **({"target": str(corpus / "target")} if rule == "target" else {})}
    data = {
        "sources": [{"path": str(corpus / name)} for name in ("useful", "noise")],
        "tokenizer": str(corpus / "tokenizer"),
        "selection": selection,
    }
    fixed = {"model__vocab_size": 384, "train__steps": 12, "checkpoint": {"interval": 5, "keep": 9}}
    return tiny_config(run_dir, data=data, **{**fixed, **changes})


def selected(run_dir, what):
    """[useful, noise] at every change."""
    records = [r for r in read_metrics(Path(run_dir)) if "selection/weight/noise" in r]
    return [[r[f"selection/{what}/{name}"] for name in ("useful", "noise")] for r in records]


@pytest.fixture(scope="module", params=["progress", "target"])
def one_process(request, corpus, tmp_path_factory):
    config = selecting(tmp_path_factory.mktemp("one") / "run", corpus, rule=request.param)
    run_ranks(1, faults.train_run, config)
    return request.param, config


def test_the_weight_of_noise_falls(one_process):
    _, config = one_process
    weights = selected(config.run_dir, "weight")
    assert len(weights) == 6
    assert all(sum(pair) == pytest.approx(1) for pair in weights)
    assert weights[-1][1] < 0.4 < 0.6 < weights[-1][0]
    drawn = selected(config.run_dir, "samples")
    assert sum(drawn[-1]) == 12 * 8
    assert drawn[-1][0] > drawn[-1][1] + 8


def test_a_resumed_run_draws_and_trains_bit_for_bit(one_process, corpus, tmp_path):
    rule, whole = one_process
    shutil.copytree(whole.run_dir, tmp_path / "run")
    for step in (10, 12):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:08d}")
    run_ranks(1, faults.train_run, selecting(tmp_path / "run", corpus, rule=rule))
    assert faults.resumed_from(tmp_path / "run") == 5
    assert faults.losses(tmp_path / "run") == faults.losses(whole.run_dir)
    assert selected(tmp_path / "run", "weight") == selected(whole.run_dir, "weight")
    final = "checkpoints/step_00000012"
    assert faults.rank_files(tmp_path / "run" / final) == faults.rank_files(Path(whole.run_dir) / final)


@pytest.mark.parametrize(
    ("ranks", "layout", "micro_batch"),
    [
        pytest.param(2, {"tp": 2, "sp": True}, 4, id="tp2 sp"),
        pytest.param(2, {"cp": 2}, 4, id="cp2"),
        pytest.param(4, {"pp": 2, "vpp": 2}, 1, id="pp2 vpp2 dp2"),
        pytest.param(4, {"tp": 2, "sp": True, "pp": 2}, 1, id="tp2 sp pp2", marks=pytest.mark.soak),
    ],
)
def test_every_layout_comes_to_the_same_weights(ranks, layout, micro_batch, one_process, corpus, tmp_path):
    rule, whole = one_process
    changes = {"parallel": layout, "train__micro_batch_size": micro_batch}
    run_ranks(ranks, faults.train_run, selecting(tmp_path / "run", corpus, rule=rule, **changes))
    assert selected(tmp_path / "run", "samples") == selected(whole.run_dir, "samples")
    for here, expected in zip(selected(tmp_path / "run", "weight"), selected(whole.run_dir, "weight"), strict=True):
        assert here == pytest.approx(expected, rel=2e-2)
    what = "alignment" if rule == "target" else "loss"
    for here, expected in zip(selected(tmp_path / "run", what), selected(whole.run_dir, what), strict=True):
        assert here == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_probes_leave_the_loss_scale_alone_and_a_gradient_that_is_not_finite_gives_no_score(corpus, tmp_path):
    changes = {"train__precision": "fp16", "optimizer__initial_loss_scale": 256.0, "train__steps": 4}
    config = selecting(tmp_path / "run", corpus, rule="target", checkpoint={"interval": 4}, **changes)
    run_ranks(1, faults.train_run, config)
    state = json.loads((tmp_path / "run/checkpoints/step_00000004/state.json").read_text())
    assert state["loss_scaler"] == {"scale": 256.0, "growth_tracker": 4, "hysteresis_tracker": 2}
    assert source_selection.cosine(3.0, 4.0, 9.0) == 0.5
    assert source_selection.cosine(0.0, 0.0, 9.0) == 0.0
    assert [source_selection.cosine(*three) for three in ((math.nan, 4.0, 9.0), (1.0, math.inf, 9.0))] == [None, None]


class PoisonedSources(SourcesDataset):
    """Two samples of the first source cannot be learned from; what is read is written down."""

    log: Path

    def __getitem__(self, index):
        with open(self.log, "a") as file:
            file.write(json.dumps(index) + "\n")
        sample = super().__getitem__(index)
        return {**sample, "loss_mask": sample["loss_mask"] * float("nan")} if index in {(0, 17), (0, 40)} else sample


def train_on_poison(config):
    PoisonedSources.log = Path(f"{config.run_dir}.read")
    trail.SourcesDataset = pretrain.SourcesDataset = PoisonedSources
    faults.train_run(config)


def test_a_run_that_goes_back_keeps_its_draw_and_resumes_bit_for_bit(corpus, tmp_path):
    monitors = {"non_finite": "rewind", "rewind_steps": 2, "layers": {"interval": 2}}
    changes = {"monitors": monitors, "checkpoint": {"interval": 1, "keep": 99}}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_ranks(1, train_on_poison, selecting(whole, corpus, **changes))
    run_ranks(1, train_on_poison, selecting(parted, corpus, train__exit_at_step=7, **changes))
    run_ranks(1, train_on_poison, selecting(parted, corpus, **changes))
    final = "checkpoints/step_00000012"
    states = [json.loads((folder / final / "state.json").read_text()) for folder in (whole, parted)]
    assert states[0]["rewinds"] == 2
    assert sum(states[0]["selection"]["drawn"]) == states[0]["consumed_samples"] == (12 + 2 * 2) * 8
    for key in ("selection", "monitors", "guard", "rewinds", "consumed_samples"):
        assert states[0][key] == states[1][key]
    assert faults.rank_files(parted / final) == faults.rank_files(whole / final)
    for run in (whole, parted):
        order = open_order(read_journal(run)[0], read_draws(run))
        read = [tuple(json.loads(line)) for line in Path(f"{run}.read").read_text().splitlines()]
        length = len(order.parts[0])
        assert [order.place(i) for i in range(len(read))] == [(source, index % length) for source, index in read]


def test_selection_that_is_switched_on_at_a_resume_is_followed(corpus, tmp_path):
    run = tmp_path / "run"
    with_it = selecting(run, corpus, train__steps=8)
    without = with_it.model_copy(update={"data": with_it.data.model_copy(update={"selection": None})})
    without = without.model_copy(update={"train": without.train.model_copy(update={"exit_at_step": 3})})
    run_ranks(1, train_on_poison, without)
    run_ranks(1, train_on_poison, with_it)
    (reading,) = readings_of(read_journal(run), 4)
    order = open_order(reading.segment, read_draws(run))
    read = [tuple(json.loads(line)) for line in Path(f"{run}.read").read_text().splitlines()]
    length = len(order.parts[0])
    assert [order.place(24 + i) for i in range(40)] == [(source, index % length) for source, index in read]


def test_sources_in_another_order_are_refused_at_a_resume(one_process, tmp_path):
    run = shutil.copytree(one_process[1].run_dir, tmp_path / "run")
    config = one_process[1]
    data = config.data.model_copy(update={"sources": config.data.sources[::-1]})
    train = config.train.model_copy(update={"steps": config.train.steps + 1})
    ((_, error),) = run_ranks(
        1, faults.train_and_listen, config.model_copy(update={"run_dir": str(run), "data": data, "train": train})
    )
    assert "selection is of the sources useful, noise; data.sources lists noise, useful" in error


def test_the_documents_of_a_step_are_named_from_the_journal_or_a_checkpoint(one_process):
    run = Path(one_process[1].run_dir)
    (reading,) = readings_of(read_journal(run), 6)
    order = open_order(reading.segment, read_draws(run))
    named = [
        str(part) for sample in locate(run, reading, Provenance(order, ["useful", "noise"])) for part in sample.parts
    ]
    checkpoint = run / "checkpoints" / "step_00000005"  # the weights change after every second step
    alone = command("data", "locate", "--run", str(checkpoint), "--step", "6", "--top", "0")
    assert alone.returncode == 0, alone.stderr
    assert re.findall(r"  (\S+\.jsonl:\d+) ", alone.stdout) == named
    state = json.loads((checkpoint / "state.json").read_text())
    with pytest.raises(DataError, match=r"is known from the run's draws\.jsonl only"):
        open_order(reading.segment, draws_of_states([state])).place(48)
