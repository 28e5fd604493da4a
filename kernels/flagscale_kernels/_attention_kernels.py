"""The Triton kernels of flash attention, and what those of piecewise attention have in common with them.

Arguments of a kernel: tensors (or descriptors), numbers, (batch, head, sequence) strides, and the constants that it is
compiled for: FORM, DESCRIPTORS and the tile. A program of the forward and of dQ has a tile of queries, one of dK and dV a
tile of keys and values of one KV head. Tiles with the most keys start first.
"""

from flagscale_kernels._bands import attend_band, dkdv_band, dq_band
from flagscale_kernels._dq_sums import NO_DK, NO_DV, place, sums_of
from flagscale_kernels._tiles import (
    Terms,
    load_rows,
    program,
    rows_at,
    rows_of,
    sequence,
    store_rows,
    zeros,
)
from flagscale_kernels._triton import tl, triton

RUNTIME = ["max_q", "max_k", "left", "right", "threshold"]  # numbers for whose values no kernel is compiled again


@triton.jit
def start_softmax(SINKS, head, ROWS: tl.constexpr, FORM: tl.constexpr):
    """(sum, maximum) of an online softmax over no keys; a sink counts as a key that adds nothing to the output."""
    l = tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    if FORM.sinks:
        l += 1.0
        m = tl.zeros([ROWS], tl.float32) + tl.load(SINKS + head).to(tl.float32) * 1.4426950408889634
    return l, m


@triton.jit
def store_output(acc, l, m, O, LSE, first, seq_q, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Store acc / l and the LSE; a row without keys gives 0, and -inf for the LSE."""
    safe_l = tl.where(l == 0.0, 1.0, l)
    store_rows(O, first, seq_q, acc, (1.0 / safe_l)[:, None], FORM.v, FORM.v_a, FORM.v_b, ROWS)
    rows = first + tl.arange(0, ROWS)
    lse = (m + tl.log2(safe_l)) * 0.6931471805599453
    tl.store(LSE + rows, lse, mask=rows < seq_q)


@triton.jit(do_not_specialize=RUNTIME)
def _flash_forward_kernel(
    Q, K, V, O, LSE, SLOPES, SINKS, CU_SEQLENS_Q, CU_SEQLENS_K,
    inverse_scale, to_cap, from_cap, to_log2, max_q, max_k, left, right, heads, group,
    q_batch_stride, q_head_stride, q_seq_stride, k_batch_stride, k_head_stride, k_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, o_batch_stride, o_head_stride, o_seq_stride,
    lse_batch_stride, lse_head_stride, slope_batch_stride,
    FORM: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    tile, head, entry = program(tl.program_id(0), max_q, BM, heads)
    first = ((max_q + BM - 1) // BM - 1 - tile) * BM
    kv_head = head // group
    batch, q_start, seq_q = sequence(CU_SEQLENS_Q, entry, max_q, FORM.packed)
    batch, k_start, seq_k = sequence(CU_SEQLENS_K, entry, max_k, FORM.packed)
    if first < seq_q:
        q_rows = rows_at(Q, batch, head, q_start, q_batch_stride, q_head_stride, q_seq_stride, FORM.wide)
        k_rows = rows_of(
            K, batch, kv_head, k_start, k_batch_stride, k_head_stride, k_seq_stride, FORM.wide, DESCRIPTORS
        )
        v_rows = rows_of(
            V, batch, kv_head, k_start, v_batch_stride, v_head_stride, v_seq_stride, FORM.wide, DESCRIPTORS
        )
        o_rows = rows_at(O, batch, head, q_start, o_batch_stride, o_head_stride, o_seq_stride, FORM.wide)
        slope = 0.0
        if FORM.alibi:
            slope = tl.load(SLOPES + entry * slope_batch_stride + head).to(tl.float32) * inverse_scale
        terms = Terms(seq_q, seq_k, left, right, slope, to_cap, from_cap, to_log2)
        first_pos = first + seq_k - seq_q
        last_pos = tl.minimum(first + BM, seq_q) - 1 + seq_k - seq_q
        positions = (first_pos + tl.arange(0, BM))[:, None]
        acc = zeros(BM, FORM.v_a, FORM.v_b)
        l, m = start_softmax(SINKS, head, BM, FORM)
        q = load_rows(q_rows, first, seq_q, FORM.d, FORM.d_a, FORM.d_b, BM, True, False)
        acc, l, m = attend_band(
            acc, l, m, q, k_rows, v_rows, positions, first_pos, last_pos, terms,
            FORM.left, FORM.right, FORM, BN, EDGE, DESCRIPTORS,
        )  # fmt: skip
        row = batch * lse_batch_stride + head * lse_head_stride + q_start
        store_output(acc, l, m, o_rows, LSE + row, first, seq_q, FORM, BM)


@triton.jit(do_not_specialize=RUNTIME)
def _flash_dkdv_kernel(
    Q, K, V, DO, DQ, ORDER, DK, DV, LSE, DELTA, SLOPES, CU_SEQLENS_Q, CU_SEQLENS_K,
    softmax_scale, inverse_scale, to_cap, from_cap, to_log2, max_q, max_k, left, right, heads, group,
    q_batch_stride, q_head_stride, q_seq_stride, k_batch_stride, k_head_stride, k_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    dq_entry_stride, dq_head_stride, dk_batch_stride, dk_head_stride, dk_seq_stride,
    dv_batch_stride, dv_head_stride, dv_seq_stride, lse_batch_stride, lse_head_stride, slope_batch_stride,
    FORM: tl.constexpr, DESCRIPTORS: tl.constexpr, SUM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    index = place(ORDER, (max_k + BN - 1) // BN, SUM)
    tile, kv_head, entry = program(index, max_k, BN, heads // group)
    first = tile * BN
    batch, q_start, seq_q = sequence(CU_SEQLENS_Q, entry, max_q, FORM.packed)
    batch, k_start, seq_k = sequence(CU_SEQLENS_K, entry, max_k, FORM.packed)
    WIDTH: tl.constexpr = FORM.d_a * 2 if FORM.d_b > 0 else FORM.d_a
    if first < seq_k:
        q_rows = rows_of(Q, batch, 0, q_start, q_batch_stride, q_head_stride, q_seq_stride, FORM.wide, DESCRIPTORS)
        do_rows = rows_of(DO, batch, 0, q_start, do_batch_stride, do_head_stride, do_seq_stride, FORM.wide, DESCRIPTORS)
        k_rows = rows_at(K, batch, kv_head, k_start, k_batch_stride, k_head_stride, k_seq_stride, FORM.wide)
        v_rows = rows_at(V, batch, kv_head, k_start, v_batch_stride, v_head_stride, v_seq_stride, FORM.wide)
        sums = sums_of(
            DQ, ORDER, entry, q_start, dq_entry_stride, dq_head_stride, heads, max_q, tile, 0, 1, WIDTH, BM
        )  # fmt: skip
        dk_rows = rows_at(DK, batch, kv_head, k_start, dk_batch_stride, dk_head_stride, dk_seq_stride, FORM.wide)
        dv_rows = rows_at(DV, batch, kv_head, k_start, dv_batch_stride, dv_head_stride, dv_seq_stride, FORM.wide)
        terms = Terms(seq_q, seq_k, left, right, inverse_scale, to_cap, from_cap, to_log2)
        row = batch * lse_batch_stride + q_start
        k = load_rows(k_rows, first, seq_k, FORM.d, FORM.d_a, FORM.d_b, BN, True, False)
        v = load_rows(v_rows, first, seq_k, FORM.v, FORM.v_a, FORM.v_b, BN, True, False)
        dk, dv = dkdv_band(
            zeros(BN, FORM.d_a, FORM.d_b), zeros(BN, FORM.v_a, FORM.v_b), k, v, q_rows, do_rows,
            LSE + row, DELTA + row, SLOPES + entry * slope_batch_stride, sums,
            q_head_stride, do_head_stride, lse_head_stride, kv_head * group, group, first, terms,
            FORM.left, FORM.right, FORM, BM, BN, EDGE, DESCRIPTORS, SUM,
        )  # fmt: skip
        if SUM != NO_DK:
            store_rows(dk_rows, first, seq_k, dk, softmax_scale, FORM.d, FORM.d_a, FORM.d_b, BN)
        if SUM != NO_DV:
            store_rows(dv_rows, first, seq_k, dv, 1.0, FORM.v, FORM.v_a, FORM.v_b, BN)


@triton.jit(do_not_specialize=RUNTIME)
def _flash_dq_kernel(
    Q, K, V, DO, DQ, LSE, DELTA, SLOPES, CU_SEQLENS_Q, CU_SEQLENS_K,
    softmax_scale, inverse_scale, to_cap, from_cap, to_log2, max_q, max_k, left, right, heads, group,
    q_batch_stride, q_head_stride, q_seq_stride, k_batch_stride, k_head_stride, k_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    dq_batch_stride, dq_head_stride, dq_seq_stride, lse_batch_stride, lse_head_stride, slope_batch_stride,
    FORM: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    tile, head, entry = program(tl.program_id(0), max_q, BM, heads)
    first = ((max_q + BM - 1) // BM - 1 - tile) * BM
    kv_head = head // group
    batch, q_start, seq_q = sequence(CU_SEQLENS_Q, entry, max_q, FORM.packed)
    batch, k_start, seq_k = sequence(CU_SEQLENS_K, entry, max_k, FORM.packed)
    if first < seq_q:
        q_rows = rows_at(Q, batch, head, q_start, q_batch_stride, q_head_stride, q_seq_stride, FORM.wide)
        k_rows = rows_of(
            K, batch, kv_head, k_start, k_batch_stride, k_head_stride, k_seq_stride, FORM.wide, DESCRIPTORS
        )
        v_rows = rows_of(
            V, batch, kv_head, k_start, v_batch_stride, v_head_stride, v_seq_stride, FORM.wide, DESCRIPTORS
        )
        do_rows = rows_at(DO, batch, head, q_start, do_batch_stride, do_head_stride, do_seq_stride, FORM.wide)
        dq_rows = rows_at(DQ, batch, head, q_start, dq_batch_stride, dq_head_stride, dq_seq_stride, FORM.wide)
        slope = 0.0
        if FORM.alibi:
            slope = tl.load(SLOPES + entry * slope_batch_stride + head).to(tl.float32) * inverse_scale
        terms = Terms(seq_q, seq_k, left, right, slope, to_cap, from_cap, to_log2)
        rows = first + tl.arange(0, BM)
        row = batch * lse_batch_stride + head * lse_head_stride + q_start
        first_pos = first + seq_k - seq_q
        last_pos = tl.minimum(first + BM, seq_q) - 1 + seq_k - seq_q
        q = load_rows(q_rows, first, seq_q, FORM.d, FORM.d_a, FORM.d_b, BM, True, False)
        do = load_rows(do_rows, first, seq_q, FORM.v, FORM.v_a, FORM.v_b, BM, True, False)
        lse = tl.load(LSE + row + rows, mask=rows < seq_q, other=float("inf"))
        delta = tl.load(DELTA + row + rows, mask=rows < seq_q, other=0.0)
        dq = dq_band(
            zeros(BM, FORM.d_a, FORM.d_b), q, do, lse, delta, k_rows, v_rows, (first_pos + tl.arange(0, BM))[:, None],
            first_pos, last_pos, terms, FORM.left, FORM.right, FORM, BN, EDGE, DESCRIPTORS,
        )  # fmt: skip
        store_rows(dq_rows, first, seq_q, dq, softmax_scale, FORM.d, FORM.d_a, FORM.d_b, BM)
