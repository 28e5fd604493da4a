"""Rewards: what scores rollouts, made from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flagscale_like.config import (
    CommandReward,
    FunctionReward,
    JudgeReward,
    Mixture,
    ModelReward,
    Reward,
)
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.rl.answers import RewardSource
from flagscale_like.rl.rewards.chat_engine import ChatEngine
from flagscale_like.rl.rewards.chat_server import ChatServer
from flagscale_like.rl.rewards.checked import AskedByMain
from flagscale_like.rl.rewards.command import Command
from flagscale_like.rl.rewards.function import Function
from flagscale_like.rl.rewards.judge import AskedOnce, Asker, Judge, JudgedAnswers, build_judge
from flagscale_like.rl.rewards.mixture import WeightedSum
from flagscale_like.rl.rewards.model import build_reward_model
from flagscale_like.runtime.parallel import ParallelContext

# A judge's options -> a generation engine with the weights at its path, and its tokenizer's folder.
OpenEngine = Callable[[JudgeReward], tuple[OwnEngine, Path]]


@dataclass(frozen=True)
class Surroundings:
    """What rewards are built in.

    Attributes:
        seq_length: places of a reward model's rows, at least those of the longest prompt with its answer.
        tokenizer: the policy's tokenizer folder; None where it has none.
        open_engine: opens a judge's model.
        say: tells the user a line, on rank 0.
    """

    ctx: ParallelContext
    seq_length: int
    tokenizer: Path | None
    open_engine: OpenEngine
    say: Callable[[str], None] = print


def build_reward(options: Reward, around: Surroundings) -> RewardSource:
    """What scores rollouts. All ranks call it.

    Raises:
        ConfigError, CheckpointError, DataError: a source cannot be used; see the classes.
    """
    if isinstance(options, Mixture):
        return WeightedSum({one.name: (one.weight, build_reward(one, around)) for one in options.sources})
    ctx = around.ctx
    if isinstance(options, ModelReward):
        return build_reward_model(
            options, ctx, seq_length=around.seq_length, tokenizer=around.tokenizer, say=around.say
        )
    if isinstance(options, JudgeReward):
        return JudgedAnswers(open_judge(options, around), opponents=options.opponents)
    if isinstance(options, CommandReward):
        return AskedByMain(Command(options.command, timeout_s=options.timeout_s), ctx)
    assert isinstance(options, FunctionReward)
    return AskedByMain(Function(options.function), ctx)


def open_judge(options: JudgeReward, around: Surroundings) -> Judge:
    """The judge of a server or of a model of our own, compared with its labelled set. All ranks call it."""
    ctx = around.ctx
    asker: Asker
    if options.url is not None:
        asker = AskedOnce(ChatServer(options), ctx)
    else:
        engine, tokenizer = around.open_engine(options)
        asker = ChatEngine(engine, tokenizer, ctx, max_new_tokens=options.max_new_tokens)
    return build_judge(options, asker, around.say)
