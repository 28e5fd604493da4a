"""The checks of attention's arguments, and the arguments as the kernels take them."""

import torch
from torch import Tensor

from flagscale_kernels._attention_launch import NO_BOUND
from flagscale_kernels._checks import check_float, check_same, require
from flagscale_kernels._layouts import PACKED, check_layout, sizes

MAX_HEAD_DIM = 256
MAX_LENGTH = 1 << 30  # positions and the edges of tiles are 32-bit numbers


def lacking_head_dim(*tensors: Tensor) -> str:
    """Why the Triton kernels cannot take the tensors' head dimensions, or "" where they can."""
    for t in tensors:
        if not 1 <= t.shape[-1] <= MAX_HEAD_DIM:
            return f"head dimensions must be from 1 to {MAX_HEAD_DIM}, got {t.shape[-1]}"
    return ""


def check_qkv(q: Tensor, k: Tensor, v: Tensor, layout: str, backend: str, names: tuple[str, str, str]) -> None:
    """Raise ValueError unless q, k and v go together; the messages call them by `names`."""
    q_name, k_name, v_name = names
    check_layout(layout, zip(names, (q, k, v)))
    check_float(q_name, q, backend)
    for attribute in ("dtype", "device"):
        check_same(attribute, zip(names, (q, k, v)))
    d = q.shape[-1]
    for name, t in ((q_name, q), (v_name, v)):
        lacks = lacking_head_dim(t)
        require(backend == "torch" or not lacks, f"{name}.shape[-1] ({t.shape[-1]}): {lacks}")
    require(k.shape[-1] == d, f"{k_name}.shape[-1] ({k.shape[-1]}) must equal {q_name}.shape[-1] ({d})")
    require(
        k.shape[:-1] == v.shape[:-1],
        f"{v_name}.shape ({tuple(v.shape)}) must equal {k_name}.shape ({tuple(k.shape)}) but for the last dimension",
    )
    (batch, heads, _), (k_batch, kv_heads, _) = sizes(q, layout), sizes(k, layout)
    require(batch == k_batch, f"{k_name}'s batch ({k_batch}) must equal {q_name}'s ({batch})")
    require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"{q_name}'s heads ({heads}) must be divisible by {k_name}'s ({kv_heads})",
    )


def check_scale(q: Tensor, softmax_scale: float | None) -> float:
    """The softmax scale, by default d^-0.5. Raises ValueError unless it is positive."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    require(scale > 0, f"softmax_scale ({scale}) must be positive")
    return scale


def bounds_of(causal: bool, window: int | tuple[int, int] | None) -> tuple[int, int]:
    """The largest distances (left, right) of a key from its query, or NO_BOUND."""
    left, right = (NO_BOUND, NO_BOUND) if window is None else ((window - 1, 0) if isinstance(window, int) else window)
    if causal:
        right = 0
    return left, right


def reachable(bounds: tuple[int, int], max_q: int, max_k: int) -> tuple[int, int]:
    """The bounds, without those that no distance reaches: fewer masks, and sums that fit into 32 bits."""
    left, right = bounds
    return (NO_BOUND if left >= max_k - 1 else left), (NO_BOUND if right >= max(max_q - 1, 1) else right)


def check_window(window: int | tuple[int, int] | None, causal: bool) -> None:
    """Raise ValueError unless `window` is what flash_attention takes."""
    if window is None:
        return
    if isinstance(window, int):
        require(window > 0, f"window ({window}) must be at least 1")
        require(causal, f"window ({window}) as a number needs causal=True, got {causal}: give (left, right)")
        return
    require(len(window) == 2, f"window ({window}) must be a number or a pair (left, right)")
    require(min(window) >= NO_BOUND, f"window ({window}) must hold numbers of at least -1, which means no bound")


def check_packed(
    layout: str, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | None, max_k: int | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """(cu_q, cu_k, max_q, max_k) as the kernels take them. Raises ValueError unless they go with the layout."""
    packed = layout == PACKED
    given = cu_q is not None and cu_k is not None
    require(packed == given and (cu_q is None) == (cu_k is None), f"cu_seqlens_q and cu_seqlens_k go with {PACKED!r}")
    if cu_q is None or cu_k is None:
        max_q, max_k = sizes(q, layout)[2], sizes(k, layout)[2]
        require(max(max_q, max_k) <= MAX_LENGTH, f"sequences ({max_q}, {max_k}) must be at most {MAX_LENGTH} long")
        return None, None, max_q, max_k
    for name, t in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        require(t.dtype in (torch.int32, torch.int64), f"{name}.dtype ({t.dtype}) must be torch.int32 or torch.int64")
        require(t.dim() == 1 and t.shape[0] >= 1, f"{name}.shape ({tuple(t.shape)}) must be [sequences + 1]")
        check_same("device", [("q", q), (name, t)])
    check_same("shape", [("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)])
    # Without the longest lengths the grid is as if one sequence filled the pack; programs past a sequence do nothing.
    max_q, max_k = max_q or q.shape[0], max_k or k.shape[0]
    require(max(max_q, max_k) <= MAX_LENGTH, f"sequences ({max_q}, {max_k}) must be at most {MAX_LENGTH} long")
    return cu_q.contiguous(), cu_k.contiguous(), max_q, max_k  # the kernels read entries one after the other


def check_softcap(softcap: float) -> float:
    """The cap of the scores, 0 for none. Raises ValueError for a negative one."""
    require(softcap >= 0, f"softcap ({softcap}) must be positive, or 0 for no cap")
    return float(softcap)


def check_sinks(sinks: Tensor | None, q: Tensor, layout: str) -> Tensor | None:
    """The sinks as the kernels take them. Raises ValueError unless there is one for each head."""
    if sinks is None:
        return None
    heads = sizes(q, layout)[1]
    require(tuple(sinks.shape) == (heads,), f"sinks.shape ({tuple(sinks.shape)}) must be ({heads},)")
    require(sinks.is_floating_point(), f"sinks.dtype ({sinks.dtype}) must be a floating one")
    check_same("device", [("q", q), ("sinks", sinks)])
    return sinks.contiguous()


def check_slopes(slopes: Tensor | None, q: Tensor, layout: str, cu_q: Tensor | None) -> Tensor | None:
    """ALiBi's slopes as the kernels take them. Raises ValueError unless they are one for each head (and batch entry)."""
    if slopes is None:
        return None
    batch, heads, _ = sizes(q, layout)
    entries = batch if cu_q is None else cu_q.shape[0] - 1
    require(
        tuple(slopes.shape) in ((heads,), (entries, heads)),
        f"alibi_slopes.shape ({tuple(slopes.shape)}) must be ({heads},) or ({entries}, {heads})",
    )
    check_same("device", [("q", q), ("alibi_slopes", slopes)])
    return slopes.float().contiguous()
