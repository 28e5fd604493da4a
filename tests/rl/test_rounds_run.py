"""Rounds with models: a run that is killed while either of them learns goes on, and ends with the same bytes."""

import json
from pathlib import Path

import pytest
import yaml

from flagscale_like.checkpoint.opened import open_adapted
from flagscale_like.config import RunConfig
from flagscale_like.engine.engine import Engine
from flagscale_like.json_files import read_records
from flagscale_like.recipes.rounds import run_rounds
from flagscale_like.rl.rounds import read_rounds
from flagscale_like.rl.validation import Validation
from flagscale_like.runtime.parallel import parallel_context
from tests import faults
from tests.harness import run_ranks
from tests.rl.runs import make_folder, rl_config, run_all

REWARD = {
    "train": {"steps": 6, "micro_batch_size": 1, "global_batch_size": 2, "seq_length": 128, "precision": "fp32"},
    "optimizer": {"lr": 3e-3, "warmup_steps": 0, "weight_decay": 0.0},
    "objective": {"kind": "reward", "heads": 2, "center": 0.01},
    "checkpoint": {"interval": 2},
}


def rounds_config(run_dir, folder, **changes):
    rl = {
        "reward": {"kind": "model"},
        "outside": {"action": "reject", "scores": [0.05, 0.8], "kl": "validated"},
        "rounds": {
            "count": 2,
            "iterations": 2,
            "pairs": 40,
            "judge": {"kind": "function", "function": "tests.rl.runs:small_ids"},
            "reward_model": str(folder / "reward.yaml"),
        },
    }
    options = {"train__steps": 4, "checkpoint": {"interval": 1, "keep": 9, "load": str(folder / "start")}}
    options["train__global_batch_size"] = 16
    return rl_config(run_dir, folder, rl, **(options | changes))


def make_rounds(config: RunConfig, kill_at: int | None = None):
    """Make the rounds; with `kill_at`, die at that optimizer step of this start, of whichever model."""
    if kill_at is not None:
        faults.at_call(Engine, "update", kill_at, faults.kill_self)
    with parallel_context(config.parallel) as ctx:
        progress = run_rounds(config, ctx)
    return progress.step


def contents(run_dir):
    """The weights and moments of both models, and what each phase left."""
    run_dir = Path(run_dir)
    names = [
        "rounds/*/samples.jsonl",
        "rounds/*/judged.jsonl",
        "rounds/*/train/pairs.bin",
        "rounds/*/reward/checkpoints/*6/rank_*",
    ]
    names += ["checkpoints/step_00000004/rank_*", "outside.jsonl"]
    return {str(p.relative_to(run_dir)): p.read_bytes() for name in names for p in sorted(run_dir.glob(name))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("rounds"))
    (folder / "reward.yaml").write_text(yaml.safe_dump(REWARD))
    start = rl_config(folder / "start", folder, train__steps=1, checkpoint={"interval": 1})
    assert run_ranks(1, run_all, [start])[0][0][1] is None
    return folder


def test_a_kill_while_a_model_learns_changes_nothing(folder):
    whole = rounds_config(folder / "whole", folder)
    assert run_ranks(1, make_rounds, whole) == [4]
    expected = contents(whole.run_dir)
    assert len(expected) == 2 * 4 + 2
    rounds = read_rounds(folder / "whole" / "rounds")
    assert [r["round"] for r in rounds] == [1, 2]
    assert rounds[0]["accepted"]
    assert all(0 <= r["accuracy"] <= 1 for r in rounds)
    source = open_adapted(Path(rounds[1]["reward"]), adapter=None).source
    record = Validation.read(source)
    assert record.pairs >= rounds[0]["held_out"]
    # The policy of round 1 is the reference; in round 2 it has moved, and its answers are measured as well.
    measured = [json.loads((folder / f"whole/rounds/round_000{n}/held_out.json").read_text()) for n in (1, 2)]
    assert [len(own["surprise"]) for own in measured] == [2 * r["held_out"] for r in rounds]
    assert not any(measured[0]["kl"])
    assert (record.kl[0], record.kl[-1]) == (min(measured[1]["kl"]), max(measured[1]["kl"]))
    assert 0 < record.kl[-1] < 20
    assert record.surprise[-1] == max(measured[0]["surprise"] + measured[1]["surprise"])
    kept = read_records(folder / "whole" / "outside.jsonl")
    drawn = [json.loads(line)["first"]["ids"] for line in (folder / "whole/rounds/round_0002/samples.jsonl").open()]
    newest = [r["ids"] for r in reversed(kept) if r["step"] <= 2]
    assert drawn[0] == newest[0]  # what was outside is judged first
    metrics = [r for r in read_records(folder / "whole" / "metrics.jsonl") if "outside/share" in r]
    assert any(r["outside/share"] > 0 and r["rollout/rejected"] > 0 for r in metrics)
    # Steps of one start: 6 of the reward model, 2 of the policy, 6, 2. Killed in the first three, it goes on.
    config = rounds_config(folder / "killed", folder)
    for kill_at in (
        5,
        4,
        6,
    ):  # a reward model at step 5; the policy at step 2 (2 more steps, then 2); the second reward model
        with pytest.raises(AssertionError, match="died"):
            run_ranks(1, make_rounds, config, kill_at)
    assert run_ranks(1, make_rounds, config) == [4]
    found = contents(config.run_dir)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
