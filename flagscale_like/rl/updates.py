"""Optimizer steps of an iteration: the critic's, and several steps put together into one for the log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flagscale_like.config import RunConfig
from flagscale_like.data.batch import Batch
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import DivergedError
from flagscale_like.objectives.policy import DRAWN, KL_REFERENCE, SUMS
from flagscale_like.objectives.value import ValueLoss
from flagscale_like.runtime.reduction import NamedSum
from flagscale_like.training.loop import Learned
from flagscale_like.training.parts import Facts, Verdict

GRAVITY = (Verdict.UPDATE, Verdict.SKIP, Verdict.REWIND, Verdict.STOP)


class CriticUpdates:
    """Optimizer steps of the critic, one at a call. All ranks call it alike."""

    def __init__(self, engine: Engine, config: RunConfig) -> None:
        self.engine, self.config, self._add_up = engine, config, NamedSum(engine.ctx)
        self._sums: dict[str, float] = {}

    def __call__(self, batches: Iterator[Batch], count: int, objective: ValueLoss) -> None:
        """Learn from `count` micro-batches.

        Raises:
            DivergedError: the loss or its gradient is not finite, and it is no overflow of fp16.
        """
        outputs = self.engine.forward_backward(batches, objective, count)
        sums = self._add_up({"grad-square": outputs.grad_square, **outputs.sums})
        norm, loss = math.sqrt(sums["grad-square"]), sums["total"]
        if outputs.overflow:
            return
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise DivergedError(
                f"the critic's loss is {loss / max(1, sums['count'])} and its gradient norm {norm}: lower rl.critic.lr"
            )
        self.engine.update(clip=self.config.optimizer.clip_grad, grad_norm=norm)
        numbers = {**{name: value for name, value in sums.items() if name != "grad-square"}, "norm": norm, "steps": 1.0}
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in numbers.items()}

    def pop(self) -> dict[str, float]:
        """What the steps since the last call reported."""
        sums, self._sums = self._sums, {}
        if not sums.get("count"):
            return {}
        found = {"value/loss": sums["total"] / sums["count"], "value/grad-norm": sums["norm"] / sums["steps"]}
        return found | {"value/clip-share": sums["value/clip-share"] / sums["count"]}


@dataclass(frozen=True)
class Whole:
    """The policy's steps of an iteration as one.

    Attributes:
        numbers: what they report, by name.
    """

    learned: Learned
    numbers: dict[str, float]


def together(steps: Sequence[Learned]) -> Whole:
    """Put the policy's optimizer steps of an iteration together.

    Loss and gradient norm are means over the steps whose loss is finite; the verdict is the gravest. What parts contribute is
    of the last step. The engine's difference is the first step's: no update lies between drawing and it.
    """
    facts, last = [step.facts for step in steps], steps[-1]
    finite = [one for one in facts if math.isfinite(one.loss)]
    loss = sum(one.loss for one in finite) / len(finite) if finite else math.nan
    norm = sum(one.grad_norm for one in finite) / len(finite) if finite else last.facts.grad_norm
    verdict = max((step.verdict for step in steps), key=GRAVITY.index)
    whole = Facts(loss, norm, sum(one.count for one in facts), last.facts.overflow, last.facts.sums)
    numbers = {}
    for name in (*SUMS, KL_REFERENCE):
        chosen = facts[:1] if name == "policy/engine-difference" else facts
        drawn = sum(one.sums[DRAWN] for one in chosen)
        if name in last.facts.sums and drawn:
            numbers[name] = sum(one.sums[name] for one in chosen) / drawn
    return Whole(Learned(last.outputs, whole, verdict), numbers)
