"""Operators that torch cannot run without data, or only in part, and what stands in for them in a rehearsal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork

from flagscale_like.errors import required

aten = torch.ops.aten

# c10d's operators that torch leaves without an implementation for tensors without data.
_missing = torch.library.Library("c10d", "IMPL")
for _name in (
    "allreduce_coalesced_",
    "reduce_scatter_tensor_coalesced_",
    "allgather_into_tensor_coalesced_",
):
    _missing.impl(_name, lambda *_, **__: FakeWork().boxed(), "Meta")


def _wide_product(*_: Any, out: Tensor, **__: Any) -> Tensor:
    """addmm into an output of another dtype, which torch has for CUDA alone."""
    return out


def _grouped_product(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The experts' product in any dtype; without data torch takes bf16 alone. See torch.nn.functional.grouped_mm.

    Args:
        a, b: [t, k] and [e, k, n] give [t, n]; [m, t] and [t, n] give [e, m, n]; [e, m, k] and [k, t] give [m, t].
        offs: [e], where each group of the two-dimensional side ends.
    """
    if a.dim() == b.dim():
        lead = (required(offs, "offs").shape[0],) if a.dim() == 2 else (a.shape[0],)
        return a.new_empty(*lead, a.shape[-2], b.shape[-1], dtype=out_dtype or a.dtype)
    return a.new_empty(a.shape[-2], b.shape[-1], dtype=out_dtype or a.dtype)


# What is called in the place of an operator.
FAKES: dict[Any, Callable[..., Any]] = {
    aten.addmm.dtype_out: _wide_product,
    aten._grouped_mm.default: _grouped_product,
}
