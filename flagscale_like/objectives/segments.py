"""Sums over parts of a tensor that lie one after another."""

from __future__ import annotations

import torch
from torch import Tensor


def sums_between(values: Tensor, bounds: Tensor) -> Tensor:
    """[n, ...] -> [parts, ...]: the sums between the bounds, int64 [parts + 1]. Their order is fixed, on every device."""
    reduce = torch.segment_reduce  # ty: ignore[missing-attribute]  # torch's stub lacks it
    return reduce(values, "sum", offsets=bounds, axis=0, unsafe=True)
