"""Copies between device and host beside the compute: one side stream a direction, ordered by events, timed.

On a CPU the same calls copy at once, in order; all of their time is exposed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flagscale_like.runtime.platform import Platform


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
    """Host buffers by size, pinned where there is a device; given back ones are used again, none is ever freed."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._free: dict[int, list[tuple[Tensor, Any]]] = {}
        self.total_bytes = self.used_bytes = 0

    @staticmethod
    def _size(nbytes: int) -> int:
        return -(-nbytes // 4096) * 4096

    def get(self, nbytes: int) -> tuple[Tensor, Any]:
        """A uint8 buffer of at least `nbytes`, and the ticket of the copy that last read it (or None)."""
        size = self._size(nbytes)
        self.used_bytes += size
        if waiting := self._free.get(size):
            return waiting.pop(0)  # the one whose last reader began first
        self.total_bytes += size
        return self._platform.host_buffer(size, torch.uint8), None

    def put(self, buffer: Tensor, ticket: Any) -> None:
        """Take a buffer back; `ticket` is of the copy that still reads it."""
        self.used_bytes -= buffer.numel()
        self._free.setdefault(buffer.numel(), []).append((buffer, ticket))
