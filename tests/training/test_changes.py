"""A resume names what has changed, says what follows, and refuses to mix held-out documents into training."""

import json
import shutil

import pytest

from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.errors import DataError
from flagscale_like.training.changes import describe_changes, learning_rate_at
from tests.commands import run_commands
from tests.harness import tiny_config, write_yaml

LINES = [json.dumps({"text": f"line {i} of a text that is long enough to be read"}) for i in range(60)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A source of forty documents, and the same one grown to sixty."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_bpe(LINES, 300, folder / "tokenizer").folder
    for name, count in (("text", 40), ("grown", 60)):
        (folder / f"{name}.jsonl").write_text("\n".join(LINES[:count]) + "\n")
        preprocess([folder / f"{name}.jsonl"], tokenizer, folder / name)
    return folder


@pytest.fixture(scope="module")
def outcomes(corpus, tmp_path_factory):
    """What each resume of one run says, by name."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(corpus, folder / "data")
    data = {"sources": [{"path": "data/text"}], "tokenizer": "data/tokenizer", "split": "90,10,0"}
    changes = {"model__vocab_size": 384, "train__exit_at_step": 2, "train__global_batch_size": 2, "data": data}
    write_yaml(tiny_config("run", **changes), folder / "run.yaml")

    def train(*more):
        return ["train", "run.yaml", "run_dir=" + more[0], "train.exit_at_step=3", *more[1:]]

    names = ("same", "schedule", "split", "accepted", "order", "done")
    lines = [
        train("same"),
        train("schedule", "train.steps=60", "optimizer.lr=0.02", "train.global_batch_size=4"),
        train("split", "data.split='50,50,0'"),
        train("accepted", "data.split='50,50,0'", "data.accept_changes=true"),
        train("order", "train.seed=7", "train.seq_length=16"),
        train("done", "train.exit_at_step=2"),
    ]
    ((first,),) = run_commands([["train", "run.yaml"]], folder)
    assert first.exit_code == 0, first.error
    for name in names:
        shutil.copytree(folder / "run", folder / name)
    (found,) = run_commands(lines, folder)
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus / f"grown{suffix}", folder / "data" / f"text{suffix}")
    ((grown,),) = run_commands([train("run")], folder)
    return {"grown": grown, **dict(zip(names, found, strict=True))}


def changed(outcome):
    """The keys that a resume names, without where it runs and how far."""
    marks = [line.partition("changed since the checkpoint: ")[2] for line in outcome.printed.splitlines()]
    keys = [mark.partition(":")[0] for mark in marks if mark]
    return [key for key in keys if key not in ("run_dir", "train.exit_at_step")]


def test_a_resume_without_changes_names_none(outcomes):
    assert outcomes["same"].exit_code == 0, outcomes["same"].error
    assert changed(outcomes["same"]) == []
    assert "learning rate at this step" not in outcomes["same"].printed


def test_a_changed_schedule_and_batch_are_named_with_what_follows(outcomes):
    found = outcomes["schedule"]
    assert found.exit_code == 0, found.error
    assert changed(found) == ["train.steps", "train.global_batch_size", "optimizer.lr"]
    assert "train.steps: 6 -> 60" in found.printed
    assert "the samples go on in their order, in steps of the new batch size" in found.printed
    assert "the learning rate at this step is" in found.printed
    assert "some samples are read again" not in found.printed


def test_documents_that_change_sides_are_refused_unless_accepted(outcomes):
    refused, accepted = outcomes["split"], outcomes["accepted"]
    assert refused.exit_code == DataError.exit_code
    # 36 of the 40 documents were trained on, and 20 are now.
    assert (
        "0 documents that were held out are now trained on, and 16 training documents are now held out" in refused.error
    )
    assert "set data.accept_changes to true" in refused.error
    assert accepted.exit_code == 0, accepted.error
    assert "the validation loss is no longer of unseen text" in accepted.printed
    assert changed(accepted) == ["data.split"]


def test_a_grown_source_is_named_and_refused_where_it_mixes(outcomes):
    found = outcomes["grown"]
    assert found.exit_code == DataError.exit_code
    # 40 documents: the last 4 were held out. 60: the first 54 are trained on.
    assert "4 documents that were held out are now trained on" in found.error


def test_another_order_of_the_samples_is_said(outcomes):
    found = outcomes["order"]
    assert found.exit_code == 0, found.error
    assert set(changed(found)) == {"train.seed", "train.seq_length"}
    assert "the order of the samples is another one from here on: it goes on after 4 samples" in found.printed


def test_a_finished_run_says_that_nothing_is_left(outcomes):
    assert outcomes["done"].exit_code == 0, outcomes["done"].error
    assert (
        "complete, nothing is left to train: train.steps is 6 and train.exit_at_step 2, and step 2 is done"
        in outcomes["done"].printed
    )


def test_a_configuration_of_an_earlier_version_is_compared_by_the_keys_that_it_has(tmp_path):
    config = tiny_config(tmp_path)
    saved = {"train": config.model_dump(mode="json")["train"] | {"steps": 9, "no_longer_there": 1}}
    notes = describe_changes(saved, config, consumed=0, rate_steps=0)
    assert notes == [
        "changed since the checkpoint: train.steps: 9 -> 6",
        "changed since the checkpoint: train.no_longer_there: 1 -> None",
    ]


def test_the_learning_rate_is_the_schedules(tmp_path):
    config = tiny_config(tmp_path, optimizer={"lr": 1.0, "warmup_steps": 2, "schedule": "linear"}, train__steps=6)
    assert [learning_rate_at(config, step) for step in (1, 2, 4, 6)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
