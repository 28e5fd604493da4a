"""A rank's memory placed by the allocator's model: what is reserved, what breaks it, and a file for torch's visualiser."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale_like.rehearsal.allocator import Block, CachingAllocator, ExpandableSegments
from flagscale_like.rehearsal.components import ticks
from flagscale_like.rehearsal.memory import Allocation, Memory


@dataclass(frozen=True)
class Placed:
    """How a rank's allocations lie in the device's memory.

    Attributes:
        reserved: most bytes that were reserved from the device.
        needed: most bytes that were reserved in segments of which something was in use.
        allocated: most bytes that were in use, each rounded up to the allocator's sizes.
        broke: the allocation that the device had no memory for; None where all fit.
        in_use: bytes in use when it broke.
        expandable: `needed` with expandable segments.
        trace: the events for torch's visualiser.
    """

    reserved: int
    needed: int
    allocated: int
    broke: Allocation | None
    in_use: int
    expandable: int
    allocator: CachingAllocator
    trace: list[dict[str, Any]]

    @property
    def fragmentation(self) -> float:
        """The share of what is needed at most that was in use at no time."""
        return 1 - self.allocated / self.needed if self.needed else 0.0


def place(memory: Memory, *, limit: int | None = None) -> Placed:
    """Run the allocations and freeings of a memory through the allocator's model.

    Args:
        limit: bytes that the device has for them; the first that does not fit ends it. None: as many as they take.
    """
    allocator, trace, grows = CachingAllocator(limit), [], ExpandableSegments()
    held: dict[int, tuple[Block, tuple[int, int, int]]] = {}
    given_back = deque(memory.given_back)
    for tick, nbytes, found in ticks(memory):
        while given_back and given_back[0] <= tick:
            given_back.popleft()
            allocator.give_back()
        if nbytes < 0 or (nbytes == 0 and id(found) in held):
            if id(found) in held:
                block, placed = held.pop(id(found))
                grows.release(placed)
                trace += [_event(kind, block, tick, found) for kind in ("free_requested", "free_completed")]
                allocator.release(block)
            continue
        opened = allocator.opened
        block = allocator.allocate(found.nbytes, tag=found)
        if block is None:
            return _placed(allocator, found, trace, grows)
        if allocator.opened > opened:
            segment = block.segment
            trace.append(_event("segment_alloc", Block(segment, segment.address, segment.size), tick, found))
        held[id(found)] = block, grows.allocate(found.nbytes)
        trace.append(_event("alloc", block, tick, found))
    return _placed(allocator, None, trace, grows)


def _placed(
    allocator: CachingAllocator, broke: Allocation | None, trace: list[dict[str, Any]], grows: ExpandableSegments
) -> Placed:
    return Placed(
        reserved=allocator.peak_reserved,
        needed=allocator.peak_needed,
        allocated=allocator.peak_allocated,
        broke=broke,
        in_use=allocator.allocated,
        expandable=grows.peak_needed,
        allocator=allocator,
        trace=trace,
    )


def _event(action: str, block: Block, tick: int, found: Allocation) -> dict[str, Any]:
    size = block.size if action.startswith("segment") else found.nbytes
    return {
        "action": action,
        "addr": block.address,
        "size": size,
        "stream": 0,
        "time_us": tick,
        "frames": _frames(found),
    }


def _frames(found: Allocation) -> list[Mapping[str, Any]]:
    file, _, rest = found.where.rpartition(":")
    line, _, function = rest.partition(" ")
    here = {"filename": file or "?", "line": int(line) if line.isdecimal() else 0, "name": f"{function} ({found.op})"}
    return [here, {"filename": found.part, "line": 0, "name": found.component or "step"}]


def write_snapshot(placed: Placed, path: Path) -> None:
    """Write what torch.cuda.memory._dump_snapshot writes, for https://pytorch.org/memory_viz and torch.cuda._memory_viz."""
    segments = []
    for segment in placed.allocator.segments.values():
        blocks = [_block(block) for block in segment.blocks()]
        used = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
        segments.append(
            {
                "device": 0,
                "address": segment.address,
                "total_size": segment.size,
                "allocated_size": used,
                "active_size": used,
                "requested_size": sum(block["requested_size"] for block in blocks),
                "stream": 0,
                "segment_type": "small" if segment.small else "large",
                "segment_pool_id": (0, 0),
                "is_expandable": False,
                "frames": [],
                "blocks": blocks,
            }
        )
    found = {
        "segments": segments,
        "device_traces": [placed.trace],
        "allocator_settings": {},
        "external_annotations": [],
    }
    path.write_bytes(pickle.dumps(found))


def _block(block: Block) -> dict[str, Any]:
    return {
        "address": block.address,
        "size": block.size,
        "requested_size": 0 if block.free else block.requested,
        "state": "inactive" if block.free else "active_allocated",
        "frames": [] if block.free else _frames(block.tag),
    }
