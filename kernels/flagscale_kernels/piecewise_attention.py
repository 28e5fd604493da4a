r"""Piecewise attention: one softmax over scores from two query and key pairs, chosen by distance.

With the signed distance D = (seq_k - seq_q) + i - j, which aligns the last query with the last key,

    s_ij = scale q2_i . k2_j  if D >= threshold else  scale q1_i . k1_j        o = softmax(s) v

This is the operator of NLPE (Aquila2). There (q1, k1) are rotated by RoPE at the true positions. How NLPE makes (q2,
k2) is not public beyond "adjust the relative position, constrain its largest value". Two published schemes fit (Su
2023, ReRoPE and Leaky ReRoPE). Clipped: q2 is rotated at the constant position `threshold` and k2 is not rotated, so
every far pair has the same distance. Compressed: beyond a threshold w positions advance by 1/c, with q2 at
w - w/c + i/c and k2 at j/c. With either, a model sees no distance that it was not trained on.

The keys of a row form two bands of `_bands.py`: far, j <= p - threshold, and near, p - threshold < j (<= p if causal).
The forward processes the far band with (q2, k2), then the near band with (q1, k1), with one online softmax. That is 2
products per tile; only tiles that the threshold cuts need both scores. The backward is two flash backwards with the same
LSE and delta, and sums dV over both bands in registers. The threshold is a runtime argument: a new one compiles nothing.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from flagscale_kernels import _attention_launch, _attention_torch
from flagscale_kernels._attention_checks import (
    check_packed,
    check_qkv,
    check_scale,
    check_sinks,
    check_softcap,
    lacking_head_dim,
)
from flagscale_kernels._attention_launch import NO_BOUND, Kernels, Launcher, Problem
from flagscale_kernels._checks import check_same, choose_backend, require
from flagscale_kernels._dq_sums import ADDED, APART, ONLY_DK, ONLY_DV, ORDERED
from flagscale_kernels._operators import autocast_to, operator
from flagscale_kernels._piecewise_kernels import (
    _piecewise_dkdv_kernel,
    _piecewise_dq_kernel,
    _piecewise_forward_kernel,
)
from flagscale_kernels._tuning import Config, TunedKernel, tile_lists
from flagscale_kernels.flash_attention import (
    ADDED_TILES,
    DK_TILES,
    DKDV_TILES,
    DQ_TILES,
    DV_TILES,
    ORDERED_TILES,
    fake_output,
    run_backward,
)


def piecewise_reference(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    threshold: int,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, with all scores in memory: [b, n, s, d] -> o, or (o, lse)."""
    group = q1.shape[1] // k1.shape[1]
    compute = torch.promote_types(q1.dtype, torch.float32)
    scale = q1.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k1, k2, v = (t.repeat_interleave(group, 1) for t in (k1, k2, v))
    positions, keys = (torch.arange(t.shape[2], device=q1.device) for t in (q1, k1))
    distance = (positions + k1.shape[2] - q1.shape[2])[:, None] - keys[None, :]
    near, far = (q1 @ k1.transpose(2, 3)).to(compute), (q2 @ k2.transpose(2, 3)).to(compute)
    s = torch.where(distance >= threshold, far, near) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if causal:
        s = s.masked_fill(distance < 0, -torch.inf)
    lse = s.logsumexp(-1)
    if sinks is not None:  # one more key for each head, without a value
        lse = torch.logaddexp(lse, sinks.to(compute)[:, None].expand_as(lse))
    p = (s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    o = p.to(q1.dtype) @ v
    return (o, lse) if return_lse else o


# ------------------------------------------------------------------------------------------------------------- tiles


forward_kernel = TunedKernel(
    Launcher(_piecewise_forward_kernel, "_piecewise_forward_kernel", descriptors={1: "BN", 3: "BN", 4: "BN"}),
    tile_lists(
        sm80={
            128: [Config(bm=128, bn=32, warps=8, stages=2), Config(bm=128, bn=64, warps=8, stages=2, edge=2)],
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
dkdv_kernel = TunedKernel(
    Launcher(_piecewise_dkdv_kernel, "_piecewise_dkdv_kernel", descriptors={0: "BM", 2: "BM", 5: "BM"}, SUM=APART),
    DKDV_TILES,
)
dk_kernel, dv_kernel = (
    TunedKernel(Launcher(_piecewise_dkdv_kernel, name, descriptors={0: "BM", 2: "BM", 5: "BM"}, SUM=what), tiles)
    for name, what, tiles in (
        ("_piecewise_dk_kernel", ONLY_DK, DK_TILES),
        ("_piecewise_dv_kernel", ONLY_DV, DV_TILES),
    )
)


def _dq_tiles(*key: int) -> list[Config]:
    """Flash attention's but for the widest: two bands need more registers than that leaves."""
    return [config for config in DQ_TILES(*key) if config.bn < 128]


dq_kernel = TunedKernel(
    Launcher(_piecewise_dq_kernel, "_piecewise_dq_kernel", descriptors={1: "BN", 3: "BN", 4: "BN"}),
    _dq_tiles,
)
added_kernel, ordered_kernel = (
    TunedKernel(
        Launcher(
            _piecewise_dkdv_kernel, name, descriptors={0: "BM", 2: "BM", 5: "BM"}, zeroed=(6, 7, 8), SUM=how
        ),
        tiles,
    )
    for name, how, tiles in (
        ("_piecewise_added_kernel", ADDED, ADDED_TILES),
        ("_piecewise_ordered_kernel", ORDERED, ORDERED_TILES),
    )
)  # fmt: skip
KERNELS = Kernels(forward_kernel, dkdv_kernel, dk_kernel, dv_kernel, dq_kernel, added_kernel, ordered_kernel)


# --------------------------------------------------------------------------------------------------------- operators


def _problem(q1, k1, q2, k2, v, sinks, cu_q, cu_k, max_q, max_k, threshold, causal, scale, cap, layout):
    return Problem(
        pairs=((q1, k1), (q2, k2)), v=v, sinks=sinks, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k,
        threshold=threshold, right=0 if causal else NO_BOUND, scale=scale, cap=cap, layout=layout,
    )  # fmt: skip


@operator("piecewise_attention")
def _piecewise_op(  # the schema of a custom op has tensors and numbers only
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, sinks: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, max_q: int, max_k: int, threshold: int, causal: bool, scale: float, cap: float, layout: str,
    deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _problem(q1, k1, q2, k2, v, sinks, cu_q, cu_k, max_q, max_k, threshold, causal, scale, cap, layout)
    if backend == "torch":
        return _attention_torch.forward(problem)
    return _attention_launch.forward(problem, KERNELS)


@operator("piecewise_attention_backward")
def _piecewise_backward_op(  # as above
    do: Tensor, dlse: Tensor | None, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, threshold: int,
    causal: bool, scale: float, cap: float, layout: str, deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = _problem(q1, k1, q2, k2, v, sinks, cu_q, cu_k, max_q, max_k, threshold, causal, scale, cap, layout)
    (dq1, dk1, dq2, dk2, dv), dsinks = run_backward(
        problem, KERNELS, do, dlse, o, lse, deterministic=deterministic, backend=backend
    )
    return dq1, dk1, dq2, dk2, dv, q1.new_empty(0) if dsinks is None else dsinks


@_piecewise_op.register_fake
def _(q1, k1, q2, k2, v, sinks, cu_q, cu_k, max_q, max_k, threshold, causal, scale, cap, layout, *others):
    return fake_output(q1, v, layout)


@_piecewise_backward_op.register_fake
def _(do, dlse, q1, k1, q2, k2, v, o, lse, sinks, *options):
    dsinks = q1.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return *(t.new_empty(t.shape) for t in (q1, k1, q2, k2, v)), dsinks


def _setup(ctx, inputs, output):
    tensors, ctx.options = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the LSE usually gets no gradient


def _backward(ctx, do, dlse):
    q1, k1, q2, k2, v, sinks, cu_q, cu_k, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    *gradients, dsinks = _piecewise_backward_op(do, dlse, q1, k1, q2, k2, v, o, lse, sinks, cu_q, cu_k, *ctx.options)
    return *gradients, None if sinks is None else dsinks, *(None,) * 11


_piecewise_op.register_autograd(_backward, setup_context=_setup)


# ------------------------------------------------------------------------------------------------------------- public


@overload
def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    threshold: int,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
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
def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    threshold: int,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
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
def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    threshold: int,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
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


def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    threshold: int,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
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
    """Attention with scores of (q2, k2) at distances of at least `threshold` and of (q1, k1) below it -> q1's shape.

    q1, q2 [b, n, s, d]; k1, k2 [b, n_kv, s_k, d] and v [b, n_kv, s_k, dv]. layout, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k, softcap, sinks and deterministic are those of `flash_attention`.
    threshold: the distance is (s_k - s) + i - j, so a key after the query is near; causal masks it, and has no default.
    With causal, threshold 0 makes every key far, and a threshold of s_k or more makes every key near.
    softmax_scale: by default d^-0.5.
    return_lse: also return the log of the softmax's denominator, fp32 [b, n, s] ([n, t] for "tnd"), which has a gradient.
    A query without keys gives 0, and its head's sink or -inf for the LSE.
    Raises ValueError for a shape, dtype, device, stride, layout, head count or threshold that does not fit.
    """
    q1, k1, q2, k2, v = autocast_to(q1, k1, q2, k2, v)
    backend = choose_backend(q1, backend, lacks=lacking_head_dim(q1, v))
    require(isinstance(threshold, int) and threshold >= 0, f"threshold ({threshold}) must be an integer of at least 0")
    check_qkv(q1, k1, v, layout, backend, ("q1", "k1", "v"))
    check_qkv(q2, k2, v, layout, backend, ("q2", "k2", "v"))
    for attribute in ("shape", "dtype", "device"):
        check_same(attribute, [("q1", q1), ("q2", q2)])
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    cu_q, cu_k, max_q, max_k = check_packed(layout, *lengths, q1, k1)
    scale, cap, sinks = check_scale(q1, softmax_scale), check_softcap(softcap), check_sinks(sinks, q1, layout)
    threshold = min(threshold, max_q + max_k)  # no distance is larger, and kernels compute with 32 bits
    options = (max_q, max_k, threshold, causal, scale, cap, layout, deterministic, backend)
    o, lse = _piecewise_op(q1, k1, q2, k2, v, sinks, cu_q, cu_k, *options)
    return (o, lse) if return_lse else o


def piecewise_attention_backward(
    do: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    threshold: int,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    layout: str = "bnsd",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of q1, k1, q2, k2, v and, if given, sinks, for an autograd function that calls `piecewise_attention`.

    do: the gradient of o. qkv: q1, k1, q2, k2 and v of the forward call, o and lse its outputs; the options are those of
    that call. The inputs are not checked again.
    """
    q1, k1, _, _, v = qkv
    backend = choose_backend(q1, backend, lacks=lacking_head_dim(q1, v))
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    cu_q, cu_k, max_q, max_k = check_packed(layout, *lengths, q1, k1)
    scale, sinks = check_scale(q1, softmax_scale), check_sinks(sinks, q1, layout)
    threshold = min(threshold, max_q + max_k)
    options = (max_q, max_k, threshold, causal, scale, float(softcap), layout, deterministic, backend)
    *gradients, dsinks = _piecewise_backward_op(do, None, *qkv, o, lse, sinks, cu_q, cu_k, *options)
    return tuple(gradients) if sinks is None else (*gradients, dsinks)
