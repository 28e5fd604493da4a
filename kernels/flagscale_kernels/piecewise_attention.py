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

import torch
from torch import Tensor

from flagscale_kernels._attention_torch import Band, attention_backward, attention_forward
from flagscale_kernels._bands import attend_band, dkdv_band, dq_band, load_rows, program, store_rows
from flagscale_kernels._checks import check_same, choose_backend, require
from flagscale_kernels._layouts import LAYOUTS, PACKED, as_bnsd, check_layout, sizes, strides
from flagscale_kernels._operators import autocast_to, operator
from flagscale_kernels._triton import cdiv, tl, triton
from flagscale_kernels._tuning import Config, TunedKernel, length_class, tile_lists
from flagscale_kernels.flash_attention import (
    LOG2E,
    check_qkv,
    check_scale,
    has_wide_strides,
    lacking_head_dim,
    launch_delta,
    tile_options,
)

PIECEWISE_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != PACKED)


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
) -> Tensor:
    """The definition in plain PyTorch, with all scores in memory: [b, n, s, d] -> o."""
    group = q1.shape[1] // k1.shape[1]
    compute = torch.promote_types(q1.dtype, torch.float32)
    scale = q1.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k1, k2, v = (t.repeat_interleave(group, 1) for t in (k1, k2, v))
    positions, keys = (torch.arange(t.shape[2], device=q1.device) for t in (q1, k1))
    distance = (positions + k1.shape[2] - q1.shape[2])[:, None] - keys[None, :]
    near, far = (q1 @ k1.transpose(2, 3)).to(compute), (q2 @ k2.transpose(2, 3)).to(compute)
    s = torch.where(distance >= threshold, far, near) * scale
    if causal:
        s = s.masked_fill(distance < 0, -torch.inf)
    p = s.softmax(-1)
    if causal:
        p = p.masked_fill((distance < 0).all(-1)[:, None], 0.0)
    return p.to(q1.dtype) @ v


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["threshold", "seq_q", "seq_k"])
def _piecewise_forward_kernel(
    Q1, K1, Q2, K2, V, O, LSE, qk_scale, threshold, seq_q, seq_k, heads, group,
    q1_batch_stride, q1_head_stride, q1_seq_stride, k1_batch_stride, k1_head_stride, k1_seq_stride,
    q2_batch_stride, q2_head_stride, q2_seq_stride, k2_batch_stride, k2_head_stride, k2_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, o_batch_stride, o_head_stride, o_seq_stride,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    if WIDE:
        q1_seq_stride = tl.cast(q1_seq_stride, tl.int64)
        k1_seq_stride = tl.cast(k1_seq_stride, tl.int64)
        q2_seq_stride = tl.cast(q2_seq_stride, tl.int64)
        k2_seq_stride = tl.cast(k2_seq_stride, tl.int64)
        v_seq_stride = tl.cast(v_seq_stride, tl.int64)
        o_seq_stride = tl.cast(o_seq_stride, tl.int64)
    tile, head, batch = program(seq_q, BM, heads)
    first = ((seq_q + BM - 1) // BM - 1 - tile) * BM
    kv_head = head // group
    Q1 += batch * q1_batch_stride + head * q1_head_stride
    Q2 += batch * q2_batch_stride + head * q2_head_stride
    K1 += batch * k1_batch_stride + kv_head * k1_head_stride
    K2 += batch * k2_batch_stride + kv_head * k2_head_stride
    V += batch * v_batch_stride + kv_head * v_head_stride
    rows = first + tl.arange(0, BM)
    offset = seq_k - seq_q
    first_pos = first + offset
    last_pos = tl.minimum(first + BM, seq_q) - 1 + offset
    acc = tl.zeros([BM, BD], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    q = load_rows(Q2, first, seq_q, q2_seq_stride, D, BM, BD, True)
    acc, l, m = attend_band(
        acc, l, m, q, K2, V, k2_seq_stride, v_seq_stride, rows + offset, first_pos, last_pos, seq_k, qk_scale, 0.0,
        0, -threshold, False, True, False, D, BN, BD, PRECISION, EDGE,
    )  # fmt: skip
    q = load_rows(Q1, first, seq_q, q1_seq_stride, D, BM, BD, True)
    acc, l, m = attend_band(
        acc, l, m, q, K1, V, k1_seq_stride, v_seq_stride, rows + offset, first_pos, last_pos, seq_k, qk_scale, 0.0,
        threshold - 1, 0, True, CAUSAL, False, D, BN, BD, PRECISION, EDGE,
    )  # fmt: skip
    safe_l = tl.where(l == 0.0, 1.0, l)
    store_rows(O + batch * o_batch_stride + head * o_head_stride, first, seq_q, o_seq_stride, acc / safe_l[:, None],
               D, BM, BD)  # fmt: skip
    row = (batch * heads + head) * seq_q
    tl.store(LSE + row + rows, (m + tl.log2(safe_l)) * 0.6931471805599453, mask=rows < seq_q)


@triton.jit(do_not_specialize=["threshold", "seq_q", "seq_k"])
def _piecewise_dkdv_kernel(
    Q1, K1, Q2, K2, V, DO, DK1, DK2, DV, LSE, DELTA, softmax_scale, qk_scale, threshold, seq_q, seq_k, heads, group,
    q1_batch_stride, q1_head_stride, q1_seq_stride, k1_batch_stride, k1_head_stride, k1_seq_stride,
    q2_batch_stride, q2_head_stride, q2_seq_stride, k2_batch_stride, k2_head_stride, k2_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    dk_batch_stride, dk_head_stride, dk_seq_stride,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    if WIDE:
        q1_seq_stride = tl.cast(q1_seq_stride, tl.int64)
        k1_seq_stride = tl.cast(k1_seq_stride, tl.int64)
        q2_seq_stride = tl.cast(q2_seq_stride, tl.int64)
        k2_seq_stride = tl.cast(k2_seq_stride, tl.int64)
        v_seq_stride = tl.cast(v_seq_stride, tl.int64)
        do_seq_stride = tl.cast(do_seq_stride, tl.int64)
        dk_seq_stride = tl.cast(dk_seq_stride, tl.int64)
    tile, kv_head, batch = program(seq_k, BN, heads // group)
    first = tile * BN
    offset = seq_k - seq_q
    Q1 += batch * q1_batch_stride
    Q2 += batch * q2_batch_stride
    DO += batch * do_batch_stride
    row = batch * heads * seq_q
    output = batch * dk_batch_stride + kv_head * dk_head_stride
    v = load_rows(V + batch * v_batch_stride + kv_head * v_head_stride, first, seq_k, v_seq_stride, D, BN, BD, True)
    dv = tl.zeros([BN, BD], tl.float32)
    dk = tl.zeros([BN, BD], tl.float32)
    k = load_rows(K1 + batch * k1_batch_stride + kv_head * k1_head_stride, first, seq_k, k1_seq_stride, D, BN, BD, True)
    dk, dv = dkdv_band(
        dk, dv, k, v, Q1, DO, LSE + row, DELTA + row, LSE, q1_head_stride, q1_seq_stride, do_head_stride, do_seq_stride,
        seq_q, kv_head * group, group, first, offset, seq_q, seq_k, qk_scale, 1.0, threshold - 1, 0,
        True, CAUSAL, False, D, BM, BN, BD, PRECISION, EDGE,
    )  # fmt: skip
    store_rows(DK1 + output, first, seq_k, dk_seq_stride, dk * softmax_scale, D, BN, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    k = load_rows(K2 + batch * k2_batch_stride + kv_head * k2_head_stride, first, seq_k, k2_seq_stride, D, BN, BD, True)
    dk, dv = dkdv_band(
        dk, dv, k, v, Q2, DO, LSE + row, DELTA + row, LSE, q2_head_stride, q2_seq_stride, do_head_stride, do_seq_stride,
        seq_q, kv_head * group, group, first, offset, seq_q, seq_k, qk_scale, 1.0, 0, -threshold,
        False, True, False, D, BM, BN, BD, PRECISION, EDGE,
    )  # fmt: skip
    store_rows(DK2 + output, first, seq_k, dk_seq_stride, dk * softmax_scale, D, BN, BD)
    store_rows(DV + output, first, seq_k, dk_seq_stride, dv, D, BN, BD)


@triton.jit(do_not_specialize=["threshold", "seq_q", "seq_k"])
def _piecewise_dq_kernel(
    Q1, K1, Q2, K2, V, DO, DQ1, DQ2, LSE, DELTA, softmax_scale, qk_scale, threshold, seq_q, seq_k, heads, group,
    q1_batch_stride, q1_head_stride, q1_seq_stride, k1_batch_stride, k1_head_stride, k1_seq_stride,
    q2_batch_stride, q2_head_stride, q2_seq_stride, k2_batch_stride, k2_head_stride, k2_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    dq_batch_stride, dq_head_stride, dq_seq_stride,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    if WIDE:
        q1_seq_stride = tl.cast(q1_seq_stride, tl.int64)
        k1_seq_stride = tl.cast(k1_seq_stride, tl.int64)
        q2_seq_stride = tl.cast(q2_seq_stride, tl.int64)
        k2_seq_stride = tl.cast(k2_seq_stride, tl.int64)
        v_seq_stride = tl.cast(v_seq_stride, tl.int64)
        do_seq_stride = tl.cast(do_seq_stride, tl.int64)
        dq_seq_stride = tl.cast(dq_seq_stride, tl.int64)
    tile, head, batch = program(seq_q, BM, heads)
    first = ((seq_q + BM - 1) // BM - 1 - tile) * BM
    kv_head = head // group
    Q1 += batch * q1_batch_stride + head * q1_head_stride
    Q2 += batch * q2_batch_stride + head * q2_head_stride
    K1 += batch * k1_batch_stride + kv_head * k1_head_stride
    K2 += batch * k2_batch_stride + kv_head * k2_head_stride
    V += batch * v_batch_stride + kv_head * v_head_stride
    rows = first + tl.arange(0, BM)
    offset = seq_k - seq_q
    first_pos = first + offset
    last_pos = tl.minimum(first + BM, seq_q) - 1 + offset
    row = (batch * heads + head) * seq_q
    output = batch * dq_batch_stride + head * dq_head_stride
    do = load_rows(DO + batch * do_batch_stride + head * do_head_stride, first, seq_q, do_seq_stride, D, BM, BD, True)
    lse = tl.load(LSE + row + rows, mask=rows < seq_q, other=float("inf"))
    delta = tl.load(DELTA + row + rows, mask=rows < seq_q, other=0.0)
    q = load_rows(Q2, first, seq_q, q2_seq_stride, D, BM, BD, True)
    dq = dq_band(
        tl.zeros([BM, BD], tl.float32), q, do, lse, delta, K2, V, k2_seq_stride, v_seq_stride, rows + offset, first_pos,
        last_pos, seq_k, qk_scale, 0.0, 0, -threshold, False, True, False, D, BN, BD, PRECISION, EDGE,
    )  # fmt: skip
    store_rows(DQ2 + output, first, seq_q, dq_seq_stride, dq * softmax_scale, D, BM, BD)
    q = load_rows(Q1, first, seq_q, q1_seq_stride, D, BM, BD, True)
    dq = dq_band(
        tl.zeros([BM, BD], tl.float32), q, do, lse, delta, K1, V, k1_seq_stride, v_seq_stride, rows + offset, first_pos,
        last_pos, seq_k, qk_scale, 0.0, threshold - 1, 0, True, CAUSAL, False, D, BN, BD, PRECISION, EDGE,
    )  # fmt: skip
    store_rows(DQ1 + output, first, seq_q, dq_seq_stride, dq * softmax_scale, D, BM, BD)


# ---------------------------------------------------------------------------------------------------------- launchers


forward_kernel = TunedKernel(
    _piecewise_forward_kernel,
    tile_lists(
        sm80={
            128: [Config(bm=128, bn=32, warps=8, stages=2), Config(bm=128, bn=64, warps=8, stages=2, edge=2)],
            256: [Config(bm=64, bn=64, warps=8, stages=1)],
        },
        sm90={
            128: [
                Config(bm=128, bn=64, warps=8, stages=3, edge=2),
                Config(bm=128, bn=128, warps=8, stages=2, edge=2),
                Config(bm=64, bn=64, warps=4, stages=3, edge=2),
            ],
            256: [Config(bm=128, bn=32, warps=8, stages=2)],
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
    _piecewise_dkdv_kernel,
    tile_lists(
        sm80={
            64: [Config(bm=64, bn=128, warps=8, stages=2), Config(bm=64, bn=64, warps=4, stages=2)],
            128: [Config(bm=64, bn=64, warps=4, stages=2), Config(bm=32, bn=64, warps=8, stages=2)],
            256: [Config(bm=32, bn=64, warps=8, stages=1)],
        },
        sm90={
            64: [Config(bm=64, bn=128, warps=8, stages=2), Config(bm=64, bn=64, warps=4, stages=2)],
            128: [Config(bm=32, bn=128, warps=8, stages=2), Config(bm=64, bn=128, warps=8, stages=2)],
            256: [Config(bm=32, bn=64, warps=8, stages=1)],
        },
        other={
            128: [Config(bm=32, bn=64, warps=8, stages=2)],
            256: [Config(bm=32, bn=32, warps=4, stages=1)],
        },
        float32=Config(bm=32, bn=32, warps=4, stages=1),
        interpreter=Config(bm=32, bn=64),
    ),
)
dq_kernel = TunedKernel(
    _piecewise_dq_kernel,
    tile_lists(
        sm80={
            64: [Config(bm=128, bn=64, warps=8, stages=2, edge=2), Config(bm=64, bn=64, warps=4, stages=2)],
            128: [Config(bm=64, bn=64, warps=4, stages=2, edge=2), Config(bm=128, bn=64, warps=8, stages=2, edge=2)],
            256: [Config(bm=64, bn=32, warps=8, stages=1)],
        },
        sm90={
            128: [
                Config(bm=128, bn=64, warps=8, stages=2, edge=2),
                Config(bm=64, bn=64, warps=4, stages=2, edge=2),
            ],
            256: [Config(bm=128, bn=32, warps=8, stages=1)],
        },
        other={
            128: [Config(bm=64, bn=32, warps=8, stages=2)],
            256: [Config(bm=64, bn=32, warps=8, stages=1)],
        },
        float32=Config(bm=32, bn=32, warps=4, stages=1),
        interpreter=Config(bm=64, bn=32),
    ),
)


def _sizes(q, k, layout):
    """(batch, query heads, KV heads, queries, keys)."""
    (b, heads, seq_q), (_, kv_heads, seq_k) = sizes(q, layout), sizes(k, layout)
    return b, heads, kv_heads, seq_q, seq_k


def _constants(tensors, causal, seq_k, layout):
    q = tensors[0]
    constants = {"CAUSAL": causal, "WIDE": has_wide_strides(tensors, layout), **tile_options(q)}
    key = (causal, length_class(seq_k))
    return constants, {"block_d": constants["BD"], "element_bytes": q.element_size(), "key": key}


def _clip(threshold, seq_q, seq_k):
    """The threshold, or seq_q + seq_k where that is less: no distance is larger, and the kernel computes in 32 bits."""
    return min(threshold, seq_q + seq_k)


def _forward_triton(q1, k1, q2, k2, v, threshold, causal, scale, layout):
    b, heads, kv_heads, seq_q, seq_k = _sizes(q1, k1, layout)
    o = torch.empty(q1.shape, dtype=q1.dtype, device=q1.device)
    lse = torch.empty((b, heads, seq_q), dtype=torch.float32, device=q1.device)
    constants, options = _constants((q1, k1, q2, k2, v, o), causal, seq_k, layout)
    if o.numel():
        forward_kernel.launch(
            lambda c: (cdiv(seq_q, c.bm) * heads * b,),
            q1, k1, q2, k2, v, o, lse, scale * LOG2E, _clip(threshold, seq_q, seq_k), seq_q, seq_k, heads, heads // kv_heads,
            *(stride for t in (q1, k1, q2, k2, v, o) for stride in strides(t, layout)), **options, **constants,
        )  # fmt: skip
    return o, lse


def _backward_triton(do, q1, k1, q2, k2, v, o, lse, threshold, causal, scale, layout):
    b, heads, kv_heads, seq_q, seq_k = _sizes(q1, k1, layout)
    dq1, dk1, dq2, dk2, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q1, k1, q2, k2, v))
    if q1.numel() == 0 or k1.numel() == 0:
        return tuple(t.zero_() for t in (dq1, dk1, dq2, dk2, dv))
    constants, options = _constants((q1, k1, q2, k2, v, do, dq1, dk1), causal, seq_k, layout)
    lse2, delta = launch_delta(o, do, None, lse, None, b, seq_q, layout)
    tail = (
        lse2, delta, scale, scale * LOG2E, _clip(threshold, seq_q, seq_k), seq_q, seq_k, heads, heads // kv_heads,
        *(stride for t in (q1, k1, q2, k2, v, do) for stride in strides(t, layout)),
    )  # fmt: skip
    dkdv_kernel.launch(
        lambda c: (cdiv(seq_k, c.bn) * kv_heads * b,),
        q1, k1, q2, k2, v, do, dk1, dk2, dv, *tail, *strides(dk1, layout), **options, **constants,
    )  # fmt: skip
    dq_kernel.launch(
        lambda c: (cdiv(seq_q, c.bm) * heads * b,),
        q1, k1, q2, k2, v, do, dq1, dq2, *tail, *strides(dq1, layout), **options, **constants,
    )  # fmt: skip
    return dq1, dk1, dq2, dk2, dv


# ---------------------------------------------------------------------------------------------------------- CPU path


def _bands(q1, k1, q2, k2, threshold, causal, layout):
    q1, k1, q2, k2 = (as_bnsd(t, layout) for t in (q1, k1, q2, k2))
    return [Band(q2, k2, None, -threshold), Band(q1, k1, threshold - 1, 0 if causal else None)]


def _forward_torch(q1, k1, q2, k2, v, threshold, causal, scale, layout):
    o = torch.zeros(q1.shape, dtype=q1.dtype, device=q1.device)
    bands = _bands(q1, k1, q2, k2, threshold, causal, layout)
    out, lse = attention_forward(bands, as_bnsd(v, layout), scale, None)
    as_bnsd(o, layout).copy_(out)
    return o, lse


def _backward_torch(do, q1, k1, q2, k2, v, o, lse, threshold, causal, scale, layout):
    bands = _bands(q1, k1, q2, k2, threshold, causal, layout)
    views = [as_bnsd(t, layout) for t in (v, o, do)]
    [(dq2, dk2), (dq1, dk1)], dv = attention_backward(bands, *views, lse, None, scale, None)
    gradients = []
    for gradient, like in ((dq1, q1), (dk1, k1), (dq2, q2), (dk2, k2), (dv, v)):
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        as_bnsd(out, layout).copy_(gradient)
        gradients.append(out)
    return tuple(gradients)


# --------------------------------------------------------------------------------------------------------- custom ops


@operator("piecewise_attention")
def _piecewise_op(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor,
    threshold: int, causal: bool, scale: float, layout: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = _forward_torch if backend == "torch" else _forward_triton
    return run(q1, k1, q2, k2, v, threshold, causal, scale, layout)


@operator("piecewise_attention_backward")
def _piecewise_backward_op(
    do: Tensor, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    threshold: int, causal: bool, scale: float, layout: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    do = do if do.stride(-1) == 1 else do.contiguous()
    o = o if o.stride(-1) == 1 else o.contiguous()
    lse = lse.contiguous()
    run = _backward_torch if backend == "torch" else _backward_triton
    return run(do, q1, k1, q2, k2, v, o, lse, threshold, causal, scale, layout)


@_piecewise_op.register_fake
def _(q1, k1, q2, k2, v, threshold, causal, scale, layout, backend):
    b, heads, _, seq_q, _ = _sizes(q1, k1, layout)
    lse_dtype = torch.promote_types(q1.dtype, torch.float32)
    return q1.new_empty(q1.shape), q1.new_empty((b, heads, seq_q), dtype=lse_dtype)


@_piecewise_backward_op.register_fake
def _(do, q1, k1, q2, k2, v, o, lse, threshold, causal, scale, layout, backend):
    return tuple(t.new_empty(t.shape) for t in (q1, k1, q2, k2, v))


def _setup(ctx, inputs, output):
    tensors, ctx.options = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, do, _):
    return *_piecewise_backward_op(do, *ctx.saved_tensors, *ctx.options), *(None,) * 5


_piecewise_op.register_autograd(_backward, setup_context=_setup)


# ------------------------------------------------------------------------------------------------------------- public


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
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with scores of (q2, k2) at distances of at least `threshold` and of (q1, k1) below it -> q1's shape.

    q1, q2 [b, n, s, d]; k1, k2, v [b, n_kv, s_k, d], with the dimensions in the order of `layout`: "bnsd", "sbnd" or
    "bsnd". Strides are free, but the last must be 1. n_kv divides n.
    threshold: the distance is (s_k - s) + i - j, so a key after the query is near; causal masks it. With causal,
    threshold 0 makes every key far, and a threshold of s_k or more makes every key near.
    softmax_scale: by default d^-0.5.
    return_lse: also return the log of the softmax's denominator, fp32 [b, n, s], which has no gradient.
    A query without keys gives 0. The backward is deterministic.
    Raises ValueError for a shape, dtype, device, stride, layout, head count or threshold that does not fit.
    """
    q1, k1, q2, k2, v = autocast_to(q1, k1, q2, k2, v)
    backend = choose_backend(q1, backend, lacks=lacking_head_dim(q1))
    check_layout(layout, (), PIECEWISE_LAYOUTS)
    require(isinstance(threshold, int) and threshold >= 0, f"threshold ({threshold}) must be an integer of at least 0")
    check_qkv(q1, k1, v, layout, backend, ("q1", "k1", "v"))
    check_qkv(q2, k2, v, layout, backend, ("q2", "k2", "v"))
    for attribute in ("shape", "dtype", "device"):
        check_same(attribute, [("q1", q1), ("q2", q2)])
    scale = check_scale(q1, softmax_scale)
    o, lse = _piecewise_op(q1, k1, q2, k2, v, threshold, causal, scale, layout, backend)
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q1, k1, q2, k2 and v, for an autograd function that calls `piecewise_attention` itself.

    do: the gradient of o. qkv: q1, k1, q2, k2 and v of the forward call, o and lse its outputs; the options are those of
    that call. The inputs are not checked again.
    """
    backend = choose_backend(qkv[0], backend, lacks=lacking_head_dim(qkv[0]))
    scale = check_scale(qkv[0], softmax_scale)
    return _piecewise_backward_op(do, *qkv, o, lse, threshold, causal, scale, layout, backend)
