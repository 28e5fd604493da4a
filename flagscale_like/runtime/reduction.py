"""The one reduction of a step: named numbers of all ranks, added up in one collective and read by the host once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flagscale_like.runtime.parallel import ParallelContext

Value = Tensor | float | Sequence[float]


class NamedSum:
    """Adds up named numbers over all ranks. The names are the same on every rank and in every call.

    The first call compares the names over the ranks: a rank that contributes other names would otherwise add its numbers
    to those of another name, without an error.
    """

    def __init__(self, ctx: ParallelContext) -> None:
        self.ctx = ctx
        self._sizes: dict[str, int] | None = None

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """The sums over all ranks, by name, in float64: a number for a scalar, a list for a vector.

        The values may lie on the device or on the host. The host waits for the device once, for the result.
        """
        device = self.ctx.platform.device
        flat = _flat(values, device)
        self._check({name: len(tensor) for name, tensor in flat.items()})
        names = [name for name, tensor in flat.items() for _ in range(len(tensor))]
        numbers, sums = iter(self.ctx.add_up(torch.cat(list(flat.values())), names)), {}
        for name, tensor in flat.items():
            taken = [next(numbers) for _ in range(len(tensor))]
            sums[name] = taken if _is_vector(values[name]) else taken[0]
        return sums

    def _check(self, sizes: dict[str, int]) -> None:
        if self._sizes is None:
            found = self.ctx.gather(sizes)
            other = next((rank for rank, names in enumerate(found) if list(names.items()) != list(sizes.items())), None)
            assert other is None, (
                f"ranks {self.ctx.rank} and {other} reduce different names: {sizes} and {found[other]}"
            )
            self._sizes = sizes
        assert list(sizes.items()) == list(self._sizes.items()), f"names changed from {self._sizes} to {sizes}"


def _is_vector(value: Value) -> bool:
    return value.dim() > 0 if isinstance(value, Tensor) else isinstance(value, Sequence)


def _flat(values: Mapping[str, Value], device: torch.device) -> dict[str, Tensor]:
    """Each value as a float64 vector on the device. The host's numbers go there in one copy, which nothing waits for."""
    hosts = {
        name: [*value] if isinstance(value, Sequence) else [value]
        for name, value in values.items()
        if not isinstance(value, Tensor)
    }
    numbers = torch.tensor([number for own in hosts.values() for number in own], dtype=torch.float64)
    moved = iter(numbers.to(device, non_blocking=True).split([len(own) for own in hosts.values()]))
    return {
        name: value.detach().to(device, torch.float64).reshape(-1) if isinstance(value, Tensor) else next(moved)
        for name, value in values.items()
    }
