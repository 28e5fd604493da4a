"""Time of the steps alone: evaluations, saves and everything else between two steps is no step time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the seconds of steps.

    The host waits for the device once in a step, for its facts; on a GPU the update that follows is queued, and its time
    falls into the next step.
    """

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count what happens inside as one step."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.steps += 1

    def pop(self) -> tuple[float, int]:
        """(seconds, steps) since the last call."""
        taken = self.seconds, self.steps
        self.seconds, self.steps = 0.0, 0
        return taken
