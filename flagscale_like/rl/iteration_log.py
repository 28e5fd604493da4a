"""The log line of an iteration: reward, divergence, lengths, the models' losses, and the time of each phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale_like.config import ReinforcementLearning, RunConfig
from flagscale_like.config.rewards import Mixture
from flagscale_like.objectives.policy import KL_REFERENCE, SUMS, PolicyLoss
from flagscale_like.rl.guard import OUTSIDE
from flagscale_like.rl.phases import PHASES
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.clock import Clock
from flagscale_like.training.metrics import MEAN
from flagscale_like.training.parts import Step
from flagscale_like.training.step_log import StepLog

SHOWN = ("reward/mean", "kl/reference", "policy/clip-share", "policy/entropy", "rollout/length")


@dataclass(frozen=True)
class _Names:
    metric: str
    sums: tuple[str, ...]


def numbers_of(options: ReinforcementLearning) -> tuple[str, ...]:
    """The names of what an iteration reports beside its loss; those of the log line first."""
    names = ["reward/mean", "kl/reference", *SUMS, "rollout/length", "reward/deviation", "rollout/longest"]
    names += ["rollout/ended", "rollout/rejected", "rollout/equal-groups", "kl/coefficient"]
    if not options.kl.coefficient:
        names = [name for name in names if not name.startswith("kl/")]
    elif options.kl.into == "loss":
        names.append(KL_REFERENCE)
    if isinstance(options.reward, Mixture):
        names += [part_name(source.name) for source in options.reward.sources]
    if options.guard != "off":
        names += OUTSIDE
    if options.has_critic:
        names += ["value/loss", "value/explained", "value/grad-norm", "value/clip-share"]
    names += [f"time/{phase}_s" for phase in PHASES] + [f"tokens-per-second/{phase}" for phase in PHASES]
    first = [name for name in SHOWN if name in names]
    return tuple(first + [name for name in names if name not in first])


def part_name(source: str) -> str:
    """What the mean reward of a source of a mixture is reported as."""
    return f"reward/{source}"


class IterationLog(StepLog):
    """Logs an iteration as StepLog logs a step. Its numbers are those that the iteration notes, and means of them.

    An iteration that learned from nothing has neither loss nor gradient norm, and no part in the means of the others'.
    """

    def __init__(self, config: RunConfig, ctx: ParallelContext, clock: Clock) -> None:
        names = numbers_of(config.required_rl)
        self.shown = sum(name in SHOWN for name in names)
        self._noted: dict[str, float] = {}
        super().__init__(config, ctx, clock, None, _Names(PolicyLoss.metric, names))

    def note(self, numbers: Mapping[str, float]) -> None:
        """Take numbers of the iteration; those that the run does not report are refused."""
        unknown = numbers.keys() - set(self.names)
        assert not unknown, f"an iteration reports {sorted(unknown)}, which is not in its list"
        self._noted |= numbers

    def _means(self, step: Step) -> dict[str, float]:
        noted, self._noted = self._noted, {}
        return noted

    def _record(self, step: Step) -> dict[str, Any]:
        record = super()._record(step)
        if not step.facts.count:
            del record[self.metric], record["grad-norm"]
            if not self._steps:
                record.pop(self.metric + MEAN, None)
        return record

    def _loss_of(self, step: Step) -> list[str]:
        return super()._loss_of(step) if self._steps else ["no update"]

    def _speed(self, step: Step, seconds: float) -> dict[str, float]:
        lengths = self._sums["rollout/length"] / max(1, self._counts["rollout/length"])
        return {"tokens-per-second": lengths * step.plan.batch_size / seconds}

    def _work(self, record: Mapping[str, Any]) -> list[str]:
        shares = [record.get(f"time/{phase}_s", 0.0) for phase in PHASES]
        whole = math.fsum(shares) or 1.0
        return [f"{phase} {share / whole:.0%}" for phase, share in zip(PHASES, shares, strict=True)]
