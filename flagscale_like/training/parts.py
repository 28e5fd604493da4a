"""Parts: what a run does beside learning, one class each. The loop calls them in one order at the moments of a step.

    begin(report)             the run begins or goes on; the states are loaded
    before(plan)              the step begins
    contribute(outputs)       named numbers for the step's one reduction
    judge(facts)              what looks wrong, before the parameters change
    before_update()           the parameters are about to change
    after(step, report)       the step is done
    finish(report)            the run is at its last step, or was asked to stop
    close(error)              the run ends, in whatever way

A part with a `name` has state in the run's checkpoints. Monitors, data selection, saves, the profiler and the log line are
parts; a new one is a class and a line in the recipe.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from flagscale_like.errors import CheckpointError, UserError
from flagscale_like.json_files import BAD_VALUES
from flagscale_like.training.plan import StepPlan

if TYPE_CHECKING:  # so that what reads a run's files loads no torch
    from flagscale_like.engine.engine import Outputs
    from flagscale_like.runtime.reduction import Value


class Verdict(Enum):
    """What becomes of a step, once loss and gradient norm are known and before the parameters change."""

    UPDATE = "update"
    SKIP = "skip"
    REWIND = "rewind"
    STOP = "stop"


@dataclass(frozen=True)
class Facts:
    """What is known of a step before the parameters change, the same on every rank.

    Attributes:
        loss: mean over the global batch, in the objective's unit; nan where nothing counted.
        grad_norm: global L2 norm of the gradient, before clipping.
        count: tokens (or pairs, responses) that counted.
        overflow: whether the fp16 gradients overflowed.
        sums: the numbers that objective and parts contributed, added up over all ranks.
    """

    loss: float
    grad_norm: float
    count: int
    overflow: bool
    sums: Mapping[str, Any]

    def means(self, names: Iterable[str]) -> dict[str, float]:
        """Of the sums of these names, over the count; nan where nothing counted."""
        return {name: self.sums[name] / self.count if self.count else math.nan for name in names}


@dataclass(frozen=True)
class Event:
    """Something that a monitor found.

    Attributes:
        kind: which monitor, and on which part of the model where it has one: `loss`, `effective-rank/weights/...`.
        value, limit: what was measured, and what it crossed.
        action: what it asks for: log, skip, rewind or stop.
        message: for people.
    """

    kind: str
    value: float
    limit: float | None
    action: str
    message: str


@dataclass(frozen=True)
class Step:
    """A step that is done.

    Attributes:
        outputs: of this rank.
        consumed: samples that the run has read by now.
        skipped: steps so far whose update was not made.
        learning_rate: of the step's update.
    """

    plan: StepPlan
    outputs: Outputs
    facts: Facts
    verdict: Verdict
    consumed: int
    skipped: int
    learning_rate: float

    @property
    def updated(self) -> bool:
        return self.verdict is Verdict.UPDATE


class Report(Protocol):
    """Where parts say and write what is to be known of the run; only rank 0 writes."""

    def say(self, text: str) -> None: ...

    def numbers(self, step: int, values: Mapping[str, Any]) -> None: ...

    def event(self, step: int, consumed: int, event: Event) -> None: ...


class Part:
    """Does nothing; a part overrides what it takes part in. All ranks call every method alike.

    Attributes:
        name: key of its state in checkpoints; empty for a part without state.
        state_rewinds: whether the state goes back with the weights when the run goes back to an earlier checkpoint, or on
            with the data.
    """

    name: ClassVar[str] = ""
    state_rewinds: ClassVar[bool] = False

    def begin(self, report: Report) -> None:
        """The run begins, or goes on from a checkpoint whose states are loaded."""

    def before(self, plan: StepPlan) -> None:
        """A step begins."""

    def contribute(self, outputs: Outputs) -> Mapping[str, Value]:
        """This rank's numbers for the step's reduction, under names that are the same on every rank and at every step."""
        return {}

    def judge(self, facts: Facts) -> Sequence[Event]:
        """What is wrong with a step whose gradients are ready and whose update is not made. Usually nothing."""
        return ()

    def before_update(self) -> None:
        """The parameters are about to change."""

    def after(self, step: Step, report: Report) -> None:
        """A step is done."""

    def after_rewind(self) -> None:
        """The run went back to an earlier checkpoint, and leaves samples out."""

    def finish(self, report: Report) -> None:
        """The run is at its last step, or was asked to stop."""

    def close(self, error: BaseException | None) -> None:
        """The run ends, because of `error` where it did not end by itself."""

    def state(self) -> dict[str, Any]:
        """What the next steps depend on, JSON-able and the same on every rank; a copy, written while training goes on."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what state() returned."""


class Parts:
    """The parts of a run, in the order in which they are called; closed in reverse order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        names = [part.name for part in self.parts if part.name]
        assert len(names) == len(set(names)), f"two parts share a name: {names}"

    def begin(self, report: Report) -> None:
        for part in self.parts:
            part.begin(report)

    def before(self, plan: StepPlan) -> None:
        for part in self.parts:
            part.before(plan)

    def contributions(self, outputs: Outputs) -> dict[str, Value]:
        """All parts' numbers; two parts that use one name are an error of ours."""
        values: dict[str, Value] = {}
        for part in self.parts:
            own = part.contribute(outputs)
            assert not own.keys() & values.keys(), f"two parts contribute {sorted(own.keys() & values.keys())}"
            values |= own
        return values

    def judge(self, facts: Facts) -> list[Event]:
        return [event for part in self.parts for event in part.judge(facts)]

    def before_update(self) -> None:
        for part in self.parts:
            part.before_update()

    def after(self, step: Step, report: Report) -> None:
        for part in self.parts:
            part.after(step, report)

    def after_rewind(self) -> None:
        for part in self.parts:
            part.after_rewind()

    def finish(self, report: Report) -> None:
        for part in self.parts:
            part.finish(report)

    def state(self) -> dict[str, Any]:
        """By name, of the parts that have one."""
        return {part.name: part.state() for part in self.parts if part.name}

    def load(self, states: Mapping[str, Any], *, back: bool = False) -> None:
        """Put back the states that are there; with `back`, only of the parts that go back with the weights.

        Raises:
            CheckpointError: a state is not what the part saves.
        """
        for part in self.parts:
            if part.name not in states or (back and not part.state_rewinds):
                continue
            try:
                part.load(states[part.name])
            except BAD_VALUES as error:
                if isinstance(error, UserError):
                    raise
                raise CheckpointError(
                    f"the checkpoint's state.json has no state of `{part.name}` that can be read "
                    f"({type(error).__name__}: {error}): go on from another checkpoint, or begin anew with checkpoint.load"
                ) from error

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        close_all([functools.partial(part.close, error) for part in reversed(self.parts)], error)


def close_all(closings: Iterable[Callable[[], object]], error: BaseException | None) -> None:
    """Call each, whatever the others raise.

    Args:
        error: what ended the run; None where it ended by itself. What a closing raises becomes a note of it.

    Raises:
        Exception: the first that a closing raised, where there is no `error`.
    """
    problems = []
    for close in closings:
        try:
            close()
        except Exception as problem:  # the others are closed all the same
            problems.append(problem)
    for problem in problems:
        if error is None:
            raise problem
        error.add_note(f"while the run was closed: {type(problem).__name__}: {problem}")
