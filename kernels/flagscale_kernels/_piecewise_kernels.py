"""The Triton kernels of piecewise attention: two bands under one softmax.

The far band has the keys j <= p - threshold with (Q2, K2), the near band the others with (Q1, K1), up to p if FORM.right.
"""

from flagscale_kernels._attention_kernels import RUNTIME, start_softmax, store_output
from flagscale_kernels._bands import attend_band, dkdv_band, dq_band
from flagscale_kernels._dq_sums import NO_DK, NO_DV, place, sums_of
from flagscale_kernels._tiles import Terms, load_rows, program, rows_at, rows_of, sequence, store_rows, zeros
from flagscale_kernels._triton import tl, triton


@triton.jit(do_not_specialize=RUNTIME)
def _piecewise_forward_kernel(
    Q1, K1, Q2, K2, V, O, LSE, SINKS, CU_SEQLENS_Q, CU_SEQLENS_K,
    to_cap, from_cap, to_log2, max_q, max_k, threshold, heads, group,
    q1_batch_stride, q1_head_stride, q1_seq_stride, k1_batch_stride, k1_head_stride, k1_seq_stride,
    q2_batch_stride, q2_head_stride, q2_seq_stride, k2_batch_stride, k2_head_stride, k2_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, o_batch_stride, o_head_stride, o_seq_stride,
    lse_batch_stride, lse_head_stride,
    FORM: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    tile, head, entry = program(tl.program_id(0), max_q, BM, heads)
    first = ((max_q + BM - 1) // BM - 1 - tile) * BM
    kv_head = head // group
    batch, q_start, seq_q = sequence(CU_SEQLENS_Q, entry, max_q, FORM.packed)
    batch, k_start, seq_k = sequence(CU_SEQLENS_K, entry, max_k, FORM.packed)
    if first < seq_q:
        q1_rows = rows_at(Q1, batch, head, q_start, q1_batch_stride, q1_head_stride, q1_seq_stride, FORM.wide)
        q2_rows = rows_at(Q2, batch, head, q_start, q2_batch_stride, q2_head_stride, q2_seq_stride, FORM.wide)
        k1_rows = rows_of(
            K1, batch, kv_head, k_start, k1_batch_stride, k1_head_stride, k1_seq_stride, FORM.wide, DESCRIPTORS
        )
        k2_rows = rows_of(
            K2, batch, kv_head, k_start, k2_batch_stride, k2_head_stride, k2_seq_stride, FORM.wide, DESCRIPTORS
        )
        v_rows = rows_of(
            V, batch, kv_head, k_start, v_batch_stride, v_head_stride, v_seq_stride, FORM.wide, DESCRIPTORS
        )
        o_rows = rows_at(O, batch, head, q_start, o_batch_stride, o_head_stride, o_seq_stride, FORM.wide)
        far = Terms(seq_q, seq_k, 0, -threshold, 0.0, to_cap, from_cap, to_log2)
        near = Terms(seq_q, seq_k, threshold - 1, 0, 0.0, to_cap, from_cap, to_log2)
        first_pos = first + seq_k - seq_q
        last_pos = tl.minimum(first + BM, seq_q) - 1 + seq_k - seq_q
        positions = (first_pos + tl.arange(0, BM))[:, None]
        acc = zeros(BM, FORM.v_a, FORM.v_b)
        l, m = start_softmax(SINKS, head, BM, FORM)
        q = load_rows(q2_rows, first, seq_q, FORM.d, FORM.d_a, FORM.d_b, BM, True, False)
        acc, l, m = attend_band(
            acc, l, m, q, k2_rows, v_rows, positions, first_pos, last_pos, far,
            False, True, FORM, BN, EDGE, DESCRIPTORS,
        )  # fmt: skip
        q = load_rows(q1_rows, first, seq_q, FORM.d, FORM.d_a, FORM.d_b, BM, True, False)
        acc, l, m = attend_band(
            acc, l, m, q, k1_rows, v_rows, positions, first_pos, last_pos, near,
            True, FORM.right, FORM, BN, EDGE, DESCRIPTORS,
        )  # fmt: skip
        row = batch * lse_batch_stride + head * lse_head_stride + q_start
        store_output(acc, l, m, o_rows, LSE + row, first, seq_q, FORM, BM)


@triton.jit(do_not_specialize=RUNTIME)
def _piecewise_dkdv_kernel(
    Q1, K1, Q2, K2, V, DO, DQ1, DQ2, ORDER, DK1, DK2, DV, LSE, DELTA, CU_SEQLENS_Q, CU_SEQLENS_K,
    softmax_scale, to_cap, from_cap, to_log2, max_q, max_k, threshold, heads, group,
    q1_batch_stride, q1_head_stride, q1_seq_stride, k1_batch_stride, k1_head_stride, k1_seq_stride,
    q2_batch_stride, q2_head_stride, q2_seq_stride, k2_batch_stride, k2_head_stride, k2_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    dq_entry_stride, dq_head_stride, dk_batch_stride, dk_head_stride, dk_seq_stride,
    dv_batch_stride, dv_head_stride, dv_seq_stride, lse_batch_stride, lse_head_stride,
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
        do_rows = rows_of(DO, batch, 0, q_start, do_batch_stride, do_head_stride, do_seq_stride, FORM.wide, DESCRIPTORS)
        v_rows = rows_at(V, batch, kv_head, k_start, v_batch_stride, v_head_stride, v_seq_stride, FORM.wide)
        dv_rows = rows_at(DV, batch, kv_head, k_start, dv_batch_stride, dv_head_stride, dv_seq_stride, FORM.wide)
        row = batch * lse_batch_stride + q_start
        v = load_rows(v_rows, first, seq_k, FORM.v, FORM.v_a, FORM.v_b, BN, True, False)
        dv = zeros(BN, FORM.v_a, FORM.v_b)

        near = Terms(seq_q, seq_k, threshold - 1, 0, 0.0, to_cap, from_cap, to_log2)
        q_rows = rows_of(Q1, batch, 0, q_start, q1_batch_stride, q1_head_stride, q1_seq_stride, FORM.wide, DESCRIPTORS)
        k_rows = rows_at(K1, batch, kv_head, k_start, k1_batch_stride, k1_head_stride, k1_seq_stride, FORM.wide)
        sums = sums_of(
            DQ1, ORDER, entry, q_start, dq_entry_stride, dq_head_stride, heads, max_q, tile, 0, 2, WIDTH, BM
        )  # fmt: skip
        k = load_rows(k_rows, first, seq_k, FORM.d, FORM.d_a, FORM.d_b, BN, True, False)
        dk, dv = dkdv_band(
            zeros(BN, FORM.d_a, FORM.d_b), dv, k, v, q_rows, do_rows, LSE + row, DELTA + row, LSE, sums,
            q1_head_stride, do_head_stride, lse_head_stride, kv_head * group, group, first, near,
            True, FORM.right, FORM, BM, BN, EDGE, DESCRIPTORS, SUM,
        )  # fmt: skip
        dk_rows = rows_at(DK1, batch, kv_head, k_start, dk_batch_stride, dk_head_stride, dk_seq_stride, FORM.wide)
        if SUM != NO_DK:
            store_rows(dk_rows, first, seq_k, dk, softmax_scale, FORM.d, FORM.d_a, FORM.d_b, BN)

        far = Terms(seq_q, seq_k, 0, -threshold, 0.0, to_cap, from_cap, to_log2)
        q_rows = rows_of(Q2, batch, 0, q_start, q2_batch_stride, q2_head_stride, q2_seq_stride, FORM.wide, DESCRIPTORS)
        k_rows = rows_at(K2, batch, kv_head, k_start, k2_batch_stride, k2_head_stride, k2_seq_stride, FORM.wide)
        sums = sums_of(
            DQ2, ORDER, entry, q_start, dq_entry_stride, dq_head_stride, heads, max_q, tile, 1, 2, WIDTH, BM
        )  # fmt: skip
        k = load_rows(k_rows, first, seq_k, FORM.d, FORM.d_a, FORM.d_b, BN, True, False)
        dk, dv = dkdv_band(
            zeros(BN, FORM.d_a, FORM.d_b), dv, k, v, q_rows, do_rows, LSE + row, DELTA + row, LSE, sums,
            q2_head_stride, do_head_stride, lse_head_stride, kv_head * group, group, first, far,
            False, True, FORM, BM, BN, EDGE, DESCRIPTORS, SUM,
        )  # fmt: skip
        dk_rows = rows_at(DK2, batch, kv_head, k_start, dk_batch_stride, dk_head_stride, dk_seq_stride, FORM.wide)
        if SUM != NO_DK:
            store_rows(dk_rows, first, seq_k, dk, softmax_scale, FORM.d, FORM.d_a, FORM.d_b, BN)
        if SUM != NO_DV:
            store_rows(dv_rows, first, seq_k, dv, 1.0, FORM.v, FORM.v_a, FORM.v_b, BN)


@triton.jit(do_not_specialize=RUNTIME)
def _piecewise_dq_kernel(
    Q1, K1, Q2, K2, V, DO, DQ1, DQ2, LSE, DELTA, CU_SEQLENS_Q, CU_SEQLENS_K,
    softmax_scale, to_cap, from_cap, to_log2, max_q, max_k, threshold, heads, group,
    q1_batch_stride, q1_head_stride, q1_seq_stride, k1_batch_stride, k1_head_stride, k1_seq_stride,
    q2_batch_stride, q2_head_stride, q2_seq_stride, k2_batch_stride, k2_head_stride, k2_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    dq_batch_stride, dq_head_stride, dq_seq_stride, lse_batch_stride, lse_head_stride,
    FORM: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    tile, head, entry = program(tl.program_id(0), max_q, BM, heads)
    first = ((max_q + BM - 1) // BM - 1 - tile) * BM
    kv_head = head // group
    batch, q_start, seq_q = sequence(CU_SEQLENS_Q, entry, max_q, FORM.packed)
    batch, k_start, seq_k = sequence(CU_SEQLENS_K, entry, max_k, FORM.packed)
    if first < seq_q:
        v_rows = rows_of(
            V, batch, kv_head, k_start, v_batch_stride, v_head_stride, v_seq_stride, FORM.wide, DESCRIPTORS
        )
        do_rows = rows_at(DO, batch, head, q_start, do_batch_stride, do_head_stride, do_seq_stride, FORM.wide)
        rows = first + tl.arange(0, BM)
        row = batch * lse_batch_stride + head * lse_head_stride + q_start
        first_pos = first + seq_k - seq_q
        last_pos = tl.minimum(first + BM, seq_q) - 1 + seq_k - seq_q
        positions = (first_pos + tl.arange(0, BM))[:, None]
        do = load_rows(do_rows, first, seq_q, FORM.v, FORM.v_a, FORM.v_b, BM, True, False)
        lse = tl.load(LSE + row + rows, mask=rows < seq_q, other=float("inf"))
        delta = tl.load(DELTA + row + rows, mask=rows < seq_q, other=0.0)

        far = Terms(seq_q, seq_k, 0, -threshold, 0.0, to_cap, from_cap, to_log2)
        q_rows = rows_at(Q2, batch, head, q_start, q2_batch_stride, q2_head_stride, q2_seq_stride, FORM.wide)
        k_rows = rows_of(
            K2, batch, kv_head, k_start, k2_batch_stride, k2_head_stride, k2_seq_stride, FORM.wide, DESCRIPTORS
        )
        q = load_rows(q_rows, first, seq_q, FORM.d, FORM.d_a, FORM.d_b, BM, True, False)
        dq = dq_band(
            zeros(BM, FORM.d_a, FORM.d_b), q, do, lse, delta, k_rows, v_rows, positions, first_pos, last_pos, far,
            False, True, FORM, BN, EDGE, DESCRIPTORS,
        )  # fmt: skip
        dq_rows = rows_at(DQ2, batch, head, q_start, dq_batch_stride, dq_head_stride, dq_seq_stride, FORM.wide)
        store_rows(dq_rows, first, seq_q, dq, softmax_scale, FORM.d, FORM.d_a, FORM.d_b, BM)

        near = Terms(seq_q, seq_k, threshold - 1, 0, 0.0, to_cap, from_cap, to_log2)
        q_rows = rows_at(Q1, batch, head, q_start, q1_batch_stride, q1_head_stride, q1_seq_stride, FORM.wide)
        k_rows = rows_of(
            K1, batch, kv_head, k_start, k1_batch_stride, k1_head_stride, k1_seq_stride, FORM.wide, DESCRIPTORS
        )
        q = load_rows(q_rows, first, seq_q, FORM.d, FORM.d_a, FORM.d_b, BM, True, False)
        dq = dq_band(
            zeros(BM, FORM.d_a, FORM.d_b), q, do, lse, delta, k_rows, v_rows, positions, first_pos, last_pos, near,
            True, FORM.right, FORM, BN, EDGE, DESCRIPTORS,
        )  # fmt: skip
        dq_rows = rows_at(DQ1, batch, head, q_start, dq_batch_stride, dq_head_stride, dq_seq_stride, FORM.wide)
        store_rows(dq_rows, first, seq_q, dq, softmax_scale, FORM.d, FORM.d_a, FORM.d_b, BM)
