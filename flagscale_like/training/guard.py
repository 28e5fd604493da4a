"""Decides what becomes of a step whose loss or gradient looks wrong: skip it, go back, or stop; with caps.

Monitors plug in as judges. A judge sees what the ranks have already reduced, so that all come to the same verdict without
another word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flagscale_like.config import Monitors
from flagscale_like.training.step import Verdict

# (loss, gradient norm) of the step at hand -> a verdict, and the reason for it in a few words.
Judge = Callable[[float, float], tuple[Verdict, str]]
SEVERITY = (Verdict.UPDATE, Verdict.SKIP, Verdict.REWIND, Verdict.STOP)


class Guard:
    """Asks every judge, takes the gravest verdict, and counts.

    Args:
        rewinds: how often the run has gone back so far.
        judges: beside the one for values that are not finite.

    Attributes:
        reason: why the last step was not made, with the setting that decided.
        skips: steps skipped in a row.
    """

    def __init__(self, options: Monitors, *, rewinds: int = 0, judges: Sequence[Judge] = ()) -> None:
        self.options, self.rewinds = options, rewinds
        self.judges = (self._not_finite, *judges)
        self.reason, self.skips = "", 0

    def __call__(self, loss: float, grad_norm: float, overflow: bool) -> Verdict:
        """The verdict on a step; see `training.step.Decide`."""
        if overflow and math.isfinite(loss):
            self.reason = (
                "the fp16 loss scale was too large"  # the scaler lowers it: no sign of trouble, and not counted
            )
            return Verdict.SKIP
        opinions = [judge(loss, grad_norm) for judge in self.judges]
        verdict, self.reason = max(opinions, key=lambda opinion: SEVERITY.index(opinion[0]))
        if verdict is Verdict.UPDATE:
            self.skips = 0
        if verdict is Verdict.SKIP:
            self.skips += 1
            if self.skips > self.options.max_consecutive_skips:
                verdict = Verdict(self.options.on_max_skips)
                self.reason += f"; {self.skips} steps in a row (monitors.max_consecutive_skips)"
        if verdict is Verdict.REWIND:
            self.skips = 0
            self.rewinds += 1
            if self.rewinds > self.options.max_rewinds:
                verdict = Verdict.STOP
                self.reason += f"; the run went back {self.options.max_rewinds} times before (monitors.max_rewinds)"
        return verdict

    def _not_finite(self, loss: float, grad_norm: float) -> tuple[Verdict, str]:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return Verdict.UPDATE, ""
        policy = self.options.non_finite
        return Verdict(policy), f"not finite; monitors.non_finite is {policy}"
