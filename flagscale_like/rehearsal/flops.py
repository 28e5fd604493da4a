"""FLOPs of an operator from its shapes: torch's own formulas for products, and ours for our attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from flagscale_kernels._layouts import LAYOUTS

NO_BOUND = -1


def flops_of(function: Any, args: Sequence, kwargs: Mapping[str, Any], outs: Sequence[Tensor]) -> int:
    """Multiplications and additions of one call; 0 for what memory limits."""
    if function.namespace == "flagscale_kernels":
        if function._schema.name.partition("::")[2] not in ATTENTION:
            return 0
        names = (argument.name for argument in function._schema.arguments)
        return _attention(dict(zip(names, args, strict=False)) | dict(kwargs))
    if function._schema.name in ("aten::_grouped_mm", "aten::grouped_mm"):
        return _grouped(args, outs)
    formula = flop_registry.get(function._overloadpacket)
    if (
        "dtype" in function._overloadname
    ):  # of a product with an output of another dtype, which torch's formulas do not know
        args = [value for value in args if not isinstance(value, torch.dtype)]
    return int(formula(*args, **kwargs, out_val=outs[0] if len(outs) == 1 else tuple(outs))) if formula else 0


def _grouped(args: Sequence, outs: Sequence[Tensor]) -> int:
    """Of grouped_mm: [t, k] by [e, k, n], or, of the weights' gradient, [m, t] by [t, n]. Each token has one expert."""
    a, b = args[0], args[1]
    if a.dim() == 2 and b.dim() == 3:
        return 2 * a.shape[0] * b.shape[-2] * b.shape[-1]
    if a.dim() == 2 and b.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[-1]
    return 2 * a.numel() * b.shape[-1]


def _pairs(max_q: int, max_k: int, left: int, right: int) -> float:
    """Pairs of a query and a key that it sees, of one sequence. The keys end where the queries end."""
    whole = float(max_q) * max_k
    offset = max_k - max_q
    seen = whole if right < 0 or right >= max_q else max_q * (offset + right) + max_q * (max_q + 1) / 2
    if 0 <= left < max_k:
        seen = min(seen, float(max_q) * (left + 1 + max(0, right)))
    return min(seen, whole)


def _attention(given: Mapping[str, Any]) -> int:
    """2 FLOPs for each pair, head and channel of a product: two products forward, five backward.

    A sequence of a pack is taken to be as long as the longest: what a pack's sequences are is data.
    """
    q = given["q"] if "q" in given else given["q1"]
    v, layout, backward = given["v"], given["layout"], "do" in given
    channels = 3 * q.shape[-1] + 2 * v.shape[-1] if backward else q.shape[-1] + v.shape[-1]
    heads = q.shape[LAYOUTS[layout].head]
    max_q, max_k = given["max_q"], given["max_k"]
    if "left" in given:
        left, right = given["left"], given["right"]
    else:
        left, right = NO_BOUND, 0 if given["causal"] else NO_BOUND
    sequences = q.numel() / (heads * q.shape[-1] * max_q)
    return int(2 * channels * heads * sequences * _pairs(max_q, max_k, left, right))


ATTENTION = ("flash_attention", "flash_attention_backward", "piecewise_attention", "piecewise_attention_backward")
