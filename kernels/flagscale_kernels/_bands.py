r"""Triton functions for attention over one band of keys. Flash attention has one band, piecewise attention two.

Query i has position p = i + (seq_k - seq_q), which aligns the last query with the last key. It attends to the keys of
its band, p - left <= j <= p + right; either bound is optional. With s_ij = scale q_i . k_j (- slope |p - j| for ALiBi,
Press et al. 2022, arXiv:2108.12409), the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al.
2022, arXiv:2205.14135) keeps for each row the maximum m, the sum l of exp(s - m), and the weighted sum of v. Backward,
with P = exp(s - lse), dP = dO V^T and delta_i = sum_d o_id do_id - dlse_i:

    dS = P (dP - delta)      dV = P^T dO      dQ = scale dS K      dK = scale dS^T Q

With a cap c (Gemma 2, arXiv:2408.00118), s is c tanh(scale q . k / c) instead, and dS gets the factor 1 - tanh^2.

exp is computed as exp2. Over keys (forward and dQ), tiles that lie inside the band need no mask. The loops over the few
tiles at its edges have their own pipeline depth, EDGE; a depth of 1 next to a deeper main loop makes ptxas serialise all
products on sm_90. Over queries (dK and dV) the same holds, or with an EDGE of 0 all tiles are masked if there is a band: one
loop has fewer registers and half the code, and a third more instructions for a tile.
"""

from flagscale_kernels._dq_sums import NO_DK, NO_DV, NOBODYS, add_to_dq, count_tile
from flagscale_kernels._tiles import Terms, add_product, load_rows, of_head, product, scores
from flagscale_kernels._triton import tl, triton

# ------------------------------------------------------------------------------------------ forward and dQ: over keys


@triton.jit
def _key_range(first_pos, last_pos, terms, LEFT: tl.constexpr, RIGHT: tl.constexpr, BN: tl.constexpr):
    """[lo, hi) holds every key that a row of first_pos .. last_pos sees; [full_lo, full_hi) keys that all of them see."""
    lo = 0
    full_lo = 0
    hi = terms.seq_k
    full_hi = terms.seq_k
    if LEFT:
        lo = tl.maximum(first_pos - terms.left, 0) // BN * BN
        full_lo = (tl.maximum(last_pos - terms.left, 0) + BN - 1) // BN * BN
    if RIGHT:
        hi = tl.minimum(terms.seq_k, last_pos + terms.right + 1)
        full_hi = tl.minimum(terms.seq_k, tl.maximum(first_pos + terms.right + 1, 0))
    full_hi = tl.maximum(full_hi // BN * BN, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def _attend_tile(
    acc, l, m, q, K, V, n, positions, terms, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
    FORM: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    k = load_rows(K, n, terms.seq_k, FORM.d, FORM.d_a, FORM.d_b, BN, MASKED, DESCRIPTORS)
    keys = n + tl.arange(0, BN)[None, :]
    s, _ = scores(q, k, positions, keys, terms, LEFT, RIGHT, MASKED, FORM)
    new_m = tl.maximum(m, tl.max(s, 1) * terms.to_log2)
    # A masked row may have seen no key yet.
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m) if MASKED else new_m
    p = tl.exp2(s * terms.to_log2 - safe_m[:, None])
    alpha = tl.exp2(m - safe_m)
    l = l * alpha + tl.sum(p, 1)
    v = load_rows(V, n, terms.seq_k, FORM.v, FORM.v_a, FORM.v_b, BN, MASKED, DESCRIPTORS)
    a = acc[0] * alpha[:, None]
    b = a
    if FORM.v_b > 0:
        b = acc[1] * alpha[:, None]
    acc = (a, b)
    return add_product(acc, p.to(v[0].dtype), v, FORM.v_b, FORM), l, new_m


@triton.jit
def attend_band(
    acc, l, m, q, K, V, positions, first_pos, last_pos, terms, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    FORM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Update (acc, l, m) of a tile of queries with the keys of its band."""
    lo, full_lo, full_hi, hi = _key_range(first_pos, last_pos, terms, LEFT, RIGHT, BN)
    if LEFT:
        for n in tl.range(lo, tl.minimum(full_lo, hi), BN, num_stages=EDGE):
            acc, l, m = _attend_tile(acc, l, m, q, K, V, n, positions, terms, LEFT, RIGHT, True, FORM, BN, DESCRIPTORS)
    for n in range(full_lo, full_hi, BN):
        acc, l, m = _attend_tile(acc, l, m, q, K, V, n, positions, terms, LEFT, RIGHT, False, FORM, BN, DESCRIPTORS)
    for n in tl.range(full_hi, hi, BN, num_stages=EDGE):
        acc, l, m = _attend_tile(acc, l, m, q, K, V, n, positions, terms, LEFT, RIGHT, True, FORM, BN, DESCRIPTORS)
    return acc, l, m


@triton.jit
def _dq_tile(
    dq, q, do, lse, delta, K, V, n, positions, terms, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
    FORM: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    k = load_rows(K, n, terms.seq_k, FORM.d, FORM.d_a, FORM.d_b, BN, MASKED, DESCRIPTORS)
    v = load_rows(V, n, terms.seq_k, FORM.v, FORM.v_a, FORM.v_b, BN, MASKED, DESCRIPTORS)
    keys = n + tl.arange(0, BN)[None, :]
    s, slope = scores(q, k, positions, keys, terms, LEFT, RIGHT, MASKED, FORM)
    p = tl.exp2(s * terms.to_log2 - lse[:, None])
    dp = product(do, v, FORM.v_b, FORM)
    ds = p * (dp - delta[:, None])
    if FORM.cap:
        ds *= slope
    return add_product(dq, ds.to(k[0].dtype), k, FORM.d_b, FORM)


@triton.jit
def dq_band(
    dq, q, do, lse, delta, K, V, positions, first_pos, last_pos, terms, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    FORM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add dS K over the band to dq; the caller multiplies by the softmax scale. lse is in base 2, +inf for an empty row."""
    lo, full_lo, full_hi, hi = _key_range(first_pos, last_pos, terms, LEFT, RIGHT, BN)
    if LEFT:
        for n in tl.range(lo, tl.minimum(full_lo, hi), BN, num_stages=EDGE):
            dq = _dq_tile(dq, q, do, lse, delta, K, V, n, positions, terms, LEFT, RIGHT, True, FORM, BN, DESCRIPTORS)
    for n in range(full_lo, full_hi, BN):
        dq = _dq_tile(dq, q, do, lse, delta, K, V, n, positions, terms, LEFT, RIGHT, False, FORM, BN, DESCRIPTORS)
    for n in tl.range(full_hi, hi, BN, num_stages=EDGE):
        dq = _dq_tile(dq, q, do, lse, delta, K, V, n, positions, terms, LEFT, RIGHT, True, FORM, BN, DESCRIPTORS)
    return dq


# --------------------------------------------------------------------------------------------- dK and dV: over queries


@triton.jit
def _dkdv_tile(
    dk, dv, pending, k, v, Q, DO, LSE, DELTA, sums, head, m, keys, terms,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr, FORM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DESCRIPTORS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    rows = m + tl.arange(0, BM)
    # Rows beyond seq_q need no mask: their lse is +inf, so p is 0.
    q = load_rows(Q, m, terms.seq_q, FORM.d, FORM.d_a, FORM.d_b, BM, True, DESCRIPTORS)
    lse = tl.load(LSE + rows, mask=rows < terms.seq_q, other=float("inf"))
    delta = tl.load(DELTA + rows, mask=rows < terms.seq_q, other=0.0)
    positions = (rows + (terms.seq_k - terms.seq_q))[None, :]
    s, slope = scores(k, q, positions, keys, terms, LEFT, RIGHT, MASKED, FORM)  # [BN, BM]
    p = tl.exp2(s * terms.to_log2 - lse[None, :])
    do = load_rows(DO, m, terms.seq_q, FORM.v, FORM.v_a, FORM.v_b, BM, True, DESCRIPTORS)
    if SUM != NO_DV:
        dv = add_product(dv, p.to(do[0].dtype), do, FORM.v_b, FORM)
    if SUM != NO_DK:
        dp = product(v, do, FORM.v_b, FORM)
        ds = p * (dp - delta[None, :])
        if FORM.cap:
            ds *= slope
        ds = ds.to(q[0].dtype)
        dk = add_product(dk, ds, q, FORM.d_b, FORM)
    if SUM > 0:
        a = tl.dot(tl.trans(ds), k[0], input_precision=FORM.precision)
        b = a
        if FORM.d_b > 0:
            b = tl.dot(tl.trans(ds), k[1], input_precision=FORM.precision)
        last_key = terms.seq_k - 1
        if RIGHT:
            last_key = tl.minimum(last_key, m + BM - 1 + terms.seq_k - terms.seq_q + terms.right)
        pending = add_to_dq(sums, pending, head, m, last_key, (a, b), FORM.d_a, FORM.d_b, BM, BN, SUM)
    return dk, dv, pending


@triton.jit
def _dkdv_tiles(
    dk, dv, pending, k, v, Q, DO, LSE, DELTA, SLOPES, sums, q_head_stride, do_head_stride, lse_head_stride,
    lo, hi, first_head, group, keys, terms, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
    FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Process query tiles [lo, hi) of every query head of the group in one loop: two nested loops need more registers."""
    tiles = tl.maximum((hi - lo + BM - 1) // BM, 0)
    for i in tl.range(0, tiles * group, num_stages=STAGES):
        head = tl.cast(first_head + i // tiles, tl.int64)
        m = lo + (i % tiles) * BM
        slope = 0.0
        if FORM.alibi:
            slope = tl.load(SLOPES + head).to(tl.float32) * terms.slope
        head_terms = Terms(
            terms.seq_q, terms.seq_k, terms.left, terms.right, slope, terms.to_cap, terms.from_cap, terms.to_log2
        )
        q_rows = of_head(Q, head, q_head_stride, DESCRIPTORS)
        do_rows = of_head(DO, head, do_head_stride, DESCRIPTORS)
        dk, dv, pending = _dkdv_tile(
            dk, dv, pending, k, v, q_rows, do_rows, LSE + head * lse_head_stride, DELTA + head * lse_head_stride,
            sums, head, m, keys, head_terms, LEFT, RIGHT, MASKED, FORM, BM, BN, DESCRIPTORS, SUM,
        )  # fmt: skip
    return dk, dv, pending


@triton.jit
def dkdv_band(
    dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, sums, q_head_stride, do_head_stride, lse_head_stride,
    first_head, group, first_key, terms,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q to dk and P^T dO to dv for a group of query heads; the caller multiplies dk by the softmax scale.

    SUM: also add dS K, without the softmax scale, to `sums`, or leave out dk or dv (`_dq_sums.py`).
    terms.slope is the inverse of the softmax scale here, by which the slopes in memory are multiplied.
    """
    keys = (first_key + tl.arange(0, BN))[:, None]
    offset = terms.seq_k - terms.seq_q  # query m has position m + offset
    last_key = tl.minimum(first_key + BN, terms.seq_k) - 1
    lo = 0
    full_lo = 0
    hi = terms.seq_q
    full_hi = terms.seq_q
    if RIGHT:  # query m sees the key if m + offset + right >= key
        lo = tl.maximum(first_key - terms.right - offset, 0) // BM * BM
        full_lo = (tl.maximum(last_key - terms.right - offset, 0) + BM - 1) // BM * BM
    if LEFT:  # and if m + offset - left <= key
        hi = tl.minimum(terms.seq_q, last_key + terms.left - offset + 1)
        full_hi = tl.minimum(terms.seq_q, tl.maximum(first_key + terms.left - offset + 1, 0)) // BM * BM
    if (
        SUM > 0
    ):  # dQ sums over keys, so those beyond seq_k must be masked; of dK and dV they are rows that are not stored
        full_lo = tl.where(first_key + BN > terms.seq_k, tl.maximum(hi, full_lo), full_lo)
    pending = NOBODYS
    if EDGE == 0:
        dk, dv, pending = _dkdv_tiles(
            dk, dv, pending, k, v, Q, DO, LSE, DELTA, SLOPES, sums, q_head_stride, do_head_stride, lse_head_stride,
            lo, hi, first_head, group, keys, terms, LEFT, RIGHT, LEFT or RIGHT or SUM > 0,
            FORM, BM, BN, None, DESCRIPTORS, SUM,
        )  # fmt: skip
    else:
        full_hi = tl.maximum(full_hi, full_lo)
        if RIGHT or SUM > 0:
            dk, dv, pending = _dkdv_tiles(
                dk, dv, pending, k, v, Q, DO, LSE, DELTA, SLOPES, sums, q_head_stride, do_head_stride, lse_head_stride,
                lo, tl.minimum(full_lo, hi), first_head, group, keys, terms, LEFT, RIGHT, True,
                FORM, BM, BN, EDGE, DESCRIPTORS, SUM,
            )  # fmt: skip
        dk, dv, pending = _dkdv_tiles(
            dk, dv, pending, k, v, Q, DO, LSE, DELTA, SLOPES, sums, q_head_stride, do_head_stride, lse_head_stride,
            full_lo, tl.minimum(full_hi, hi), first_head, group, keys, terms, LEFT, RIGHT, False,
            FORM, BM, BN, None, DESCRIPTORS, SUM,
        )  # fmt: skip
        if LEFT:
            dk, dv, pending = _dkdv_tiles(
                dk, dv, pending, k, v, Q, DO, LSE, DELTA, SLOPES, sums, q_head_stride, do_head_stride, lse_head_stride,
                full_hi, hi, first_head, group, keys, terms, LEFT, RIGHT, True,
                FORM, BM, BN, EDGE, DESCRIPTORS, SUM,
            )  # fmt: skip
    if SUM == 2:
        count_tile(sums, pending)
    return dk, dv
