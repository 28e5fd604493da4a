"""A model of torch's CUDA caching allocator: what a device has reserved for what is allocated.

Sizes, pools and splitting are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.13) with its default settings:

    sizes        a multiple of 512 bytes
    up to 1 MiB  from the small pool, whose segments have 2 MiB
    up to 10 MiB from segments of 20 MiB
    larger       from a segment of its own size, in 2 MiB
    a block      is the smallest free one that is large enough; what is left of it stays free, if it has at least 512 bytes in
                 the small pool, or more than 1 MiB in the large one
    freed        it joins its free neighbours; its segment stays reserved

All is allocated on one stream. Where the device is full, whole free segments are given back first, as torch does.

ExpandableSegments is the same with PYTORCH_ALLOC_CONF=expandable_segments:True: each pool is one segment that grows by pages,
and where the device is full, pages of which nothing is in use are given back.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20
EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True"
ROUND, SMALL, SMALL_SEGMENT, LARGE_SEGMENT, OWN_SEGMENT, LARGE_ROUND = 512, MIB, 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment; its neighbours are in `before` and `after`."""

    segment: Segment
    address: int
    size: int
    free: bool = False
    requested: int = 0
    tag: Any = None
    before: Block | None = None
    after: Block | None = None


@dataclass(slots=True, eq=False)
class Segment:
    """What was reserved from the device at once."""

    address: int
    size: int
    small: bool
    first: Block = field(init=False)

    def blocks(self) -> list[Block]:
        found: list[Block] = []
        block: Block | None = self.first
        while block is not None:
            found.append(block)
            block = block.after
        return found


@dataclass(slots=True)
class _Pool:
    """Free blocks, the smallest first."""

    keys: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[tuple[int, int], Block] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        key = (block.size, block.address)
        bisect.insort(self.keys, key)
        self.blocks[key] = block

    def remove(self, block: Block) -> None:
        key = (block.size, block.address)
        del self.keys[bisect.bisect_left(self.keys, key)]
        del self.blocks[key]

    def take(self, size: int) -> Block | None:
        place = bisect.bisect_left(self.keys, (size, 0))
        if place == len(self.keys):
            return None
        block = self.blocks[self.keys[place]]
        self.remove(block)
        return block


class CachingAllocator:
    """Places allocations as torch does.

    Args:
        limit: bytes that can be reserved; None has no limit.

    Attributes:
        reserved, allocated: bytes; `peak_reserved` and `peak_allocated` are the most that they were.
        peak_needed: the most bytes that were reserved in segments of which something was in use; others can be given back.
        segments: that are reserved, by address.
        opened: how many were reserved so far.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = self.peak_needed = 0
        self._idle = 0  # bytes of segments of which nothing is in use
        self.segments: dict[int, Segment] = {}
        self.opened = 0
        self._small, self._large = _Pool(), _Pool()
        self._next = 0x7F0000000000

    def allocate(self, nbytes: int, tag: object = None) -> Block | None:
        """A block for `nbytes`; None where the device is full."""
        size = max(ROUND, -(-nbytes // ROUND) * ROUND)
        pool = self._small if size <= SMALL else self._large
        block = pool.take(size) or self._reserve(size)
        if block is None:
            return None
        self._idle -= block.segment.size if block.free and block.size == block.segment.size else 0
        left = block.size - size
        if left >= ROUND if size <= SMALL else left > SMALL:
            rest = Block(block.segment, block.address + size, left, free=True, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            pool.add(rest)
        block.free, block.requested, block.tag = False, nbytes, tag
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_needed = max(self.peak_needed, self.reserved - self._idle)
        return block

    def release(self, block: Block) -> None:
        """Free a block; it joins its free neighbours."""
        self.allocated -= block.size
        pool = self._small if block.segment.small else self._large
        block.free, block.tag = True, None
        for other in (block.before, block.after):
            if other is None or not other.free:
                continue
            pool.remove(other)
            low, high = (other, block) if other is block.before else (block, other)
            low.size += high.size
            low.after = high.after
            if high.after is not None:
                high.after.before = low
            block = low
        block.free = True
        self._idle += block.segment.size if block.size == block.segment.size else 0
        pool.add(block)

    def give_back(self) -> int:
        """Give whole free segments back to the device, as torch.cuda.empty_cache does; returns their bytes."""
        found = [s for s in self.segments.values() if s.first.free and s.first.after is None]
        for segment in found:
            (self._small if segment.small else self._large).remove(segment.first)
            del self.segments[segment.address]
            self.reserved -= segment.size
            self._idle -= segment.size
        return sum(segment.size for segment in found)

    def _reserve(self, size: int) -> Block | None:
        small = size <= SMALL
        wanted = (
            SMALL_SEGMENT if small else LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // LARGE_ROUND) * LARGE_ROUND
        )
        if self.limit is not None and self.reserved + wanted > self.limit:
            self.give_back()
            if self.reserved + wanted > self.limit:
                return None
        segment = Segment(self._next, wanted, small)
        self._next += wanted + LARGE_ROUND
        segment.first = Block(segment, segment.address, wanted)
        self.segments[segment.address] = segment
        self.opened += 1
        self.reserved += wanted
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return segment.first


class ExpandableSegments:
    """How many bytes allocations need where segments grow.

    Attributes:
        needed: bytes of pages of which something is in use; `peak_needed` is the most that they were.
    """

    def __init__(self) -> None:
        self.peak_needed = 0
        self._pools = _Pages(SMALL_SEGMENT), _Pages(LARGE_SEGMENT)

    @property
    def needed(self) -> int:
        return sum(pool.page * len(pool.used) for pool in self._pools)

    def allocate(self, nbytes: int) -> tuple[int, int, int]:
        """Place `nbytes`; returns what release() takes."""
        size = max(ROUND, -(-nbytes // ROUND) * ROUND)
        pool = int(size > SMALL)
        found = pool, self._pools[pool].place(size), size
        self.peak_needed = max(self.peak_needed, self.needed)
        return found

    def release(self, placed: tuple[int, int, int]) -> None:
        pool, address, size = placed
        self._pools[pool].free(address, size)


class _Pages:
    """One segment that grows: its holes, and how many blocks are in use on each page."""

    def __init__(self, page: int) -> None:
        self.page, self.top = page, 0
        self.used: Counter[int] = Counter()
        self._sizes: list[tuple[int, int]] = []  # (size, address) of the holes, the smallest first
        self._ends: dict[int, int] = {}  # where a hole ends -> its address
        self._holes: dict[int, int] = {}  # address of a hole -> its size

    def place(self, size: int) -> int:
        """The address of the smallest hole that is large enough; the segment grows behind its last hole where none is."""
        at = bisect.bisect_left(self._sizes, (size, 0))
        if at < len(self._sizes):
            address = self._sizes[at][1]
            room = self._take(address)
        else:
            address = self._ends.get(self.top, self.top)
            room = self._take(address) if address < self.top else 0
            grown = -(-(size - room) // self.page) * self.page
            self.top, room = self.top + grown, room + grown
        if room > size:
            self._add(address + size, room - size)
        self.used.update(range(address // self.page, (address + size - 1) // self.page + 1))
        return address

    def free(self, address: int, size: int) -> None:
        """Make a hole, which joins its neighbours."""
        for page in range(address // self.page, (address + size - 1) // self.page + 1):
            self.used[page] -= 1
            if not self.used[page]:
                del self.used[page]
        if address + size in self._holes:
            size += self._take(address + size)
        if address in self._ends:
            before = self._ends[address]
            size, address = size + self._take(before), before
        self._add(address, size)

    def _add(self, address: int, size: int) -> None:
        bisect.insort(self._sizes, (size, address))
        self._holes[address], self._ends[address + size] = size, address

    def _take(self, address: int) -> int:
        size = self._holes.pop(address)
        del self._ends[address + size]
        del self._sizes[bisect.bisect_left(self._sizes, (size, address))]
        return size
