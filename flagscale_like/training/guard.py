"""Decides what becomes of a step that looks wrong: make the update, skip it, go back, or stop; with caps.

The guard sees numbers that are reduced over all ranks, so that all ranks come to the same verdict without another message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flagscale_like.config import Monitors, RunConfig
from flagscale_like.training.parts import Event, Facts, Part, Report, Step, Verdict

# The fp16 loss scaler comes from 2**32 down to 1 in fewer overflows in a row.
MAX_OVERFLOWS = 100
SEVERITY = ("log", "skip", "rewind", "stop")
VERDICT = {"log": Verdict.UPDATE, "skip": Verdict.SKIP, "rewind": Verdict.REWIND, "stop": Verdict.STOP}

# The facts of a step -> what the run's parts find wrong with it.
Judge = Callable[[Facts], Sequence[Event]]


class Guard(Part):
    """Asks for the events of a step, takes the gravest of the actions they ask for, and counts.

    Args:
        rewinds: how often the run has gone back so far.
        suspects: what of the run's configuration may keep gradients from the parameters, in words.
        expects_gradient: a first step that counts and has no gradient is a fault.

    Attributes:
        reason: why the last step's update was not made, with the setting that decided.
        skips: steps skipped in a row.
    """

    name = "guard"

    def __init__(
        self, options: Monitors, *, rewinds: int = 0, suspects: str = "", expects_gradient: bool = True
    ) -> None:
        self.options, self.rewinds, self.suspects = options, rewinds, suspects
        self._checked = not expects_gradient  # whether a step of this start had a gradient
        self.reason, self.skips, self.overflows = "", 0, 0
        self._events: list[Event] = []

    def __call__(self, facts: Facts, judge: Judge) -> Verdict:
        """The verdict on a step. `judge` is asked at every step but those that an fp16 overflow spoils."""
        self.overflows = self.overflows + 1 if facts.overflow else 0
        if facts.overflow and math.isfinite(facts.loss):
            if self.overflows <= MAX_OVERFLOWS:
                # The scaler lowers the scale by itself: it is no sign of trouble, and not counted.
                self.reason = "the fp16 loss scale was too large"
                return Verdict.SKIP
            facts = replace(facts, grad_norm=math.nan)  # no scale is small enough
        found = [*self._not_finite(facts), *self._no_gradient(facts), *judge(facts)]
        self._events += found
        gravest = max(found, key=lambda event: SEVERITY.index(event.action), default=None)
        action, self.reason = (gravest.action, gravest.message) if gravest else ("log", "")
        return VERDICT[self._capped(action)]

    def _capped(self, action: str) -> str:
        """The action, or the graver one where it was taken too often."""
        if action == "log":
            self.skips = 0
        if action == "skip":
            self.skips += 1
            cap = self.options.max_consecutive_skips
            if self.skips > cap:
                action = self.options.on_max_skips
                self._escalate("max_consecutive_skips", self.skips, cap, action, f"{self.skips} steps in a row")
        if action == "rewind":
            self.skips = 0
            self.rewinds += 1
            cap = self.options.max_rewinds
            if self.rewinds > cap:
                action = "stop"
                self._escalate("max_rewinds", self.rewinds, cap, action, f"the run went back {cap} times before")
        return action

    def _escalate(self, setting: str, value: float, limit: float, action: str, words: str) -> None:
        self.reason += f"; {words} (monitors.{setting})"
        self._events.append(Event(setting, value, limit, action, self.reason))

    def _not_finite(self, facts: Facts) -> list[Event]:
        if math.isfinite(facts.loss) and math.isfinite(facts.grad_norm):
            return []
        policy, value = self.options.non_finite, facts.grad_norm if math.isfinite(facts.loss) else facts.loss
        why = "not finite" if facts.count else "nothing of the batch counts, as with a loss mask of zeros"
        return [Event("non_finite", value, None, policy, f"{why}; monitors.non_finite is {policy}")]

    def _no_gradient(self, facts: Facts) -> list[Event]:
        """A first step that counts and has no gradient at all: the run would train nothing, and would not say so."""
        if self._checked or not facts.count or not math.isfinite(facts.grad_norm):
            return []
        self._checked = True
        if facts.grad_norm != 0.0:
            return []
        why = (
            "the loss is exactly 0: what counts has weight 0"
            if facts.loss == 0.0
            else "no gradient reached a trained parameter" + self.suspects
        )
        return [Event("zero_gradient", 0.0, None, "stop", f"of {facts.count:,} counted, {why}")]

    def after(self, step: Step, report: Report) -> None:
        """Report the events of the step."""
        for event in self._events:
            report.event(step.plan.step, step.consumed, event)
        self._events = []

    def state(self) -> dict[str, Any]:
        return {"skips": self.skips, "overflows": self.overflows}

    def load(self, state: Mapping[str, Any]) -> None:
        self.skips, self.overflows = int(state["skips"]), int(state.get("overflows", 0))


def suspects(config: RunConfig) -> str:
    """What of a configuration may keep gradients from the parameters, for the message of a first step without any."""
    found = []
    if config.train.frozen:
        found.append(f"train.frozen ({', '.join(config.train.frozen)}) leaves nothing that the loss depends on")
    if config.lora is not None:
        found.append("the LoRA adapters take no part in the forward pass")
    if config.train.recompute == "full":
        found.append("train.recompute full passes no gradient through a layer whose input asks for none")
    return f"; possible causes: {'; '.join(found)}" if found else ""
