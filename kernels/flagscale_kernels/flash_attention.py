r"""Flash attention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691), one band of `_bands.py`.

    o_i = sum_j softmax_j(scale q_i . k_j - slope |p - j|) v_j,    p = i + seq_k - seq_q,    j in the band of p

`_bands.py` has the maths of the online softmax and of its gradient. The forward and the dQ kernel run one program per tile
of queries. The dK and dV kernel runs one program per tile of keys of a KV head, which sums over the query heads of its
group in registers. One program writes each element of a gradient, in a fixed order, so the backward is deterministic. It
computes S and dP twice: 7 products. With deterministic=False the kernel of dK and dV also adds dQ up in memory, by
atomics in fp32: 5 products. `_dq_sums.py` adds it up in order too. Nothing of size [seq_q, seq_k] is stored.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from flagscale_kernels import _attention_launch, _attention_torch
from flagscale_kernels._attention_checks import (
    bounds_of,
    check_packed,
    check_qkv,
    check_scale,
    check_sinks,
    check_slopes,
    check_softcap,
    check_window,
    lacking_head_dim,
    reachable,
)
from flagscale_kernels._attention_kernels import _flash_dkdv_kernel, _flash_dq_kernel, _flash_forward_kernel
from flagscale_kernels._attention_launch import NO_BOUND, Kernels, Launcher, Problem
from flagscale_kernels._checks import choose_backend
from flagscale_kernels._dq_sums import ADDED, APART, ONLY_DK, ONLY_DV, ORDERED
from flagscale_kernels._layouts import PACKED, as_bnsd, from_bnsd, sizes
from flagscale_kernels._operators import autocast_to, operator
from flagscale_kernels._tuning import Config, TunedKernel, tile_lists


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, with all scores in memory: [b, n, s, d] -> (o, lse)."""
    left, right = bounds_of(causal, window)
    group = q.shape[1] // k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q @ k.transpose(2, 3)).to(compute) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    positions, keys = (torch.arange(t.shape[2], device=q.device) for t in (q, k))
    distance = (positions + k.shape[2] - q.shape[2])[:, None] - keys[None, :]
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(compute)[..., None, None] * distance.abs()
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left != NO_BOUND:
        allowed &= distance <= left
    if right != NO_BOUND:
        allowed &= distance >= -right
    s = s.masked_fill(~allowed, -torch.inf)
    if sinks is not None:  # one more key for each head, without a value
        s = torch.cat([s, sinks.to(compute)[:, None, None].expand(*s.shape[:3], 1)], -1)
        return s.softmax(-1)[..., :-1].to(q.dtype) @ v, s.logsumexp(-1)
    p = s.softmax(-1).masked_fill(~allowed.any(-1)[:, None], 0.0)
    return p.to(q.dtype) @ v, s.logsumexp(-1)


# ------------------------------------------------------------------------------------------------------------- tiles


forward_kernel = TunedKernel(
    Launcher(_flash_forward_kernel, "_flash_forward_kernel", descriptors={1: "BN", 2: "BN"}),
    tile_lists(
        sm80={
            128: [Config(bm=128, bn=64, warps=8, stages=3, edge=3), Config(bm=128, bn=32, warps=8, stages=3)],
            192: [Config(bm=128, bn=32, warps=8, stages=2, edge=2)],
            256: [Config(bm=64, bn=64, warps=8, stages=1)],
        },
        sm90={
            64: [
                Config(bm=64, bn=64, warps=4, stages=3, edge=2),
                Config(bm=64, bn=64, warps=4, stages=3, edge=2, descriptors=True),
                Config(bm=128, bn=128, warps=8, stages=2, edge=2, descriptors=True),
            ],
            128: [
                Config(bm=128, bn=64, warps=8, stages=3, edge=2),
                Config(bm=128, bn=128, warps=8, stages=2, edge=2, descriptors=True),
                Config(bm=128, bn=64, warps=8, stages=3, edge=2, descriptors=True),
                Config(bm=64, bn=64, warps=4, stages=3, edge=2, descriptors=True),
            ],
            192: [Config(bm=128, bn=64, warps=8, stages=2, edge=2)],
            256: [Config(bm=128, bn=64, warps=8, stages=2, edge=2, descriptors=True)],
        },
        other={
            128: [Config(bm=64, bn=64, warps=4, stages=2)],
            256: [Config(bm=64, bn=64, warps=8, stages=1)],
        },
        float32=Config(bm=32, bn=32, warps=4, stages=1),
        interpreter=Config(bm=64, bn=32),
    ),
)
# The tiles of the backward kernels. Piecewise attention takes them as well.
DKDV_TILES = tile_lists(
    sm80={
        64: [Config(bm=64, bn=128, warps=8, stages=2, edge=2), Config(bm=64, bn=64, warps=4, stages=2, edge=2)],
        128: [Config(bm=32, bn=64, warps=4, stages=2, edge=2), Config(bm=64, bn=64, warps=4, stages=2, edge=2)],
        160: [Config(bm=16, bn=64, warps=4, stages=2, edge=2)],
        192: [Config(bm=32, bn=32, warps=4, stages=1, edge=0)],
        256: [Config(bm=64, bn=64, warps=8, stages=1, edge=0), Config(bm=32, bn=32, warps=4, stages=1, edge=0)],
    },
    sm90={
        64: [
            Config(bm=64, bn=64, warps=4, stages=2, edge=0),
            Config(bm=64, bn=64, warps=4, stages=2, edge=2, descriptors=True),
            Config(bm=64, bn=128, warps=8, stages=2, edge=2, descriptors=True),
        ],
        128: [
            Config(bm=64, bn=128, warps=8, stages=2, edge=2, descriptors=True),
            Config(bm=64, bn=128, warps=8, stages=2, edge=0, descriptors=True),
            Config(bm=32, bn=128, warps=8, stages=2, edge=0),
        ],
        160: [Config(bm=32, bn=128, warps=8, stages=2, edge=0)],  # above, DK_TILES and DV_TILES
    },
    other={
        128: [Config(bm=32, bn=64, warps=8, stages=2, edge=0)],
        256: [Config(bm=32, bn=32, warps=4, stages=1, edge=0)],
    },
    float32=Config(bm=32, bn=32, warps=4, stages=1, edge=0),
    interpreter=Config(bm=32, bn=64, edge=0),
)
dkdv_kernel = TunedKernel(
    Launcher(_flash_dkdv_kernel, "_flash_dkdv_kernel", descriptors={0: "BM", 3: "BM"}, SUM=APART),
    DKDV_TILES,
)
DK_TILES, DV_TILES = (
    tile_lists(
        sm80={}, sm90=sm90, other={}, float32=Config(bm=32, bn=32, warps=4, stages=1, edge=0),
        interpreter=Config(bm=32, bn=64, edge=0),
    )
    for sm90 in (
        {
            192: [Config(bm=32, bn=128, warps=8, stages=2, edge=2)],
            256: [Config(bm=32, bn=128, warps=8, stages=2, edge=2, descriptors=True)],
        },
        {
            192: [Config(bm=32, bn=128, warps=8, stages=2, edge=2)],
            256: [Config(bm=64, bn=128, warps=8, stages=2, edge=2, descriptors=True)],
        },
    )
)  # fmt: skip
dk_kernel, dv_kernel = (
    TunedKernel(Launcher(_flash_dkdv_kernel, name, descriptors={0: "BM", 3: "BM"}, SUM=what), tiles)
    for name, what, tiles in (
        ("_flash_dk_kernel", ONLY_DK, DK_TILES),
        ("_flash_dv_kernel", ONLY_DV, DV_TILES),
    )
)
DQ_TILES = tile_lists(
    sm80={
        64: [Config(bm=128, bn=64, warps=8, stages=2, edge=2)],
        128: [Config(bm=64, bn=64, warps=4, stages=2, edge=2), Config(bm=128, bn=64, warps=8, stages=2, edge=2)],
        192: [Config(bm=64, bn=16, warps=4, stages=2, edge=2)],
        256: [Config(bm=64, bn=64, warps=8, stages=1)],
    },
    sm90={
        64: [
            Config(bm=64, bn=64, warps=4, stages=2, edge=2),
            Config(bm=64, bn=64, warps=4, stages=2, edge=2, descriptors=True),
        ],
        128: [
            Config(bm=128, bn=64, warps=8, stages=2, edge=2),
            Config(bm=128, bn=64, warps=8, stages=2, edge=2, descriptors=True),
            Config(bm=128, bn=128, warps=8, stages=2, edge=2, descriptors=True),
            Config(bm=64, bn=64, warps=4, stages=2, edge=2, descriptors=True),
        ],
        192: [Config(bm=128, bn=64, warps=8, stages=2, edge=2)],
        256: [Config(bm=128, bn=64, warps=8, stages=1, descriptors=True)],
    },
    other={
        128: [Config(bm=64, bn=32, warps=8, stages=2)],
        256: [Config(bm=64, bn=32, warps=8, stages=1)],
    },
    float32=Config(bm=32, bn=32, warps=4, stages=1),
    interpreter=Config(bm=64, bn=32),
)
dq_kernel = TunedKernel(
    Launcher(_flash_dq_kernel, "_flash_dq_kernel", descriptors={1: "BN", 2: "BN"}),
    DQ_TILES,
)
ADDED_TILES, ORDERED_TILES = (
    tile_lists(
        sm80={
            64: [Config(bm=64, bn=64, warps=4, stages=stages, edge=edge)],
            96: [Config(bm=64, bn=64, warps=4, stages=2, edge=0)],
            128: [Config(bm=32, bn=64, warps=4, stages=stages, edge=edge)],
            256: [Config(bm=32, bn=32, warps=4, stages=1, edge=0)],
        },
        sm90={
            64: [Config(bm=64, bn=128, warps=8, stages=2, edge=2, descriptors=True)],
            128: [Config(bm=64, bn=128, warps=8, stages=2, edge=0, descriptors=True)],  # above, seven products
        },
        other={
            128: [Config(bm=32, bn=64, warps=8, stages=2, edge=0)],
            256: [Config(bm=32, bn=32, warps=4, stages=1, edge=0)],
        },
        float32=Config(bm=32, bn=32, warps=4, stages=1, edge=0),
        interpreter=Config(bm=32, bn=64, edge=2),
    )
    for stages, edge in ((1, 0), (2, 2))  # the addresses of atomics leave no registers for a deeper pipeline on sm_80
)
added_kernel, ordered_kernel = (
    TunedKernel(Launcher(_flash_dkdv_kernel, name, descriptors={0: "BM", 3: "BM"}, zeroed=(4, 5), SUM=how), tiles)
    for name, how, tiles in (
        ("_flash_added_kernel", ADDED, ADDED_TILES),
        ("_flash_ordered_kernel", ORDERED, ORDERED_TILES),
    )
)
KERNELS = Kernels(forward_kernel, dkdv_kernel, dk_kernel, dv_kernel, dq_kernel, added_kernel, ordered_kernel)


# --------------------------------------------------------------------------------------------------------- operators


def _problem(q, k, v, slopes, sinks, cu_q, cu_k, max_q, max_k, scale, cap, left, right, layout):
    return Problem(
        pairs=((q, k),), v=v, slopes=slopes, sinks=sinks, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k,
        scale=scale, cap=cap, left=left, right=right, layout=layout,
    )  # fmt: skip


@operator("flash_attention")
def _flash_op(  # the schema of a custom op has tensors and numbers only
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, max_q: int, max_k: int, scale: float, cap: float, left: int, right: int, layout: str,
    deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _problem(q, k, v, slopes, sinks, cu_q, cu_k, max_q, max_k, scale, cap, left, right, layout)
    if backend == "torch":
        return _attention_torch.forward(problem)
    return _attention_launch.forward(problem, KERNELS)


@operator("flash_attention_backward")
def _flash_backward_op(  # as above
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, slopes: Tensor | None,
    sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, scale: float, cap: float,
    left: int, right: int, layout: str, deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = _problem(q, k, v, slopes, sinks, cu_q, cu_k, max_q, max_k, scale, cap, left, right, layout)
    (dq, dk, dv), dsinks = run_backward(
        problem, KERNELS, do, dlse, o, lse, deterministic=deterministic, backend=backend
    )
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def run_backward(
    problem: Problem, kernels: Kernels, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor,
    *, deterministic: bool, backend: str,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    """([dq, dk of each band, dv], gradient of the sinks) by either backend."""
    do, o = (t if t.stride(-1) == 1 else t.contiguous() for t in (do, o))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    if backend == "torch":
        return _attention_torch.backward(problem, do, dlse, o, lse)
    return _attention_launch.backward(problem, kernels, do, dlse, o, lse, deterministic=deterministic)


@_flash_op.register_fake
def _(q, k, v, slopes, sinks, cu_q, cu_k, max_q, max_k, scale, cap, left, right, layout, deterministic, backend):
    return fake_output(q, v, layout)


def fake_output(q: Tensor, v: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Tensors like (o, LSE), for tracing."""
    batch, heads, length = sizes(q, layout)
    shape = (heads, length) if layout == PACKED else (batch, heads, length)
    lse = q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


@_flash_backward_op.register_fake
def _(do, dlse, q, k, v, o, lse, slopes, sinks, *options):
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return *(t.new_empty(t.shape) for t in (q, k, v)), dsinks


def _setup(ctx, inputs, output):
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the LSE usually gets no gradient


def _backward(ctx, do, dlse):
    q, k, v, slopes, sinks, cu_q, cu_k, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv, dsinks = _flash_backward_op(do, dlse, q, k, v, o, lse, slopes, sinks, cu_q, cu_k, *ctx.options)
    return dq, dk, dv, None, None if sinks is None else dsinks, *(None,) * 11


_flash_op.register_autograd(_backward, setup_context=_setup)


# ------------------------------------------------------------------------------------------------------------- public


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q [b, n, s, d] over k [b, n_kv, s_k, d] and v [b, n_kv, s_k, dv] -> o [b, n, s, dv], or (o, LSE).

    layout: the order of the dimensions of q, k, v and o: "bnsd", "sbnd", "bsnd", or "tnd" for a pack of sequences with
    cu_seqlens_q and cu_seqlens_k [sequences + 1]. Strides are free, but the last must be 1. n_kv divides n (grouped
    queries). Triton takes head dimensions up to 256; others, and float64, run in PyTorch.
    causal: a query sees no key after it. The last query is aligned with the last key: query i is at
    i + s_k - s. It has no default, because that of other packages is False and a wrong mask shows in no error.
    softmax_scale: by default d^-0.5.
    alibi_slopes: [n] or [b, n], fp32, without gradient; adds -slope * |distance| to the scores.
    window: with causal, the number of keys that a query sees, its own included, as Mistral's sliding_window; or the
    largest distances (left, right), where -1 is no bound.
    max_seqlen_q, max_seqlen_k: the longest sequences of a pack. The default is the length of the pack, which launches
    programs that do nothing.
    softcap: c > 0 makes a score c tanh(score / c), as Gemma 2 does (arXiv:2408.00118), before ALiBi's term.
    sinks: [n], a learned score for each head of a key that has no value, as in gpt-oss (arXiv:2309.17453 keeps real keys
    instead). It has a gradient.
    return_lse: also return the log of the softmax's denominator, fp32 [b, n, s] ([n, t] for "tnd"), which has a gradient.
    deterministic: False lets the backward add dQ up in the order in which programs come to it: 5 products instead of 7,
    4 more bytes for each element of q while it runs, and a rounding of dQ that differs from run to run. The backward is
    deterministic without it, and in PyTorch always; FLAGSCALE_KERNELS_ORDERED_DQ=1 gives it 5 products too, with that memory.
    A query without keys gives 0, and its head's sink or -inf for the LSE.
    Raises ValueError for a shape, dtype, device, stride, layout, window or head count that does not fit.
    """
    q, k, v = autocast_to(q, k, v)
    backend = choose_backend(q, backend, lacks=lacking_head_dim(q, v))
    check_qkv(q, k, v, layout, backend, ("q", "k", "v"))
    check_window(window, causal)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    cu_q, cu_k, max_q, max_k = check_packed(layout, *lengths, q, k)
    left, right = reachable(bounds_of(causal, window), max_q, max_k)
    scale, cap = check_scale(q, softmax_scale), check_softcap(softcap)
    slopes, sinks = check_slopes(alibi_slopes, q, layout, cu_q), check_sinks(sinks, q, layout)
    if backend == "torch" and not return_lse and slopes is None and sinks is None and not cap:
        plain = right == NO_BOUND or (causal and max_q == max_k)
        if plain and left == NO_BOUND and layout != PACKED and q.numel() and v.numel():
            return _by_pytorch(q, k, v, layout, causal=causal, scale=scale)
    options = (max_q, max_k, scale, cap, left, right, layout, deterministic, backend)
    o, lse = _flash_op(q, k, v, slopes, sinks, cu_q, cu_k, *options)
    return (o, lse) if return_lse else o


def _by_pytorch(q, k, v, layout, *, causal, scale):
    """By PyTorch's own kernel, which is the fastest on a CPU for what it takes."""
    q, k, v = (as_bnsd(t, layout) for t in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return from_bnsd(out, layout)


def flash_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and, if given, sinks, for an autograd function that calls `flash_attention` itself.

    do: the gradient of o. q, k, v, o, lse: the inputs and outputs of the forward call, with return_lse=True; the options are
    those of that call.
    The inputs are not checked again.
    """
    backend = choose_backend(q, backend, lacks=lacking_head_dim(q, v))
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    cu_q, cu_k, max_q, max_k = check_packed(layout, *lengths, q, k)
    left, right = reachable(bounds_of(causal, window), max_q, max_k)
    slopes, sinks = check_slopes(alibi_slopes, q, layout, cu_q), check_sinks(sinks, q, layout)
    options = (max_q, max_k, check_scale(q, softmax_scale), float(softcap), left, right, layout, deterministic, backend)
    *gradients, dsinks = _flash_backward_op(do, None, q, k, v, o, lse, slopes, sinks, cu_q, cu_k, *options)
    return tuple(gradients) if sinks is None else (*gradients, dsinks)
