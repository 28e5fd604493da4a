"""Best fit decreasing: items of different lengths, put into as few bins of one size as it finds."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, room: int) -> list[list[int]]:
    """Put items into as few bins as best fit finds, the longest first (Johnson et al. 1974).

    Each item goes to the bin that it fills best. Items of equal length go in the order in which they are given. The number
    of bins depends on the lengths alone.

    Args:
        lengths: [n], each from 1 to `room`.
        room: of a bin.

    Returns:
        The numbers of the items in each bin.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    sizes = np.asarray(lengths).tolist()
    bins: list[list[int]] = []
    rooms: list[int] = []  # what is left in open bins, each number once, in order
    open_bins: dict[int, list[int]] = {}
    for item in order:
        size = sizes[item]
        at = bisect_left(rooms, size)
        if at == len(rooms):
            bins.append([])
            left, number = room, len(bins) - 1
        else:
            left = rooms[at]
            number = open_bins[left].pop()
            if not open_bins[left]:
                del open_bins[left]
                rooms.pop(at)
        bins[number].append(item)
        left -= size
        if left:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append(number)
    return bins
