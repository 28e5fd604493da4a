r"""Flash attention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691), one band of `_bands.py`.

    o_i = sum_j softmax_j(scale q_i . k_j - slope |p - j|) v_j,    p = i + seq_k - seq_q,    j in the band of p

`_bands.py` has the maths of the online softmax and of its gradient. There are three kernels. The forward and the dQ
kernel run one program per tile of queries. The dK and dV kernel runs one program per tile of keys of a KV head, which
sums over the query heads of its group in registers. One program writes each element of a gradient, in a fixed order,
so the backward is deterministic. It computes S and dP twice: 7 products, where atomics would need 5. Nothing of size
[seq_q, seq_k] is stored.
"""

import torch
from torch import Tensor

from flagscale_kernels import _hopper_attention
from flagscale_kernels._attention_torch import Band, attention_backward, attention_forward
from flagscale_kernels._bands import attend_band, delta_kernel, dkdv_band, dq_band, load_rows, program, store_rows
from flagscale_kernels._checks import check_float, check_same, choose_backend, require
from flagscale_kernels._layouts import PACKED, as_bnsd, check_layout, from_bnsd, sizes, strides
from flagscale_kernels._operators import autocast_to, operator
from flagscale_kernels._rivals import Rivalry
from flagscale_kernels._triton import cdiv, next_power_of_2, tl, triton
from flagscale_kernels._tuning import Config, TunedKernel, length_class, tile_lists

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
DELTA_ROWS = 64
LARGEST_TILE = 256  # rows
NO_BOUND = -1
MAX_LENGTH = 1 << 30  # positions and the edges of tiles are 32-bit numbers


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, with all scores in memory: [b, n, s, d] -> (o, lse)."""
    left, right = _bounds(causal, window)
    group = q.shape[1] // k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q @ k.transpose(2, 3)).to(compute) * scale
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
    p = s.softmax(-1).masked_fill(~allowed.any(-1)[:, None], 0.0)
    return p.to(q.dtype) @ v, s.logsumexp(-1)


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _sequence(CU_SEQLENS, batch, length, PACKED: tl.constexpr):
    """(batch index, first token, length) of a batch entry. The entries of a pack are sequences of batch index 0."""
    start = batch * 0
    if PACKED:
        start = tl.load(CU_SEQLENS + batch).to(tl.int64)
        length = (tl.load(CU_SEQLENS + batch + 1) - start).to(tl.int32)
        batch = batch * 0
    return batch, start, length


@triton.jit(do_not_specialize=["seq_q", "seq_k", "left", "right"])
def _flash_forward_kernel(
    Q, K, V, O, LSE, SLOPES, CU_SEQLENS_Q, CU_SEQLENS_K, qk_scale, inverse_scale, seq_q, seq_k, left, right, heads, group,
    q_batch_stride, q_head_stride, q_seq_stride, k_batch_stride, k_head_stride, k_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, o_batch_stride, o_head_stride, o_seq_stride,
    lse_batch_stride, lse_head_stride, slope_batch_stride,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    if WIDE:
        q_seq_stride = tl.cast(q_seq_stride, tl.int64)
        k_seq_stride = tl.cast(k_seq_stride, tl.int64)
        v_seq_stride = tl.cast(v_seq_stride, tl.int64)
        o_seq_stride = tl.cast(o_seq_stride, tl.int64)
    # Last tiles first: under a causal mask they have the most keys.
    tile, head, entry = program(seq_q, BM, heads)
    first = ((seq_q + BM - 1) // BM - 1 - tile) * BM
    batch, q_start, seq_q = _sequence(CU_SEQLENS_Q, entry, seq_q, PACKED)
    batch, k_start, seq_k = _sequence(CU_SEQLENS_K, entry, seq_k, PACKED)
    if first < seq_q:
        Q += batch * q_batch_stride + head * q_head_stride + q_start * q_seq_stride
        K += batch * k_batch_stride + (head // group) * k_head_stride + k_start * k_seq_stride
        V += batch * v_batch_stride + (head // group) * v_head_stride + k_start * v_seq_stride
        O += batch * o_batch_stride + head * o_head_stride + q_start * o_seq_stride
        LSE += batch * lse_batch_stride + head * lse_head_stride + q_start
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(SLOPES + entry * slope_batch_stride + head).to(tl.float32) * inverse_scale
        rows = first + tl.arange(0, BM)
        offset = seq_k - seq_q
        acc = tl.zeros([BM, BD], tl.float32)
        l = tl.zeros([BM], tl.float32)
        m = tl.full([BM], float("-inf"), tl.float32)
        q = load_rows(Q, first, seq_q, q_seq_stride, D, BM, BD, True)
        acc, l, m = attend_band(
            acc, l, m, q, K, V, k_seq_stride, v_seq_stride, rows + offset, first + offset,
            tl.minimum(first + BM, seq_q) - 1 + offset, seq_k, qk_scale, slope, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_ALIBI, D, BN, BD, PRECISION, EDGE,
        )  # fmt: skip
        safe_l = tl.where(l == 0.0, 1.0, l)  # a row without keys gives 0, and -inf for the LSE
        store_rows(O, first, seq_q, o_seq_stride, acc / safe_l[:, None], D, BM, BD)
        lse = (m + tl.log2(safe_l)) * 0.6931471805599453
        tl.store(LSE + rows, lse, mask=rows < seq_q)


@triton.jit(do_not_specialize=["seq_q", "seq_k", "left", "right"])
def _flash_dkdv_kernel(
    Q, K, V, DO, DK, DV, LSE, DELTA, SLOPES, CU_SEQLENS_Q, CU_SEQLENS_K, softmax_scale, qk_scale, inverse_scale,
    seq_q, seq_k, left, right, heads, group,
    q_batch_stride, q_head_stride, q_seq_stride, k_batch_stride, k_head_stride, k_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    dk_batch_stride, dk_head_stride, dk_seq_stride, dv_batch_stride, dv_head_stride, dv_seq_stride,
    lse_batch_stride, lse_head_stride, slope_batch_stride,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    if WIDE:
        q_seq_stride = tl.cast(q_seq_stride, tl.int64)
        k_seq_stride = tl.cast(k_seq_stride, tl.int64)
        v_seq_stride = tl.cast(v_seq_stride, tl.int64)
        do_seq_stride = tl.cast(do_seq_stride, tl.int64)
        dk_seq_stride = tl.cast(dk_seq_stride, tl.int64)
        dv_seq_stride = tl.cast(dv_seq_stride, tl.int64)
    tile, kv_head, entry = program(seq_k, BN, heads // group)
    first = tile * BN
    batch, q_start, seq_q = _sequence(CU_SEQLENS_Q, entry, seq_q, PACKED)
    batch, k_start, seq_k = _sequence(CU_SEQLENS_K, entry, seq_k, PACKED)
    if first < seq_k:
        K += batch * k_batch_stride + kv_head * k_head_stride + k_start * k_seq_stride
        V += batch * v_batch_stride + kv_head * v_head_stride + k_start * v_seq_stride
        DK += batch * dk_batch_stride + kv_head * dk_head_stride + k_start * dk_seq_stride
        DV += batch * dv_batch_stride + kv_head * dv_head_stride + k_start * dv_seq_stride
        Q += batch * q_batch_stride + q_start * q_seq_stride
        DO += batch * do_batch_stride + q_start * do_seq_stride
        statistics = batch * lse_batch_stride + q_start
        k = load_rows(K, first, seq_k, k_seq_stride, D, BN, BD, True)
        v = load_rows(V, first, seq_k, v_seq_stride, D, BN, BD, True)
        dk = tl.zeros([BN, BD], tl.float32)
        dv = tl.zeros([BN, BD], tl.float32)
        dk, dv = dkdv_band(
            dk, dv, k, v, Q, DO, LSE + statistics, DELTA + statistics, SLOPES + entry * slope_batch_stride,
            q_head_stride, q_seq_stride, do_head_stride, do_seq_stride, lse_head_stride, kv_head * group, group, first,
            seq_k - seq_q, seq_q, seq_k, qk_scale, inverse_scale, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_ALIBI, D, BM, BN, BD, PRECISION, EDGE,
        )  # fmt: skip
        store_rows(DK, first, seq_k, dk_seq_stride, dk * softmax_scale, D, BN, BD)
        store_rows(DV, first, seq_k, dv_seq_stride, dv, D, BN, BD)


@triton.jit(do_not_specialize=["seq_q", "seq_k", "left", "right"])
def _flash_dq_kernel(
    Q, K, V, DO, DQ, LSE, DELTA, SLOPES, CU_SEQLENS_Q, CU_SEQLENS_K, softmax_scale, qk_scale, inverse_scale,
    seq_q, seq_k, left, right, heads, group,
    q_batch_stride, q_head_stride, q_seq_stride, k_batch_stride, k_head_stride, k_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    dq_batch_stride, dq_head_stride, dq_seq_stride, lse_batch_stride, lse_head_stride, slope_batch_stride,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    if WIDE:
        q_seq_stride = tl.cast(q_seq_stride, tl.int64)
        k_seq_stride = tl.cast(k_seq_stride, tl.int64)
        v_seq_stride = tl.cast(v_seq_stride, tl.int64)
        do_seq_stride = tl.cast(do_seq_stride, tl.int64)
        dq_seq_stride = tl.cast(dq_seq_stride, tl.int64)
    tile, head, entry = program(seq_q, BM, heads)
    first = ((seq_q + BM - 1) // BM - 1 - tile) * BM
    batch, q_start, seq_q = _sequence(CU_SEQLENS_Q, entry, seq_q, PACKED)
    batch, k_start, seq_k = _sequence(CU_SEQLENS_K, entry, seq_k, PACKED)
    if first < seq_q:
        Q += batch * q_batch_stride + head * q_head_stride + q_start * q_seq_stride
        K += batch * k_batch_stride + (head // group) * k_head_stride + k_start * k_seq_stride
        V += batch * v_batch_stride + (head // group) * v_head_stride + k_start * v_seq_stride
        DO += batch * do_batch_stride + head * do_head_stride + q_start * do_seq_stride
        DQ += batch * dq_batch_stride + head * dq_head_stride + q_start * dq_seq_stride
        row = batch * lse_batch_stride + head * lse_head_stride + q_start
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(SLOPES + entry * slope_batch_stride + head).to(tl.float32) * inverse_scale
        rows = first + tl.arange(0, BM)
        offset = seq_k - seq_q
        q = load_rows(Q, first, seq_q, q_seq_stride, D, BM, BD, True)
        do = load_rows(DO, first, seq_q, do_seq_stride, D, BM, BD, True)
        lse = tl.load(LSE + row + rows, mask=rows < seq_q, other=float("inf"))
        delta = tl.load(DELTA + row + rows, mask=rows < seq_q, other=0.0)
        dq = dq_band(
            tl.zeros([BM, BD], tl.float32), q, do, lse, delta, K, V, k_seq_stride, v_seq_stride, rows + offset,
            first + offset, tl.minimum(first + BM, seq_q) - 1 + offset, seq_k, qk_scale, slope, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_ALIBI, D, BN, BD, PRECISION, EDGE,
        )  # fmt: skip
        store_rows(DQ, first, seq_q, dq_seq_stride, dq * softmax_scale, D, BM, BD)


# ---------------------------------------------------------------------------------------------------------- launchers


forward_kernel = TunedKernel(
    _flash_forward_kernel,
    tile_lists(
        sm80={
            128: [Config(bm=128, bn=64, warps=8, stages=3, edge=3), Config(bm=128, bn=32, warps=8, stages=3)],
            256: [Config(bm=64, bn=64, warps=8, stages=1)],
        },
        sm90={
            128: [
                Config(bm=128, bn=128, warps=8, stages=2, edge=2),
                Config(bm=128, bn=64, warps=8, stages=3, edge=2),
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
    _flash_dkdv_kernel,
    tile_lists(
        sm80={
            64: [Config(bm=64, bn=128, warps=8, stages=2), Config(bm=64, bn=64, warps=4, stages=2)],
            128: [Config(bm=64, bn=64, warps=4, stages=2), Config(bm=64, bn=128, warps=8, stages=2)],
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
    _flash_dq_kernel,
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


def tile_options(q: Tensor) -> dict:
    """The constants that q's dtype and head dimension give every attention kernel."""
    d = q.shape[-1]
    # fp32 is for tests: exact products instead of tf32, which has a 10-bit mantissa.
    return {"PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "D": d, "BD": max(16, next_power_of_2(d))}


LOG2E = 1.4426950408889634
hopper_forward = Rivalry("flash attention's forward for Hopper in Gluon")


def launch_delta(o, do, dlse, lse, cu_q, entries, max_q, layout):
    """(LSE in base 2, delta), each of the LSE's shape: the numbers per query that the backward reads."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    d = o.shape[-1]
    heads = lse.shape[-2]
    delta_kernel[(cdiv(max_q, DELTA_ROWS) * heads * entries,)](
        o, do, lse, lse if dlse is None else dlse, lse2, delta, lse if cu_q is None else cu_q, max_q, heads,
        *strides(o, layout), *strides(do, layout), lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2),
        HAS_DLSE=dlse is not None, PACKED=cu_q is not None, WIDE=has_wide_strides((o, do), layout), D=d,
         BM=DELTA_ROWS, BD=max(16, next_power_of_2(d)),
        num_warps=4,
    )  # fmt: skip
    return lse2, delta


def has_wide_strides(tensors, layout):
    """Whether an offset inside a tile needs 64 bits: then a tile's offsets take twice the registers."""
    return any(strides(t, layout)[2] * LARGEST_TILE >= 1 << 31 for t in tensors)


def _common(tensors, slopes, cu_q, left, right, layout):
    """What the three kernels share: (constants, launch options, batch stride of the slopes, heads, KV heads)."""
    q, k = tensors[:2]
    constants = {
        "WIDE": has_wide_strides(tensors, layout),
        "HAS_LEFT": left != NO_BOUND,
        "HAS_RIGHT": right != NO_BOUND,
        "HAS_ALIBI": slopes is not None,
        "PACKED": cu_q is not None,
        **tile_options(q),
    }
    _, kv_heads, seq_k = sizes(k, layout)
    key = (*(constants[name] for name in ("HAS_LEFT", "HAS_RIGHT", "HAS_ALIBI", "PACKED")), length_class(seq_k))
    options = {"block_d": constants["BD"], "element_bytes": q.element_size(), "key": key}
    slope_stride = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    return constants, options, slope_stride, sizes(q, layout)[1], kv_heads


def _forward_triton(q, k, v, slopes, cu_q, cu_k, max_q, max_k, scale, left, right, layout):
    entries = sizes(q, layout)[0] if cu_q is None else cu_q.shape[0] - 1
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(_lse_shape(q, layout), dtype=torch.float32, device=q.device)
    if cu_q is not None:
        # No program writes the tokens after the last sequence.
        o.zero_()
        lse.fill_(-torch.inf)
    constants, options, slope_stride, heads, kv_heads = _common((q, k, v, o), slopes, cu_q, left, right, layout)

    def plain():
        forward_kernel.launch(
            lambda c: (cdiv(max_q, c.bm) * heads * entries,),
            q, k, v, o, lse, lse if slopes is None else slopes, lse if cu_q is None else cu_q,
            lse if cu_k is None else cu_k, scale * LOG2E, 1.0 / scale, max_q, max_k, left, right, heads,
            heads // kv_heads,
            *(stride for t in (q, k, v, o) for stride in strides(t, layout)),
            lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2), slope_stride, **options, **constants,
        )  # fmt: skip

    if o.numel() and entries:
        dense = slopes is None and cu_q is None and left == NO_BOUND
        if dense and _hopper_attention.takes(q, k, v, layout, right=right, chip=forward_kernel.chip()):
            hopper_forward.launch(
                plain,
                lambda: _hopper_attention.forward(
                    q, k, v, o, lse, qk_scale=scale * LOG2E, causal=right == 0, layout=layout
                ),
                (o, lse),
                (q.dtype, q.shape[-1], right, length_class(max_k)),
            )
        else:
            plain()
    return o, lse


def _backward_triton(do, dlse, q, k, v, o, lse, slopes, cu_q, cu_k, max_q, max_k, scale, left, right, layout):
    entries = sizes(q, layout)[0] if cu_q is None else cu_q.shape[0] - 1
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if cu_q is not None:
        for t in (dq, dk, dv):
            t.zero_()
    if q.numel() == 0 or k.numel() == 0 or entries == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    tensors = (q, k, v, do, dq, dk, dv)
    constants, options, slope_stride, heads, kv_heads = _common(tensors, slopes, cu_q, left, right, layout)
    lse2, delta = launch_delta(o, do, dlse, lse, cu_q, entries, max_q, layout)
    statistics = (lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2), slope_stride)
    tail = (
        lse2, delta, lse if slopes is None else slopes, lse if cu_q is None else cu_q, lse if cu_k is None else cu_k,
        scale, scale * LOG2E, 1.0 / scale, max_q, max_k, left, right, heads,
            heads // kv_heads,
        *(stride for t in (q, k, v, do) for stride in strides(t, layout)),
    )  # fmt: skip
    dkdv_kernel.launch(
        lambda c: (cdiv(max_k, c.bn) * kv_heads * entries,),
        q, k, v, do, dk, dv, *tail, *strides(dk, layout), *strides(dv, layout), *statistics, **options, **constants,
    )  # fmt: skip
    dq_kernel.launch(
        lambda c: (cdiv(max_q, c.bm) * heads * entries,),
        q, k, v, do, dq, *tail, *strides(dq, layout), *statistics, **options, **constants,
    )  # fmt: skip
    return dq, dk, dv


# ---------------------------------------------------------------------------------------------------------- CPU path


def _sequences(cu_q, cu_k):
    """(slice of the queries, slice of the keys) of each sequence of a pack."""
    q, k = cu_q.tolist(), cu_k.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


def _bound(value):
    return None if value == NO_BOUND else value


def _forward_torch(q, k, v, slopes, cu_q, cu_k, max_q, max_k, scale, left, right, layout):
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    compute = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(_lse_shape(q, layout), -torch.inf, dtype=compute, device=q.device)
    whole = [(slice(None), slice(None))] if cu_q is None else _sequences(cu_q, cu_k)
    for i, (rows, keys) in enumerate(whole):
        views = [as_bnsd(t, layout)[:, :, part] for t, part in ((q, rows), (k, keys), (v, keys), (o, rows))]
        if views[0].numel() == 0 or views[1].numel() == 0:
            continue
        entry_slopes = slopes[i] if cu_q is not None and slopes is not None and slopes.dim() == 2 else slopes
        band = Band(views[0], views[1], _bound(left), _bound(right))
        out, row_lse = attention_forward([band], views[2], scale, entry_slopes)
        views[3].copy_(out)
        lse[..., rows] = row_lse.view(lse[..., rows].shape)
    return o, lse


def _backward_torch(do, dlse, q, k, v, o, lse, slopes, cu_q, cu_k, max_q, max_k, scale, left, right, layout):
    gradients = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    whole = [(slice(None), slice(None))] if cu_q is None else _sequences(cu_q, cu_k)
    for i, (rows, keys) in enumerate(whole):
        parts = ((q, rows), (k, keys), (v, keys), (o, rows), (do, rows))
        qi, ki, vi, oi, doi = (as_bnsd(t, layout)[:, :, part] for t, part in parts)
        if qi.numel() == 0 or ki.numel() == 0:
            continue
        entry_slopes = slopes[i] if cu_q is not None and slopes is not None and slopes.dim() == 2 else slopes
        row_lse, row_dlse = (None if t is None else t[..., rows].reshape(qi.shape[:3]) for t in (lse, dlse))
        band = Band(qi, ki, _bound(left), _bound(right))
        [(dq, dk)], dv = attention_backward([band], vi, oi, doi, row_lse, row_dlse, scale, entry_slopes)
        for t, part, gradient in zip(gradients, (rows, keys, keys), (dq, dk, dv)):
            as_bnsd(t, layout)[:, :, part].copy_(gradient)
    return tuple(gradients)


# --------------------------------------------------------------------------------------------------------- custom ops


def _lse_shape(q, layout):
    return sizes(q, layout)[1:] if layout == PACKED else sizes(q, layout)


@operator("flash_attention")
def _flash_op(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int, max_k: int, scale: float, left: int, right: int, layout: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = _forward_torch if backend == "torch" else _forward_triton
    return run(q, k, v, slopes, cu_q, cu_k, max_q, max_k, scale, left, right, layout)


@operator("flash_attention_backward")
def _flash_backward_op(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    slopes: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int, max_k: int, scale: float, left: int, right: int, layout: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    do = do if do.stride(-1) == 1 else do.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    o = o if o.stride(-1) == 1 else o.contiguous()
    lse = lse.contiguous()
    run = _backward_torch if backend == "torch" else _backward_triton
    return run(do, dlse, q, k, v, o, lse, slopes, cu_q, cu_k, max_q, max_k, scale, left, right, layout)


@_flash_op.register_fake
def _(q, k, v, slopes, cu_q, cu_k, max_q, max_k, scale, left, right, layout, backend):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q, layout), dtype=lse_dtype)


@_flash_backward_op.register_fake
def _(do, dlse, q, k, v, o, lse, slopes, cu_q, cu_k, max_q, max_k, scale, left, right, layout, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the LSE usually gets no gradient


def _backward(ctx, do, dlse):
    q, k, v, slopes, cu_q, cu_k, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    gradients = _flash_backward_op(do, dlse, q, k, v, o, lse, slopes, cu_q, cu_k, *ctx.options)
    return *gradients, *(None,) * 10


_flash_op.register_autograd(_backward, setup_context=_setup)


# ------------------------------------------------------------------------------------------------------------- public


def lacking_head_dim(q: Tensor) -> str:
    """Why the Triton kernels cannot take q's head dimension, or "" where they can."""
    if MIN_HEAD_DIM <= q.shape[-1] <= MAX_HEAD_DIM:
        return ""
    return f"head dimensions must be from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {q.shape[-1]}"


def check_qkv(q: Tensor, k: Tensor, v: Tensor, layout: str, backend: str, names: tuple[str, str, str]) -> None:
    """Raise ValueError unless q, k and v go together; the messages call them by `names`."""
    q_name, k_name, v_name = names
    check_layout(layout, zip(names, (q, k, v)))
    check_float(q_name, q, backend)
    for attribute in ("dtype", "device"):
        check_same(attribute, zip(names, (q, k, v)))
    d = q.shape[-1]
    require(backend == "torch" or not lacking_head_dim(q), f"{q_name}.shape[-1] ({d}): {lacking_head_dim(q)}")
    require(k.shape[-1] == d, f"{k_name}.shape[-1] ({k.shape[-1]}) must equal {q_name}.shape[-1] ({d})")
    require(k.shape == v.shape, f"{v_name}.shape ({tuple(v.shape)}) must equal {k_name}.shape ({tuple(k.shape)})")
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


def _bounds(causal, window):
    left, right = (NO_BOUND, NO_BOUND) if window is None else ((window - 1, 0) if isinstance(window, int) else window)
    if causal:
        right = 0
    return left, right


def _reachable(bounds, max_q, max_k):
    """The bounds, without those that no distance reaches: fewer masks, and sums that fit into 32 bits."""
    left, right = bounds
    return (NO_BOUND if left >= max_k - 1 else left), (NO_BOUND if right >= max(max_q - 1, 1) else right)


def _check_window(window, causal):
    if window is None:
        return
    if isinstance(window, int):
        require(window > 0, f"window ({window}) must be at least 1")
        require(causal, f"window ({window}) as a number needs causal=True, got {causal}: give (left, right)")
        return
    require(len(window) == 2, f"window ({window}) must be a number or a pair (left, right)")
    require(min(window) >= NO_BOUND, f"window ({window}) must hold numbers of at least -1, which means no bound")


def _check_packed(layout, cu_q, cu_k, max_q, max_k, q, k):
    packed = layout == PACKED
    given = cu_q is not None and cu_k is not None
    require(packed == given and (cu_q is None) == (cu_k is None), f"cu_seqlens_q and cu_seqlens_k go with {PACKED!r}")
    if not packed:
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
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q [b, n, s, d] over k, v [b, n_kv, s_k, d] -> o of q's shape, or (o, LSE) with return_lse.

    layout: the order of the dimensions of q, k, v and o: "bnsd", "sbnd", "bsnd", or "tnd" for a pack of sequences with
    cu_seqlens_q and cu_seqlens_k [sequences + 1]. Strides are free, but the last must be 1. n_kv divides n (grouped
    queries). Triton takes head dimensions from 16 to 256; others, and float64, run in PyTorch.
    causal: a query sees no key after it. The last query is aligned with the last key: query i is at
    i + s_k - s. It has no default, because that of other packages is False and a wrong mask shows in no error.
    softmax_scale: by default d^-0.5.
    alibi_slopes: [n] or [b, n], fp32, without gradient; adds -slope * |distance| to the scores.
    window: with causal, the number of keys that a query sees, its own included, as Mistral's sliding_window; or the
    largest distances (left, right), where -1 is no bound.
    max_seqlen_q, max_seqlen_k: the longest sequences of a pack. The default is the length of the pack, which launches
    programs that do nothing.
    return_lse: also return the log of the softmax's denominator, fp32 [b, n, s] ([n, t] for "tnd"), which has a gradient.
    A query without keys gives 0, and -inf for the LSE. The backward is deterministic.
    Raises ValueError for a shape, dtype, device, stride, layout, window or head count that does not fit.
    """
    q, k, v = autocast_to(q, k, v)
    backend = choose_backend(q, backend, lacks=lacking_head_dim(q))
    check_qkv(q, k, v, layout, backend, ("q", "k", "v"))
    scale = check_scale(q, softmax_scale)
    _check_window(window, causal)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    cu_seqlens_q, cu_seqlens_k, max_q, max_k = _check_packed(layout, *lengths, q, k)
    left, right = _reachable(_bounds(causal, window), max_q, max_k)
    if alibi_slopes is not None:
        heads = sizes(q, layout)[1]
        entries = sizes(q, layout)[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        require(
            tuple(alibi_slopes.shape) in ((heads,), (entries, heads)),
            f"alibi_slopes.shape ({tuple(alibi_slopes.shape)}) must be ({heads},) or ({entries}, {heads})",
        )
        check_same("device", [("q", q), ("alibi_slopes", alibi_slopes)])
        alibi_slopes = alibi_slopes.float().contiguous()
    if backend == "torch" and not return_lse and layout != PACKED and alibi_slopes is None and left == NO_BOUND:
        plain = right == NO_BOUND or (causal and max_q == max_k)
        if plain and q.numel() and k.numel():
            # PyTorch's own kernel is the fastest on a CPU for this case.
            views = [as_bnsd(t, layout) for t in (q, k, v)]
            grouped = views[0].shape[1] != views[1].shape[1]
            out = torch.nn.functional.scaled_dot_product_attention(
                *views, is_causal=causal, scale=scale, enable_gqa=grouped
            )
            return from_bnsd(out, layout)
    args = (alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, left, right, layout, backend)
    o, lse = _flash_op(q, k, v, *args)
    return (o, lse) if return_lse else o


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, for an autograd function that calls `flash_attention(..., return_lse=True)` itself.

    do: the gradient of o. q, k, v, o, lse: the inputs and outputs of the forward call; the options are those of that call.
    The inputs are not checked again.
    """
    backend = choose_backend(q, backend, lacks=lacking_head_dim(q))
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    cu_seqlens_q, cu_seqlens_k, max_q, max_k = _check_packed(layout, *lengths, q, k)
    slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    bounds = _reachable(_bounds(causal, window), max_q, max_k)
    args = (slopes, cu_seqlens_q, cu_seqlens_k, max_q, max_k, check_scale(q, softmax_scale), *bounds)
    return _flash_backward_op(do, None, q, k, v, o, lse, *args, layout, backend)
