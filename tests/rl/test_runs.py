"""Whole runs of task rl: equal on every layout, exact after a kill in any phase, and better at what is rewarded."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.config import load_config
from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.harness import run_ranks, tiny_config
from tests.rl.runs import RejectsTwice, close, make_folder, numbers, rl_config, run_all

PPO = {"algorithm": "ppo", "epochs": 2, "minibatches": 2, "rollout": {"samples": 1}, "kl": {"coefficient": 0.05}}
GROUPS = {
    "algorithm": "grpo",
    "dynamic_sampling": True,
    "reward": {"kind": "function", "function": "tests.rl.runs:mostly_small"},
    "kl": {"coefficient": 0.05, "into": "loss", "estimator": "k3"},
    "overlong": {"buffer": 4},
}
TWO = {"train__steps": 2}
STALE = PPO | {"staleness": 1, "kl": {"coefficient": 0.05, "target": 0.01, "horizon": 100}}


ROUNDS = {"count": 1, "iterations": 3, "pairs": 4, "judge": {"kind": "command", "command": ["x"]}, "reward_model": "x"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory):
    """Runs of one process: two iterations each; the last one four, with a checkpoint after each."""
    runs = tmp_path_factory.mktemp("one")
    start = rl_config(runs / "start", folder, PPO, train__steps=1, checkpoint={"interval": 1})
    load = {"checkpoint": {"interval": 0, "load": str(runs / "start")}} | TWO
    configs = {"start": start, "ppo": rl_config(runs / "ppo", folder, PPO, **load)}
    configs["groups"] = rl_config(runs / "groups", folder, GROUPS, **load)
    configs["unpacked"] = rl_config(runs / "unpacked", folder, PPO, train__seq_length=32, **load)
    four = {"model__num_layers": 4, "train__steps": 2}
    configs["four layers"] = rl_config(runs / "four", folder, PPO, **four)
    configs["stale"] = rl_config(runs / "stale", folder, STALE, train__steps=4, checkpoint={"interval": 1, "keep": 9})
    ((*found,),) = run_ranks(1, run_all, list(configs.values()))
    assert [error for _, error in found] == [None] * len(configs)
    return configs


def test_an_iteration_is_the_same_on_every_layout_and_packed(one_process, folder, tmp_path):
    load = {"checkpoint": {"interval": 0, "load": one_process["start"].run_dir}} | TWO
    layouts = {"tp2sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "dp2": {}, "cp2": {"cp": 2}}
    configs = [rl_config(tmp_path / name, folder, PPO, parallel=layout, **load) for name, layout in layouts.items()]
    configs.append(rl_config(tmp_path / "groups dp2", folder, GROUPS, **load))
    other = shutil.copytree(one_process["stale"].run_dir, tmp_path / "other", ignore=shutil.ignore_patterns("*3", "*4"))
    configs.append(rl_config(other, folder, STALE, train__steps=4, parallel={"tp": 2}))
    apart = STALE | {"rollout": {"samples": 1, "apart": 1}}
    configs.append(rl_config(tmp_path / "apart", folder, apart, train__steps=4, checkpoint={"interval": 2}))
    # A whole copy of the policy draws on each rank, and again in an iteration that draws again; and vLLM's stand-in.
    refit, four = PPO | {"rollout": {"samples": 1, "engine": "refit"}}, {"model__num_layers": 4, "train__steps": 2}
    configs.append(rl_config(tmp_path / "tp2sp refit", folder, refit, parallel=layouts["tp2sp"], **load))
    configs.append(rl_config(tmp_path / "vpp2 refit", folder, refit, parallel={"pp": 2, "vpp": 2}, **four))
    groups = GROUPS | {"rollout": {"engine": "refit"}}
    configs.append(rl_config(tmp_path / "groups cp2 refit", folder, groups, parallel={"cp": 2}, **load))
    vllm = PPO | {"rollout": {"samples": 1, "engine": "vllm", "vllm": {"memory": 0.3}}}
    configs.append(rl_config(tmp_path / "vllm", folder, vllm, parallel=layouts["tp2sp"], **load))
    elsewhere = STALE | {"rollout": {"samples": 1, "engine": "vllm", "apart": 1}}
    configs.append(rl_config(tmp_path / "vllm apart", folder, elsewhere, train__steps=2))
    ranks = run_ranks(2, partial(run_all, vllm=True), configs)
    for found in ranks:
        assert [error for _, error in found] == [None] * len(configs)
    for at, how in ((1, "through 2 pipeline stages"), (3, "by 2 context-parallel ranks")):
        way_out = "rl.rollout.engine refit draws on all ranks, with a whole copy of the policy on each"
        assert [line for line in ranks[0][at][0] if f"drawn {how}" in line and line.endswith(way_out)]
    wanted = numbers(one_process["ppo"].run_dir)
    assert wanted[0]["reward/mean"] > 0
    assert wanted[-1]["policy/engine-difference"] < 1e-5
    for name in layouts:
        close(numbers(tmp_path / name), wanted)
    close(numbers(tmp_path / "groups dp2"), numbers(one_process["groups"].run_dir))
    close(numbers(one_process["unpacked"].run_dir), wanted)
    close(numbers(tmp_path / "tp2sp refit"), wanted)
    close(numbers(tmp_path / "vpp2 refit"), numbers(one_process["four layers"].run_dir))
    close(numbers(tmp_path / "groups cp2 refit"), numbers(one_process["groups"].run_dir))
    assert numbers(tmp_path / "groups cp2 refit")[-1]["rollout/equal-groups"] > 0  # it draws again
    drawn = numbers(tmp_path / "vllm")  # other draws, of the same weights
    assert all(0 < record["policy/engine-difference"] < 1e-5 for record in drawn)
    assert all([line for line in ranks[0][at][0] if "not yet run on a GPU" in line] for at in (-2, -1))
    first, second = numbers(tmp_path / "vllm apart")
    assert 0 < first["policy/engine-difference"] < 1e-5 < second["policy/engine-difference"]  # an update lies between
    # One rank draws while the other learns, what the same rank does in turns.
    assert numbers(tmp_path / "apart") == numbers(one_process["stale"].run_dir)
    runs = (tmp_path / "apart", Path(one_process["stale"].run_dir))
    apart, in_turns = (CheckpointReader(run / "checkpoints" / "step_00000004").state["rl"] for run in runs)
    assert apart == in_turns
    close(numbers(other)[-2:], numbers(one_process["stale"].run_dir)[-2:])  # from step 2, saved on one process


def test_ranks_apart_of_two_copies_that_learn_or_of_tensor_parallel_worlds(one_process, folder, tmp_path):
    """Two copies learn and one draws; and tensor parallel on both sides, where a whole copy draws on each rank."""
    wanted = numbers(one_process["stale"].run_dir)[:3]
    for ranks, drawing, layout in ((3, {"apart": 1}, {}), (4, {"apart": 2, "engine": "refit"}, {"tp": 2, "sp": True})):
        rl = STALE | {"rollout": {"samples": 1} | drawing}
        config = rl_config(tmp_path / str(ranks), folder, rl, parallel=layout, train__steps=3)
        for found in run_ranks(ranks, run_all, [config]):
            assert [error for _, error in found] == [None]
        close(numbers(config.run_dir), wanted)


@pytest.mark.parametrize(
    ("phase", "engine"), [("generate", "own"), ("generate", "refit"), ("score", "own"), ("update", "own")]
)
def test_a_kill_in_any_phase_loses_nothing(phase, engine, one_process, folder, tmp_path):
    """Killed in the third iteration; the same command goes on bit for bit, with rollouts that wait and a coefficient.

    On one process a copy of the policy draws what the policy draws.
    """
    wanted = one_process["stale"]
    run = shutil.copytree(wanted.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("*3", "*4"))
    stale = STALE | {"rollout": {"samples": 1, "engine": engine}}
    config = rl_config(run, folder, stale, train__steps=4, checkpoint={"interval": 1, "keep": 9})
    with pytest.raises(AssertionError, match="died"):
        run_ranks(1, run_all, [config], phase)
    ((*found,),) = run_ranks(1, run_all, [config])
    ((said, error),) = found
    assert error is None
    assert [line for line in said if line.startswith("resuming from step 2")]
    assert numbers(run)[-2:] == numbers(wanted.run_dir)[-2:]
    readers = [CheckpointReader(Path(path) / "checkpoints" / "step_00000004") for path in (run, wanted.run_dir)]
    assert readers[0].state["rl"] == readers[1].state["rl"]
    assert readers[0].state["rl"]["coefficient"] != 0.05
    assert readers[0].state["prompts"] == readers[1].state["prompts"]
    for prefix in ("", "critic/", "reference/"):
        keys = readers[0].keys(prefix)
        assert keys
        for key in keys:
            for kind in ("param", *(("exp_avg", "exp_avg_sq") if prefix != "reference/" else ())):
                assert readers[0].full(key, kind).equal(readers[1].full(key, kind)), (key, kind)


def rewards(run_dir):
    return [record for record in read_metrics(Path(run_dir)) if "iteration-time" in record]


def rise(run_dir, rollouts):
    """Of the mean reward from the first five iterations to the last five, and its standard error."""
    records = rewards(run_dir)
    first, last = records[:5], records[-5:]
    mean = sum(r["reward/mean"] for r in last) / 5 - sum(r["reward/mean"] for r in first) / 5
    error = math.sqrt(sum(r["reward/deviation"] ** 2 / rollouts for r in first + last)) / 5
    return mean, error


def test_the_reward_rises_and_with_shuffled_rewards_it_does_not(folder, tmp_path):
    changes = {"train__steps": 16, "train__seq_length": 128, "optimizer": {"lr": 8e-3, "schedule": "constant"}}
    shuffled = {"kind": "function", "function": "tests.rl.runs:shuffled"}
    configs = {
        "ppo": rl_config(tmp_path / "ppo", folder, {"algorithm": "ppo", "rollout": {"samples": 1}}, **changes),
        "grpo": rl_config(tmp_path / "grpo", folder, {"algorithm": "grpo"}, **changes),
        "shuffled": rl_config(tmp_path / "shuffled", folder, {"algorithm": "grpo", "reward": shuffled}, **changes),
    }
    ((*found,),) = run_ranks(1, run_all, list(configs.values()))
    assert [error for _, error in found] == [None] * 3
    for name, config in configs.items():
        mean, error = rise(config.run_dir, 32)
        if name == "shuffled":
            assert abs(mean) < 4 * error, (name, mean, error)
        else:
            assert mean > 4 * error, (name, mean, error)


def run_and_reject(configs, rejected):
    found = run_all(configs)
    for config in rejected:
        found += run_all([config], reward=RejectsTwice())
    return found


def test_what_cannot_be_learned_from_is_refused_or_said(folder, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "plain words " * 20}) + "\n")
    reward = {"kind": "function", "function": "tests.rl.runs:{}"}
    wrong = {
        "long": {"data__prompts": [str(long)]},
        "tokenizer": {"model__vocab_size": 200},
        "nan": {"rl__reward": {**reward, "function": "tests.rl.runs:not_numbers"}},
        "equal": {"rl__reward": {**reward, "function": "tests.rl.runs:always_one"}},
        "vllm": {"rl__rollout": {"engine": "vllm"}},
    }
    configs = []
    for name, changes in wrong.items():
        given = {key.removeprefix("rl__"): changes.pop(key) for key in list(changes) if key.startswith("rl__")}
        configs.append(rl_config(tmp_path / name, folder, given, **changes))
    stale = PPO | {"staleness": 1}  # the second and the third iteration's are learned from one later
    rejected = [rl_config(tmp_path / name, folder, rl, train__steps=4) for name, rl in (("left", {}), ("stale", stale))]
    ((*found,),) = run_ranks(1, run_and_reject, configs, rejected)
    by_name = dict(zip([*wrong, "left", "stale"], found, strict=True))
    assert f"{long}:1: the prompt has" in by_name["long"][1]
    assert "it is another model's tokenizer" in by_name["tokenizer"][1]
    assert "a score is nan, for sample" in by_name["nan"][1]
    said, error = by_name["vllm"]
    assert error.startswith("PlatformError: rl.rollout.engine vllm needs vLLM")
    assert "pip install 'flagscale_like[vllm]'" in error
    assert said == []  # nothing was built
    said, error = by_name["equal"]
    assert error is None
    assert (
        len([line for line in said if "nothing to learn from the rollouts: all of their scores are equal" in line]) == 3
    )
    for name in ("left", "stale"):
        said, error = by_name[name]
        assert error is None
        assert [line.split(" |")[0] for line in said if "the rollouts: none is left; no update was made" in line] == [
            "step 2",
            "step 3",
        ]
        assert [line for line in said if line.startswith("step 2/4 | no update | lr ")]
        learned = {"policy loss", "policy loss/mean", "grad-norm", "reward/mean", "policy/entropy", "kl/reference"}
        records = rewards(tmp_path / name)
        assert [learned & record.keys() for record in records] == [learned, set(), set(), learned]
        assert [record["skipped-steps"] for record in records] == [0, 1, 2, 2]
        assert "null" not in (tmp_path / name / "metrics.jsonl").read_text()
    assert [record["rollout/rejected"] for record in rewards(tmp_path / "left")] == [0, 32, 32, 0]


def test_the_reference_by_swapped_weights_or_adapters_off_and_models_of_another_role(one_process, folder, tmp_path):
    start = one_process["start"].run_dir
    load = {"checkpoint": {"interval": 0, "load": start}} | TWO
    swapped = PPO | {"kl": {"coefficient": 0.05, "memory": "host"}}
    value = {"algorithm": "ppo", "rollout": {"samples": 1}, "critic": {"lr": 3e-3, "load": start}}
    example = load_config(
        "examples/rl/tiny.yaml", [f"run_dir={tmp_path / 'example'}", "train.steps=2", "optimizer.warmup_steps=0"]
    )
    group = {"algorithm": "grpo", "kl": {"coefficient": 0.0}}
    configs = [
        rl_config(tmp_path / "swapped", folder, swapped, **load),
        rl_config(tmp_path / "lora", folder, {"algorithm": "grpo"}, lora={"rank": 4}, **load),
        rl_config(tmp_path / "critic", folder, value, **load),
        example,
        rl_config(tmp_path / "group", folder, group, train__steps=1, checkpoint={"interval": 1}),
        rl_config(tmp_path / "group", folder, PPO),
    ]
    ((*found,),) = run_ranks(1, run_all, configs)
    *errors, last = [error for _, error in found]
    assert errors == [None] * 5
    assert numbers(tmp_path / "swapped") == numbers(one_process["ppo"].run_dir)
    first, second = numbers(tmp_path / "lora")
    assert abs(first["kl/reference"]) < 1e-6 < abs(second["kl/reference"])
    assert [line for line in found[2][0] if line == f"the critic's weights are from {start}/checkpoints/step_00000001"]
    assert f"{tmp_path / 'group'}/checkpoints/step_00000001: holds no critic, and rl.algorithm ppo trains one" in last
    assert numbers(tmp_path / "example")[-1]["reward/mean"] > 0
    plain = tiny_config(tmp_path / "group", model__num_layers=2, model__vocab_size=260)
    ((_, error),) = run_ranks(1, faults.train_and_listen, plain)
    assert "is of a run of task rl, and the configuration says train" in error


@pytest.mark.parametrize(
    ("rl", "says"),
    [
        ({"rollout": {"temperature": 0}}, "temperature 0 draws the same rollout every time"),
        ({"rollout": {"samples": 1}}, "algorithm grpo compares the rollouts of a prompt, and rollout.samples is 1"),
        ({"algorithm": "ppo", "dynamic_sampling": True, "rollout": {"samples": 1}}, "dynamic_sampling compares"),
        ({"rollout": {"samples": 5}}, "it must be divisible by rl.rollout.samples (5)"),
        ({"rollout": {"max_new_tokens": 64}}, "leaves a prompt no room in train.seq_length (64)"),
        ({"kl": {"into": "loss"}}, "estimator k1 in the loss has a gradient whose mean is 0"),
        ({"kl": {"coefficient": 0, "target": 3}}, "target steers the coefficient, and coefficient 0 stays 0"),
        ({"rollout": {"engine": "vllm", "top_p": 0.9}}, "gives no log-probabilities without top_p (0.9) and top_k (0)"),
        ({"rollout": {"engine": "vllm", "rows": 8}}, "rows (8) is for the engines own and refit"),
        ({"rollout": {"engine": "refit", "vllm": {"memory": 0.5}}}, "vllm is for engine vllm, and engine is refit"),
        ({"rollout": {"apart": 1}, "staleness": 1, "reward": {"kind": "model"}, "rounds": ROUNDS}, "rl.rounds, whose"),
        ({"overlong": {"buffer": 11}}, "overlong.buffer (11) exceeds rollout.max_new_tokens (10)"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, tmp_path, rl, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        rl_config(tmp_path, folder, rl)
