"""Feed: the micro-batches of a rank, taken step by step, with the time that training waited for them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from flagscale_like.data.batch import Batch


class Feed:
    """Hands out micro-batches, and adds up how long its consumer waited for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self._wait_s = batches, 0.0

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self._batches)
        self._wait_s += time.perf_counter() - began
        return batch

    def take(self, count: int) -> Iterator[Batch]:
        """The next `count` micro-batches."""
        return itertools.islice(self, count)

    def pop_wait(self) -> float:
        """Seconds waited since the last call."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited
