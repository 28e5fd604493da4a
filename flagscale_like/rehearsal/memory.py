"""The device's memory over the steps of a rank: each tensor's memory from the operator that made it until it was freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, UntypedStorage


@dataclass(slots=True)
class Allocation:
    """One tensor's memory.

    Attributes:
        born, died: ticks, which every allocation and every freeing advances by 1; died is None while it lives.
        op, where, part: the operator that made it, the line that called it, and the part of the step; see record.Event.
        layer: number of the layer that made it; 0 outside the layers.
        layer_ended: the tick at which that layer, or part of the step, ended.
        component: weights, gradients, optimizer, buffers; empty for what a step makes.
    """

    nbytes: int
    born: int
    op: str
    where: str
    part: str
    layer: int = 0
    died: int | None = None
    component: str = ""
    layer_ended: int | None = None

    def outlived(self) -> bool:
        """Whether it was freed after the layer, or the part of the step, that made it had ended."""
        return self.layer_ended is not None and self.died is not None and self.died > self.layer_ended


class Memory:
    """Keeps what is allocated, and when it was freed.

    Attributes:
        allocations: in the order in which they were made.
        live, peak: bytes.
        steps: the tick at which each step began.
        end: the tick at which the last one had ended; None where nobody said so.
        given_back: the ticks at which the run had the allocator give back what nothing used.
    """

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.live = self.peak = 0
        self.peak_tick = self.tick = 0
        self.steps: list[int] = []
        self.end: int | None = None
        self.given_back: list[int] = []
        self._now: list[Allocation] = []  # what the part that runs has made
        self._part = ""
        self._known: dict[int, tuple[weakref.ref[UntypedStorage], Allocation]] = {}

    def is_new(self, tensor: Tensor) -> bool:
        """Whether the memory behind a tensor was not seen yet."""
        return tensor.untyped_storage()._cdata not in self._known

    def allocated(self, tensor: Tensor, op: str, where: str, part: str, layer: int) -> None:
        """An operator made memory."""
        storage = tensor.untyped_storage()
        if part != self._part:
            self._part_ends(part)
        found = Allocation(storage.nbytes(), self.tick, op, where, part, layer)
        self._now.append(found)
        self.tick += 1
        self.allocations.append(found)
        self.live += found.nbytes
        if self.live > self.peak:
            self.peak, self.peak_tick = self.live, found.born
        key = storage._cdata
        self._known[key] = (weakref.ref(storage, lambda _: self._freed(key)), found)

    def _freed(self, key: int) -> None:
        _, found = self._known.pop(key)
        found.died = self.tick
        self.tick += 1
        self.live -= found.nbytes

    def _part_ends(self, following: str) -> None:
        for found in self._now:
            found.layer_ended = self.tick
        self._now, self._part = [], following

    def begin_step(self) -> None:
        """Another step begins."""
        self.steps.append(self.tick)

    def belongs(self, component: str, tensors: Iterable[Tensor]) -> None:
        """Say what the memory of these tensors is: weights, gradients, optimizer, buffers."""
        for tensor in tensors:
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is not None and not known[1].component:
                known[1].component = component
