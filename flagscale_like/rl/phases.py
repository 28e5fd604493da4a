"""The phases of an iteration: how long each took, and how many tokens it worked on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("generate", "score", "update")


class Phases:
    """Adds up seconds and tokens of phases. A phase inside another is not counted twice: the outer one stands still."""

    def __init__(self) -> None:
        self._running: list[str] = []
        self._since = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.tokens = dict.fromkeys(PHASES, 0)

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as this phase's."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def pop(self) -> dict[str, float]:
        """Seconds and tokens a second of each phase since the last call."""
        found = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        found |= {
            f"tokens-per-second/{name}": self.tokens[name] / seconds if seconds else 0.0
            for name, seconds in self.seconds.items()
        }
        self.seconds, self.tokens = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0)
        return found
