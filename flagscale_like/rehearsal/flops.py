"""FLOPs of an operator from its shapes: torch's own formulas for products, and ours for our attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

NO_BOUND = -1


def flops_of(function: Any, args: Sequence, kwargs: Mapping[str, Any], outs: Sequence[Tensor]) -> int:
    """Multiplications and additions of one call; 0 for what memory limits."""
    if function.namespace == "flagscale_kernels":
        formula = OURS.get(function._schema.name.partition("::")[2])
        return formula(*args) if formula else 0
    if function._schema.name in ("aten::_grouped_mm", "aten::grouped_mm"):
        return _grouped(args, outs)
    formula = flop_registry.get(function._overloadpacket)
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


def _attention(q: Tensor, v: Tensor, cu_q: Tensor | None, shape: Sequence[Any], products: tuple[int, int]) -> int:
    """2 FLOPs for each pair, head and channel of a product: `products` have q's channels, and v's."""
    max_q, max_k, _, left, right, layout, _ = shape
    channels = products[0] * q.shape[-1] + products[1] * v.shape[-1]
    heads = q.shape[1] if layout == "bnsd" else q.shape[-2]
    # A sequence of a pack is taken to be as long as the longest: what a pack's sequences are is data.
    tokens = q.numel() // (heads * q.shape[-1])
    return int(2 * channels * heads * (tokens / max_q) * _pairs(max_q, max_k, left, right))


def _forward(q: Tensor, k: Tensor, v: Tensor, slopes: Any, cu_q: Any, cu_k: Any, *shape: Any) -> int:
    return _attention(q, v, cu_q, shape, (1, 1))


def _backward(do: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, o: Any, lse: Any, *rest: Any) -> int:
    _, cu_q, _, *shape = rest
    return _attention(q, v, cu_q, shape, (3, 2))


OURS: dict[str, Callable[..., int]] = {
    "flash_attention": _forward,
    "flash_attention_backward": _backward,
}
