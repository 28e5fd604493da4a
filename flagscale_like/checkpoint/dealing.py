"""Which of the ranks that hold the same weights reads which part of them, so that each byte is read once.

The parameters lie one behind the other, and each reader gets a run of them of about the same length. It is a computation on
sizes alone: all ranks come to the same result, and the planner of checkpoints as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SMALLEST = 1 << 16  # elements of a reader's run: below, a message costs more than the reading
LARGEST = 1 << 25  # elements of a part: it is read into a buffer of the host, and sent as one message


@dataclass(frozen=True)
class Part:
    """Elements `[start, stop)` of the flat parameter number `number`, read by the replica `reader`."""

    number: int
    start: int
    stop: int
    reader: int


def deal(sizes: Sequence[tuple[int, int]], replicas: int) -> Iterator[Part]:
    """Deal parameters out to the replicas that hold them.

    Args:
        sizes: elements of each parameter, and its grain: it is cut at multiples of so many elements only.
        replicas: how many ranks hold the parameters.

    Yields:
        The parts in the order of the parameters; together they are all elements, once.
    """
    total = sum(numel for numel, _ in sizes)
    readers = max(1, min(replicas, total // SMALLEST))
    at = 0
    for number, (numel, grain) in enumerate(sizes):
        largest = max(grain, LARGEST // grain * grain)
        first, last = at * readers // total + 1, -(-(at + numel) * readers // total)
        runs = (total * reader // readers - at for reader in range(first, last))
        bounds = sorted({0, numel, *(min(numel, (run + grain // 2) // grain * grain) for run in runs)})
        for low, high in itertools.pairwise(bounds):
            for start in range(low, high, largest):
                stop = min(start + largest, high)
                yield Part(number, start, stop, min(readers - 1, (2 * at + start + stop) * readers // (2 * total)))
        at += numel
