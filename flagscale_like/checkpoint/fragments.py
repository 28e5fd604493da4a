"""Index arithmetic of checkpoints that load on any layout: flat ranges of shards, as boxes of the global tensor.

The distributed optimizer owns flat ranges of each local shard: `[start, stop)` of the row-major elements of a box of the
global tensor. A flat range of a box is at most 2 * ndim - 1 boxes itself (a partial first row, whole rows, a partial last
row, and so on inwards). Saved and wanted ranges thus become boxes in one coordinate system, and loading into any layout is
to copy what overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

Index = tuple[int, ...]


@dataclass(frozen=True)
class Fragment:
    """Elements `[start, stop)`, row-major, of the box at `offset` with `shape` of the global tensor `key`."""

    key: str
    global_shape: Index
    offset: Index
    shape: Index
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return self.stop - self.start

    def boxes(self) -> Iterator[Box]:
        """The fragment as boxes in global coordinates; `flat` counts from the fragment's first element."""
        for offset, shape, flat in _boxes(self.shape, self.start, self.stop):
            yield Box(tuple(a + b for a, b in zip(self.offset, offset, strict=True)), shape, flat - self.start)


@dataclass(frozen=True)
class Box:
    """A box of the global tensor whose elements lie at `[flat, flat + prod(shape))` of some flat storage."""

    offset: Index
    shape: Index
    flat: int

    def view(self, storage: Tensor) -> Tensor:
        """The box's elements of a flat storage, in its shape."""
        return storage[self.flat : self.flat + prod(self.shape)].view(self.shape)

    def slices(self, low: Index, high: Index) -> tuple[slice, ...]:
        """The part between two corners in global coordinates, as slices of `view`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, self.offset, strict=True))


def _boxes(shape: Index, start: int, stop: int) -> Iterator[tuple[Index, Index, int]]:
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,), start
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are [first, last)
    if first > last:  # inside one row
        first = last = start // row
        head, tail = (start, stop), None
    else:
        head = (start, first * row) if start < first * row else None
        tail = (last * row, stop) if last * row < stop else None
    for part, at in ((head, start // row), (tail, last)):
        if part is not None:
            for offset, inner, flat in _boxes(shape[1:], part[0] - at * row, part[1] - at * row):
                yield (at, *offset), (1, *inner), flat + at * row
    if first < last:
        yield (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]), first * row


def same_box(a: Fragment, b: Fragment) -> bool:
    """Whether both are ranges of the same box: the elements they share are then one range of it."""
    return (a.offset, a.shape) == (b.offset, b.shape)


def overlaps(a: Fragment, b: Fragment) -> Iterator[tuple[Box, Box, Index, Index]]:
    """Where two fragments of one tensor overlap: a box of each, and the first corner and the end of what both hold."""
    for one in a.boxes():
        for other in b.boxes():
            low = tuple(map(max, one.offset, other.offset))
            high = tuple(
                min(o + s, p + t) for o, s, p, t in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
            )
            if all(x < y for x, y in zip(low, high, strict=True)):
                yield one, other, low, high


def copy_overlap(source: Fragment, source_flat: Tensor, target: Fragment, target_flat: Tensor) -> int:
    """Copy the elements that both fragments hold; returns how many.

    Args:
        source_flat, target_flat: 1-D, the elements of each fragment. The copy converts the dtype.
    """
    copied = 0
    for a, b, low, high in overlaps(source, target):
        b.view(target_flat)[b.slices(low, high)].copy_(a.view(source_flat)[a.slices(low, high)])
        copied += prod(y - x for x, y in zip(low, high, strict=True))
    return copied


def elements_within(fragment: Fragment, shape: Index) -> int:
    """How many of the fragment's elements lie inside a global tensor of `shape`, such as one of a smaller vocabulary."""
    return sum(
        prod(max(0, min(o + s, limit) - o) for o, s, limit in zip(box.offset, box.shape, shape, strict=True))
        for box in fragment.boxes()
    )
