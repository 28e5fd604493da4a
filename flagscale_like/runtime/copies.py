"""Copies between device and host beside the compute: one side stream a direction, ordered by events, timed.

Where there are no streams the same calls copy at once, in order; all of their time is exposed.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flagscale_like.runtime.platforms import Platform


@dataclass(frozen=True)
class CopyTime:
    """Seconds that copies took, and of these, how long compute stood still for them."""

    copy_s: float
    exposed_s: float

    @property
    def hidden_s(self) -> float:
        return max(0.0, self.copy_s - self.exposed_s)


class CopyStream:
    """A queue of copies. `copy` returns a ticket; `wait` makes compute wait for it.

    Nothing here blocks the host. A source must live until compute has waited for its ticket: only then is its memory,
    which belongs to the compute stream, free for other tensors in that stream's order.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._stream = platform.side_stream()
        self._copies: list[tuple[Any, Any]] = []
        self._stalls: list[tuple[Any, Any]] = []
        self._seconds = self._stalled = 0.0

    def copy(self, target: Tensor, source: Tensor, *, after: Any = None) -> Any:
        """Queue target.copy_(source), after all compute queued so far and after the ticket `after` of either direction."""
        if self._stream is None:
            began = time.perf_counter()
            target.copy_(source)
            self._seconds += time.perf_counter() - began
            return None
        self._stream.wait_stream(self._platform.compute_stream())
        if after is not None:
            self._stream.wait_event(after)
        with self._platform.on_stream(self._stream):
            began, ended = self._platform.event(), self._platform.event()
            began.record(self._stream)
            target.copy_(source, non_blocking=True)
            ended.record(self._stream)
        self._copies.append((began, ended))
        self._fold(512)
        return ended

    def wait(self, ticket: Any) -> None:
        """Compute that is queued from now on runs after the copy."""
        if ticket is None:
            return
        stream = self._platform.compute_stream()
        before, after = self._platform.event(), self._platform.event()
        before.record(stream)
        stream.wait_event(ticket)
        after.record(stream)
        self._stalls.append((before, after))

    def _fold(self, limit: int) -> None:
        """Add up the oldest measured pairs once there are many; those are long done."""
        for pairs, name in ((self._copies, "_seconds"), (self._stalls, "_stalled")):
            while len(pairs) > limit and pairs[0][1].query():
                began, ended = pairs.pop(0)
                setattr(self, name, getattr(self, name) + began.elapsed_time(ended) / 1e3)

    def times(self) -> CopyTime:
        """Seconds since the last call. Waits for the device."""
        if self._stream is not None:
            self._platform.synchronize()
            self._fold(0)
        found = CopyTime(self._seconds, self._stalled if self._stream is not None else self._seconds)
        self._seconds = self._stalled = 0.0
        return found


class HostPool:
    """Host buffers by size, pinned where there is a device; given back ones are used again, none is ever freed.

    torch rounds a pinned allocation up to a power of two, and pinning takes milliseconds. So buffers are cut from slabs that
    are powers of two themselves, several to a slab.

    Args:
        slab_bytes: least size of a slab; 0 allocates every buffer alone. Left out: 64 MiB where memory is pinned, else 0.
    """

    def __init__(self, platform: Platform, *, slab_bytes: int | None = None) -> None:
        self._platform = platform
        self._slab_bytes = (64 << 20 if platform.pins_memory else 0) if slab_bytes is None else slab_bytes
        self._free: dict[int, deque[tuple[Tensor, Any]]] = {}
        self.total_bytes = self.used_bytes = 0

    def get(self, nbytes: int) -> tuple[Tensor, Any]:
        """A uint8 buffer of at least `nbytes`, and the ticket of the copy that last used it (or None)."""
        size = -(-nbytes // 4096) * 4096
        self.used_bytes += size
        free = self._free.setdefault(size, deque())
        if not free:
            slab_bytes = 1 << (max(size, self._slab_bytes) - 1).bit_length() if self._slab_bytes else size
            slab = self._platform.host_buffer(slab_bytes, torch.uint8)
            self.total_bytes += slab_bytes
            free.extend((slab[i * size : (i + 1) * size], None) for i in range(slab_bytes // size))
        return free.popleft()  # the one whose last copy began first

    def put(self, buffer: Tensor, ticket: Any) -> None:
        """Take a buffer back; `ticket` is of the copy that still uses it."""
        self.used_bytes -= buffer.numel()
        self._free[buffer.numel()].append((buffer, ticket))
