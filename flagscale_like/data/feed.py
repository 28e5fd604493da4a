"""Feed: an iterator over the micro-batches of a rank that measures how long training waits for data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator

from flagscale_like.data.batch import Batch


class Feed:
    """Yields micro-batches and adds up the time that each `next` takes."""

    def __init__(self, batches: Generator[Batch, None, None]) -> None:
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

    def close(self) -> None:
        """End the generator of micro-batches, and with it the loader's processes."""
        self._batches.close()

    def pop_wait(self) -> float:
        """Return the seconds spent waiting for micro-batches since the last call, and reset the sum."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited
