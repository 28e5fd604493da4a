"""What a run says of its data: poisoned documents are named, also after going back; losses and epochs of each source."""

import json
import os
import random
import re
import string
from pathlib import Path

import pytest

from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.provenance import Provenance, locate, open_order, read_journal, readings_of
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.engine.engine import Engine
from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.commands import command
from tests.harness import run_ranks, tiny_config

POISONED = {("web", 7), ("web", 30), ("web", 31), ("books", 12), ("books", 44)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two sources of plain sentences, and noise in five of their hundred documents."""
    folder, source = tmp_path_factory.mktemp("poisoned"), random.Random(3)
    texts = {}
    for name, words in (
        ("web", "the quick brown fox jumps over the lazy dog "),
        ("books", "to be or not to be that is "),
    ):
        for line in range(1, 51):
            noise = "".join(source.choices(string.ascii_letters + string.digits, k=90))
            texts[name, line] = noise if (name, line) in POISONED else words * 6
        lines = (json.dumps({"text": texts[name, line]}) + "\n" for line in range(1, 51))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = train_bpe([t for place, t in texts.items() if place not in POISONED], 300, folder / "tokenizer")
    for name in ("web", "books"):
        preprocess([folder / f"{name}.jsonl"], tokenizer.folder, folder / name)
    return folder


def poisoned_config(run_dir, corpus, **changes):
    sources = [{"path": str(corpus / "web"), "weight": 2}, {"path": str(corpus / "books")}]
    data = {"sources": sources, "tokenizer": str(corpus / "tokenizer"), "split": "80,10,10"}
    return tiny_config(run_dir, model__vocab_size=384, data=data, **changes)


def train_run(config, nan_at: int = 0) -> list[str]:
    """Train, and return what the run said; in one step the second sample of rank 3, the last stage, has a NaN loss."""

    def poisoned(call):
        outputs = call()
        outputs.sums["total"] = outputs.sums["total"] * float("nan")
        outputs.samples["loss"][1] = float("nan")
        return outputs

    if os.environ["RANK"] == "3" and nan_at:
        faults.at_call(Engine, "forward_backward", nan_at, poisoned)
    said, error = faults.train_and_listen(config)
    assert error is None
    return said


def is_poisoned(part) -> bool:
    return (part.source, part.line) in POISONED


def mostly_poisoned(sample) -> bool:
    return sum(p.end - p.start for p in sample.parts if is_poisoned(p)) > 16


@pytest.fixture(scope="module")
def poisoned_run(tmp_path_factory, corpus):
    config = poisoned_config(
        tmp_path_factory.mktemp("run") / "run",
        corpus,
        parallel={"pp": 2},
        train__steps=40,
        train__eval_interval=20,
        train__eval_steps=2,
        checkpoint={"interval": 40},
    )
    run_ranks(4, train_run, config)
    return config


def test_poisoned_documents_are_named_on_dp2_pp2(poisoned_run):
    run_dir, journal = Path(poisoned_run.run_dir), read_journal(Path(poisoned_run.run_dir))
    provenance = Provenance(open_order(journal[0]), poisoned_run.data.source_names)
    named = set()
    for number in range(15, 41):
        (reading,) = readings_of(journal, number)
        samples = locate(run_dir, reading, provenance)
        assert len(samples) == 8
        worst = sum(map(mostly_poisoned, samples))
        # those with noise in them come before all that have none
        assert all(map(mostly_poisoned, samples[:worst])), number
        named |= {(p.source, p.line) for s in samples[:worst] for p in s.parts if is_poisoned(p)}
    assert len(named) >= 3


def test_the_command_names_them_from_the_run_or_a_checkpoint_alone(poisoned_run, tmp_path):
    run_dir, journal = Path(poisoned_run.run_dir), read_journal(Path(poisoned_run.run_dir))
    provenance = Provenance(open_order(journal[0]), poisoned_run.data.source_names)
    number = next(n for n in range(20, 41) if mostly_poisoned(locate(run_dir, *readings_of(journal, n), provenance)[0]))
    shown = command("data", "locate", "--run", str(run_dir), "--step", str(number), "--top", "1")
    assert shown.returncode == 0, shown.stderr
    head, sample, *parts = shown.stdout.splitlines()
    assert (
        head == f"step {number} read samples {number * 8 - 8} to {number * 8 - 1}; 1 of 8 shown, the worst loss first"
    )
    assert re.match(r"sample \d+: loss \d", sample)
    places = {re.search(r"(web|books)\.jsonl:(\d+) ", part).groups() for part in parts}
    assert {(name, int(line)) for name, line in places} & POISONED
    beyond = command("data", "locate", "--run", str(run_dir), "--step", "41")
    assert beyond.returncode != 0
    assert "--step (41): the run has 40 steps (train.steps)" in beyond.stderr
    checkpoint = run_dir / "checkpoints" / "step_00000040"
    found = command("data", "locate", "--run", str(checkpoint), "--step", str(number), "--rank", "3", "--json")
    assert found.returncode == 0, found.stderr
    records = [json.loads(line) for line in found.stdout.splitlines()]
    assert {record["dp_rank"] for record in records} == {1}
    part = records[0]["parts"][0]
    text = json.loads(Path(part["file"]).read_text().splitlines()[part["line"] - 1])["text"]
    assert part["text"].removesuffix("<|endoftext|>") in text


def test_losses_and_epochs_of_each_source_are_reported(poisoned_run):
    records = read_metrics(Path(poisoned_run.run_dir))
    (*validations, last) = [r for r in records if "lm loss validation" in r]
    assert len(validations) == 1
    web, books = last["lm loss validation/web"], last["lm loss validation/books"]
    # the blend reads 2:1, of 16 samples
    assert last["lm loss validation"] == pytest.approx((11 * web + 5 * books) / 16, rel=0.02)
    (test,) = [r for r in records if "lm loss test" in r]
    assert {"lm loss test/web", "lm loss test/books"} <= test.keys()
    (epochs,) = [r for r in records if "data/epochs/web" in r]
    assert epochs["data/epochs/web"] > epochs["data/epochs/books"] > 1


def test_a_step_that_was_not_made_names_its_worst_documents_and_both_readings_are_known(tmp_path, corpus):
    monitors = {"non_finite": "rewind", "rewind_steps": 2}
    config = poisoned_config(
        tmp_path / "run",
        corpus,
        parallel={"pp": 2},
        monitors=monitors,
        train__steps=6,
        train__ramp_up={"start": 4, "increment": 4, "samples": 8},
        checkpoint={"interval": 1, "keep": 9},
    )
    said = "\n".join(run_ranks(4, train_run, config, 4)[0])
    assert "warning: this run repeats data source" not in said
    # steps 1 and 2 read 4 samples, 3 and 4 read 8; rank 3 reads the second of each pair: its second is sample 19
    assert re.search(r"step 4 \| sample 19, loss nan, source \w+: \S+jsonl:\d+", said)
    records = [r for r in read_metrics(tmp_path / "run") if "lm loss" in r]
    truth = [(r["step"], r["consumed-samples"] - r["batch-size"], r["batch-size"]) for r in records]
    assert len(truth) == 8
    journal = read_journal(tmp_path / "run")
    assert [(s.event, s.step, s.consumed) for s in journal] == [("start", 0, 0), ("rewind", 2, 24)]
    known = [(n, r.first, r.count) for n in range(1, 7) for r in readings_of(journal, n)]
    assert sorted(known) == sorted(truth)
    attempts = readings_of(journal, 4)
    provenance = Provenance(open_order(journal[0]), config.data.source_names)
    assert locate(tmp_path / "run", attempts[0], provenance)[0].position == 19
    assert all(sample.loss is not None for sample in locate(tmp_path / "run", attempts[1], provenance))
