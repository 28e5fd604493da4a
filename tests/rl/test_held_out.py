"""Evaluation of task rl: held-out prompts are answered every eval_interval iterations, and training is as without."""

import json
from pathlib import Path

import pytest

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.recipes.reinforce import open_generator
from flagscale_like.rl.prompts import Words, read_prompts
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.metrics import read_metrics
from flagscale_like.training.report import read_story, write_report
from tests.harness import run_ranks
from tests.rl.runs import NEW, make_folder, numbers, rl_config, run_all

MIXED = {
    "kind": "mixture",
    "sources": [
        {"kind": "function", "name": "small", "function": "tests.rl.runs:small_ids"},
        {"kind": "function", "name": "one", "weight": 0.5, "function": "tests.rl.runs:always_one"},
    ],
}
PPO = {"algorithm": "ppo", "minibatches": 2, "rollout": {"samples": 1}, "kl": {"coefficient": 0.05}}
STALE = {"reward": MIXED, "staleness": 1, "rollout": {"samples": 4, "apart": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("held"))
    lines = [{"prompt": f"blue {word}"} for word in ("red", "old", "new", "green", "gold")]
    (folder / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluated(config):
    return [record for record in read_metrics(Path(config.run_dir)) if "eval/reward" in record]


def answered(config):
    """The mean reward of the saved policy's likeliest answers, drawn without a run."""
    with parallel_context(config.parallel) as ctx:
        words = Words(config)
        rows = read_prompts(config, words, config.data.eval_prompts)
        engine, _ = open_generator(Path(config.run_dir), ctx, precision="fp32")
        drawn = engine.generate([Prompt(row.ids, n) for n, row in enumerate(rows)],
                                Sampling(NEW, temperature=0.0, stop=words.stop))  # fmt: skip
        found = [sum(token < 64 for token in one.ids) / len(one.ids) for one in drawn]
    return sum(found) / len(found)


def test_held_out_prompts_are_answered_and_training_is_as_without(folder, tmp_path):
    often = {"data__eval_prompts": [str(folder / "held.jsonl")], "train__eval_interval": 2}
    ends = {"checkpoint": {"interval": 3}}
    sampled = STALE | {"evaluation": {"samples": 4, "temperature": 1.0}}
    without = rl_config(tmp_path / "without", folder, PPO, **ends)
    ppo = rl_config(tmp_path / "ppo", folder, PPO, **ends, **often)
    assert [error for _, error in run_ranks(1, run_all, [without, ppo])[0]] == [None] * 2
    alone = rl_config(tmp_path / "alone", folder, STALE)
    configs = [
        rl_config(tmp_path / "dp2", folder, PPO, **often),
        rl_config(tmp_path / "apart", folder, sampled, **often),
        alone,
    ]
    said = run_ranks(2, run_all, configs)[0]
    assert [error for _, error in said] == [None] * 3
    # The last step is evaluated as every other one.
    assert [record["step"] for record in evaluated(ppo)] == [2, 3]
    assert numbers(ppo.run_dir) == numbers(without.run_dir)
    readers = [CheckpointReader(Path(run.run_dir) / "checkpoints" / "step_00000003") for run in (ppo, without)]
    for key in readers[0].keys(""):
        assert readers[0].full(key, "param").equal(readers[1].full(key, "param")), key
    assert evaluated(ppo)[-1]["eval/reward"] == pytest.approx(run_ranks(1, answered, ppo)[0], abs=1e-6)
    for own, other in zip(evaluated(configs[0]), evaluated(ppo), strict=True):
        assert own["eval/reward"] == pytest.approx(other["eval/reward"], abs=2e-3)
        assert own["eval/length"] == other["eval/length"]
    # Ranks that only draw go on drawing; samples and the sources of a mixture.
    assert numbers(configs[1].run_dir) == numbers(alone.run_dir)
    last = evaluated(configs[1])[-1]
    assert last["eval/reward/one"] == 1.0
    assert last["eval/reward"] == pytest.approx(last["eval/reward/small"] + 0.5)
    assert [line for line in said[1][0] if line.startswith("step 3 | 20 answers to held-out prompts | eval/reward ")]


def test_the_report_shows_them(folder, tmp_path):
    config = rl_config(
        tmp_path / "run", folder, data__eval_prompts=[str(folder / "held.jsonl")], train__eval_interval=1
    )
    assert run_ranks(1, run_all, [config])[0][0][1] is None
    story = read_story(Path(config.run_dir))
    assert story.validation == [(record["step"], record["eval/reward"]) for record in evaluated(config)]
    write_report(Path(config.run_dir), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "reward on held-out prompts" in page
    assert page.count('data-name="validation"') == 1


@pytest.mark.parametrize(
    ("rl", "changes", "says"),
    [
        ({}, {"train__eval_interval": 1}, "train.eval_interval without data.eval_prompts is not for task rl"),
        ({"evaluation": {"samples": 2}}, {}, "evaluation.temperature 0 gives the same answer 2 times"),
        (
            {"reward": {"kind": "judge", "url": "http://x"}},
            {"train__eval_interval": 1, "data__eval_prompts": ["x"]},
            "a judge compares the policy's answers with each other",
        ),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_refused(folder, tmp_path, rl, changes, says):
    with pytest.raises(ValueError, match=says):
        rl_config(tmp_path, folder, rl, **changes)
