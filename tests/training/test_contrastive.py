"""Runs on groups of a query and its passages: they learn to find the positive, alike on every layout, and go on exactly."""

import math
import shutil
from pathlib import Path

import pytest

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.manifest import step_name
from flagscale_like.data.preprocess import preprocess_groups
from flagscale_like.data.shards import GroupOptions
from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.commands import invoke
from tests.data.chats import make_tokenizer
from tests.data.groups import write_groups
from tests.harness import run_ranks, tiny_config, write_yaml
from tests.training.test_preferences import train_all

LAYOUTS = {
    "tp2 sp pp2": (4, {"parallel": {"tp": 2, "sp": True, "pp": 2}}),
    "pp2 vpp2, recomputed": (2, {"parallel": {"pp": 2, "vpp": 2}, "train__recompute": "full"}),
    "dp2, two packs": (2, {"train__micro_batch_size": 2}),
    "cp2": (2, {"parallel": {"cp": 2}}),
}
NAMES = ("accuracy", "positive", "negatives", "filtered", "distilled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Groups, some of them with a teacher's scores; their tokenizer; and `base`, a run of two steps on random tokens."""
    folder = tmp_path_factory.mktemp("groups")
    tokenizer = make_tokenizer(folder / "tok")
    write_groups(folder / "groups.jsonl", 60, negatives=4, scores=True)
    preprocess_groups([folder / "groups.jsonl"], tokenizer, folder / "groups", GroupOptions())
    base = tiny_config(folder / "base", model__vocab_size=300, train__steps=2, checkpoint={"interval": 2})
    run_ranks(1, faults.train_run, base)
    return folder


def group_config(run_dir, folder, *, options=None, **changes):
    changes = {
        "data": {"sources": [{"path": str(folder / "groups")}], "tokenizer": str(folder / "tok"), "split": "80,20,0"},
        "model__vocab_size": 300,
        "train__seq_length": 128,
        "train__global_batch_size": 4,
        "train__steps": 4,
        "train__eval_interval": 2,
        "train__eval_steps": 1,
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0},
        "checkpoint": {"interval": 2, "load": str(folder / "base")},
        "objective": {"kind": "contrastive", "passages": 3, "temperature": 0.05, "distill": 0.2, **(options or {})},
        **changes,
    }
    return tiny_config(run_dir, **changes)


def numbers(run_dir):
    """(what every step reported of its groups, what every evaluation did)."""
    records = read_metrics(Path(run_dir))
    wanted = ("contrastive loss", "retrieval/", "grad-norm")
    found = [{k: v for k, v in r.items() if k.startswith(wanted) and not k.endswith("/mean")} for r in records]
    steps = [r for r, record in zip(found, records, strict=True) if "iteration-time" in record]
    return steps, [r for r, record in zip(found, records, strict=True) if "contrastive loss validation" in record]


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory):
    config = group_config(tmp_path_factory.mktemp("one") / "run", folder)
    (((said, error),),) = run_ranks(1, train_all, [config])
    assert error is None
    return config, said


def test_a_run_says_what_it_reads_of_a_language_model_and_reports_its_retrieval(one_process):
    config, said = one_process
    assert any(line.endswith("output_layer.weight: an embedding model has no output layer") for line in said)
    assert any(line.startswith(f"{config.model.parameter_count() - 300 * 64:,} parameters | tp 1") for line in said)
    steps, evaluations = numbers(config.run_dir)
    assert len(steps) == 4
    assert len(evaluations) == 2
    for step in steps:
        assert step.keys() == {"contrastive loss", "grad-norm", *(f"retrieval/{name}" for name in NAMES)}
        assert 0 <= step["retrieval/accuracy"] <= 1
        assert 0.2 < step["retrieval/distilled"] < 0.8
        assert step["retrieval/negatives"] > 2
    assert evaluations[0].keys() == {"contrastive loss validation", *(f"retrieval/{name} validation" for name in NAMES)}
    (line, *_) = [line for line in said if line.startswith("step 1/4")]
    assert "| retrieval/accuracy " in line
    assert any("validation loss" in line and "retrieval/accuracy" in line for line in said)
    checkpoint = CheckpointReader(Path(config.run_dir) / "checkpoints" / step_name(4))
    assert "output_layer.weight" not in checkpoint.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_on_groups_alike(layout, one_process, folder, tmp_path):
    ranks, changes = LAYOUTS[layout]
    config = group_config(tmp_path / "run", folder, **changes)
    for ((_, error),) in run_ranks(ranks, train_all, [config]):
        assert error is None
    (steps, evaluations), (wanted, held_out) = numbers(config.run_dir), numbers(one_process[0].run_dir)
    assert steps[0] == pytest.approx(wanted[0], rel=1e-5)
    for found, expected in zip(steps + evaluations, wanted + held_out, strict=True):
        assert found == pytest.approx(expected, rel=3e-3, abs=3e-3)


def test_a_run_goes_on_exactly(one_process, folder, tmp_path):
    config, _ = one_process
    shutil.copytree(config.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / step_name(4))
    (((said, error),),) = run_ranks(1, train_all, [group_config(tmp_path / "run", folder)])
    assert error is None
    assert any("resuming from step 2" in line for line in said)
    assert numbers(tmp_path / "run")[0][-2:] == numbers(config.run_dir)[0][-2:]


def test_accuracy_rises_and_what_teaches_nothing_is_refused(folder, tmp_path):
    learns = group_config(
        tmp_path / "learns",
        folder,
        options={"distill": 0.0, "passages": 2, "dimensions": [32]},
        train__steps=40,
        train__log_interval=40,
        train__eval_interval=40,
        optimizer={"lr": 3e-3, "warmup_steps": 0},
        checkpoint={"interval": 0},
    )
    alone = group_config(
        tmp_path / "alone",
        folder,
        options={"passages": 1, "distill": 0.0},
        train__seq_length=48,
        train__global_batch_size=1,
        train__eval_interval=0,
    )
    (((_, error), (_, refused)),) = run_ranks(1, train_all, [learns, alone])
    assert error is None
    (first, *_), (*_, held_out) = numbers(learns.run_dir)
    assert first["retrieval/accuracy"] < 0.5 < 0.8 < held_out["retrieval/accuracy validation"]
    assert "a batch of one query without hard negatives has the loss 0" in refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature"),
        ({"passages": 1, "negatives": "given"}, "no query has a negative, and the loss is 0"),
        ({"passages": 1, "distill": 1.0}, "it needs passages 2 or more"),
        ({"contrast": 0, "distill": 0}, "nothing would be learned"),
        ({"symmetric": True, "negatives": "given"}, "it needs negatives batch or cross"),
        ({"dimensions": [32, 16]}, "must be above 0 and rise"),
        ({"dimensions": [16, 65]}, r"objective.dimensions \(\[16, 65\]\) exceed model.hidden_size \(64\)"),
        ({"false_negative_margin": math.inf}, "false_negative_margin"),
        ({"teacher_temperature": 0}, "teacher_temperature"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        group_config(tmp_path, folder, options=options)


def test_a_plan_counts_the_first_pass_of_an_embedding_model(folder, tmp_path):
    path = write_yaml(group_config(tmp_path / "run", folder), tmp_path / "run.yaml")
    lines = [
        ["plan", str(path), "--cluster", "1x2xA100-40"],
        ["train", str(path), "--dry-run", "--cluster", "1x1xA100-40"],
    ]
    for outcome in (invoke(line) for line in lines):
        assert outcome.exit_code == 0, outcome.error
        assert "the first pass of gradient caching " in outcome.printed
