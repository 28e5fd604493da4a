"""A trainer that sleeps while something else runs goes on as if it had not."""

import pytest

from flagscale_like.engine.asleep import TrainingMemory
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import build_engine, run_ranks, tiny_config, train_steps


def trained(precision, *, sleeps):
    """Losses and gradient norms of two times two steps, bytes that slept, texts that were drawn between."""
    config = tiny_config("unused", train__precision=precision, parallel__tp=1)
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        memory, own = TrainingMemory(engine, states=True), OwnEngine(engine, rows=2)
        found, freed = train_steps(engine, config, 2), 0
        if sleeps:
            freed = memory.sleep()
            assert memory.sleep() == 0
            with pytest.raises(RuntimeError, match="asleep"):
                next(engine.fragments())
            with pytest.raises(RuntimeError, match="asleep"):
                engine.forward_backward(iter(()), NextToken(), 0)
        (rollout,) = own.generate([Prompt([1, 2, 3], 0)], Sampling(6, seed=1))
        memory.wake()
        return found + train_steps(engine, config, 2), freed, rollout.ids, len(list(engine.fragments()))


def every_way():
    return [[trained(precision, sleeps=sleeps) for sleeps in (False, True)] for precision in ("fp32", "bf16")]


def test_steps_after_a_sleep_are_bit_by_bit_those_without():
    for rank in run_ranks(2, every_way):
        for plain, slept in rank:
            assert slept[0] == plain[0]
            assert slept[2:] == plain[2:]
            assert (plain[1], slept[1] > 0) == (0, True)
        fp32, bf16 = (freed for (_, (_, freed, *_)) in rank)
        assert bf16 > fp32  # the master weights, too
