"""Small runs of reinforcement learning: a tokenizer, prompts, rewards of tokens, and configurations."""

import json
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from flagscale_like.config import RunConfig
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.recipes.reinforce import draw, reinforce, reward_of
from flagscale_like.rl.answers import RewardSource, Score
from flagscale_like.rl.loop import RlRun
from flagscale_like.rl.scoring import Scorer
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.metrics import Reporter, read_metrics
from tests.generation import vllm_stand_in
from tests.harness import tiny_config

VOCAB, NEW = 257, 10


def small_ids(answers):
    """The share of an answer's tokens that are below 64, less the repetitions: what a tiny policy learns in seconds."""
    return [sum(token < 64 for token in answer.ids) / max(1, len(answer.ids)) for answer in answers]


def mostly_small(answers):
    """1 or 0, so that the scores of some groups are equal."""
    return [float(sum(token < 96 for token in answer.ids) > len(answer.ids) / 2) for answer in answers]


def shuffled(answers):
    """small_ids of another answer: nothing is to be learned from it."""
    scores = small_ids(answers)
    order = list(range(len(scores)))
    random.Random(str([list(answer.ids) for answer in answers])).shuffle(order)
    return [scores[number] for number in order]


def make_folder(folder: Path) -> Path:
    """tokenizer/ and prompts.jsonl."""
    train_bpe(["plain words for a plain tokenizer"], VOCAB, folder / "tokenizer")
    draw = random.Random(5)
    words = ["red", "green", "blue", "old", "new"]
    lines = [{"prompt": " ".join(draw.choices(words, k=draw.randint(1, 3))), "number": n} for n in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rl_config(run_dir: Path | str, folder: Path, rl: dict[str, Any] | None = None, **changes: Any):
    """A tiny run of task rl. `rl` overrides keys of the group, of `rollout` one by one."""
    rl = dict(rl or {})
    group = {
        "algorithm": "grpo",
        "reward": {"kind": "function", "function": "tests.rl.runs:small_ids"},
        "kl": {"coefficient": 0.02},
        "clip": {"value": 10.0},
        "critic": {"lr": 3e-3},
    }
    rollout = {"samples": 4, "max_new_tokens": NEW} | rl.pop("rollout", {})
    values = {
        "task": "rl",
        "rl": group | rl | {"rollout": rollout},
        "data": {"prompts": [str(folder / "prompts.jsonl")], "tokenizer": str(folder / "tokenizer")},
        "model__num_layers": 2,
        "model__vocab_size": VOCAB + 3,
        "train__global_batch_size": 32,
        "train__seq_length": 64,
        "train__steps": 3,
        "optimizer": {"lr": 3e-3, "schedule": "constant", "weight_decay": 0.0},
        "checkpoint__interval": 0,
    }
    return tiny_config(run_dir, **(values | changes))


class RejectsTwice:
    """Scores by rank in the call; all rollouts of the second and the third call are rejected."""

    calls = 0

    def scores(self, answers):
        self.calls += 1
        return [Score(float(number % 3), rejected=self.calls in (2, 3)) for number in range(len(answers))]


def run_all(
    configs: Sequence[RunConfig], phase: str = "", *, vllm: bool = False, reward: RewardSource | None = None
) -> list[tuple[list[str], str | None]]:
    """Run configurations one after another in this process; what each said, and the error that ended it.

    Args:
        phase: of the third iteration, in which the process kills itself; empty: it does not.
        vllm: whether the stand-in of vLLM is there.
        reward: in the place of what the configurations name.
    """
    found = []
    if vllm:
        vllm_stand_in.install()
    if phase:
        kill_in(phase)
    for config in configs:
        said: list[str] = []
        Reporter.say = lambda self, text, said=said: said.append(text)
        error = None
        try:
            with parallel_context(config.parallel, seed=config.train.seed, apart=config.ranks_apart) as ctx:
                Path(config.run_dir).mkdir(parents=True, exist_ok=True)
                if ctx.bridge is not None and ctx.bridge.is_apart:
                    draw(config, ctx)
                else:
                    reinforce(config, ctx, make_reward=reward_of if reward is None else lambda *_: reward)
        except ValueError as problem:
            error = f"{type(problem).__name__}: {problem}"
        found.append((said, error))
        if dist.is_initialized():  # after an error
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return found


def kill_in(phase: str) -> None:
    """SIGKILL to this process in the middle of a phase of the third iteration."""
    iteration = {"now": 0}
    drawn, generate, reference, learn = RlRun.draw, OwnEngine.generate, Scorer._score_new, RlRun._learn

    def counted(run: RlRun, *given) -> list:
        iteration["now"] = run.progress.step + 1
        return drawn(run, *given)

    def die(name: str, after: int = 0) -> None:
        calls = iteration.setdefault(name, 0)
        if name == phase and iteration["now"] == 3:
            iteration[name] = calls + 1
            if calls == after:
                os.kill(os.getpid(), signal.SIGKILL)

    def generating(engine: OwnEngine, *given):
        for rollout in generate(engine, *given):
            die("generate", after=5)
            yield rollout

    RlRun.draw, OwnEngine.generate = counted, generating
    Scorer._score_new = lambda scorer: (die("score"), reference(scorer))
    RlRun._learn = lambda *given: (die("update", after=1), learn(*given))[1]


def numbers(run_dir: Path | str) -> list[dict[str, float]]:
    """What every iteration reported, but for times, memory and speeds."""
    steps = [record for record in read_metrics(Path(run_dir)) if "iteration-time" in record]
    names = ("policy", "reward/", "kl/", "value/", "rollout/", "grad-norm", "learning-rate", "consumed")
    return [{name: value for name, value in record.items() if name.startswith(names)} for record in steps]


def close(found, wanted, rel=2e-3):
    """Equal but for rounding, over all iterations."""
    assert len(found) == len(wanted)
    for own, other in zip(found, wanted, strict=True):
        shares = {name for name in own if name.endswith("clip-share")}  # one token at the bound is a step of its own
        assert {name: own[name] for name in shares} == pytest.approx({name: other[name] for name in shares}, abs=0.01)
        rest = own.keys() - shares
        assert {name: own[name] for name in rest} == pytest.approx(
            {name: other[name] for name in rest}, rel=rel, abs=2e-4
        )


def not_numbers(answers):
    return [float("nan") if number == 3 else 1.0 for number in range(len(answers))]


def always_one(answers):
    return [1.0] * len(answers)
