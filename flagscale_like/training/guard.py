"""Decides what becomes of a step that looks wrong: go on, skip it, go back, or stop; with caps.

Monitors plug in as judges. A judge sees what the ranks have already reduced, so that all come to the same verdict without
another word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale_like.config import Monitors
from flagscale_like.training.step import Verdict


@dataclass(frozen=True)
class Event:
    """Something that a monitor found.

    Attributes:
        kind: which monitor, and on which part of the model where it has one: `loss`, `effective_rank/weights/...`.
        value, limit: what was measured, and what it crossed.
        action: what it asks for: log, skip, rewind or stop.
        message: for people.
    """

    kind: str
    value: float
    limit: float | None
    action: str
    message: str


# (loss, gradient norm) of the step at hand -> what is wrong with it; nothing, most of the time.
Judge = Callable[[float, float], Sequence[Event]]
MOST_OVERFLOWS = 100  # in a row: the scaler comes from 2**32 to 1 in fewer
SEVERITY = ("log", "skip", "rewind", "stop")
VERDICT = {"log": Verdict.UPDATE, "skip": Verdict.SKIP, "rewind": Verdict.REWIND, "stop": Verdict.STOP}


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
        self.reason, self.skips, self.overflows = "", 0, 0
        self._events: list[Event] = []

    def __call__(self, loss: float, grad_norm: float, overflow: bool) -> Verdict:
        """The verdict on a step; see `training.step.Decide`."""
        self.overflows = self.overflows + 1 if overflow else 0
        if overflow and math.isfinite(loss):
            if self.overflows <= MOST_OVERFLOWS:
                self.reason = (
                    "the fp16 loss scale was too large"  # the scaler lowers it: no sign of trouble, and not counted
                )
                return Verdict.SKIP
            grad_norm = math.nan  # no scale is small enough
        found = [event for judge in self.judges for event in judge(loss, grad_norm)]
        self._events += found
        gravest = max(found, key=lambda event: SEVERITY.index(event.action), default=None)
        action, self.reason = (gravest.action, gravest.message) if gravest else ("log", "")
        if action == "log":
            self.skips = 0
        if action == "skip":
            self.skips += 1
            most = self.options.max_consecutive_skips
            if self.skips > most:
                action = self.options.on_max_skips
                self._escalate("max_consecutive_skips", self.skips, most, action, f"{self.skips} steps in a row")
        if action == "rewind":
            self.skips = 0
            self.rewinds += 1
            most = self.options.max_rewinds
            if self.rewinds > most:
                action = "stop"
                self._escalate("max_rewinds", self.rewinds, most, action, f"the run went back {most} times before")
        return VERDICT[action]

    def take_events(self) -> list[Event]:
        """What was found since the last call."""
        taken, self._events = self._events, []
        return taken

    def state(self) -> dict[str, Any]:
        """What the next verdict depends on, JSON-able."""
        return {"skips": self.skips, "overflows": self.overflows}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what state() returned."""
        self.skips, self.overflows = int(state["skips"]), int(state.get("overflows", 0))

    def _escalate(self, setting: str, value: float, limit: float, action: str, words: str) -> None:
        self.reason += f"; {words} (monitors.{setting})"
        self._events.append(Event(setting, value, limit, action, self.reason))

    def _not_finite(self, loss: float, grad_norm: float) -> list[Event]:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return []
        policy, value = self.options.non_finite, grad_norm if math.isfinite(loss) else loss
        return [Event("non_finite", value, None, policy, f"not finite; monitors.non_finite is {policy}")]
