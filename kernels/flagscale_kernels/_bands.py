r"""Triton functions for attention over one band of keys. Flash attention has one band, piecewise attention two.

Query i has position p = i + (seq_k - seq_q), which aligns the last query with the last key. It attends to the keys of
its band, p - left <= j <= p + right; either bound is optional. With s_ij = scale q_i . k_j (- slope |p - j| for ALiBi,
Press et al. 2022, arXiv:2108.12409), the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al.
2022, arXiv:2205.14135) keeps for each row the maximum m, the sum l of exp(s - m), and the weighted sum of v. Backward,
with P = exp(s - lse), dP = dO V^T and delta_i = sum_d o_id do_id - dlse_i:

    dS = P (dP - delta)      dV = P^T dO      dQ = scale dS K      dK = scale dS^T Q

exp is computed as exp2; `qk_scale` is scale * log2(e). The caller divides ALiBi slopes by the scale. Tiles that lie
inside the band need no mask. The loops over the few tiles at its edges have their own pipeline depth, EDGE, because the
depth of the main loop would spill registers there. Token offsets are 64-bit: a [s, b, n, d] tensor with a long sequence
has more than 2^31 elements.
"""

from flagscale_kernels._triton import tl, triton


@triton.jit
def program(length, tile: tl.constexpr, heads):
    """(tile, head, batch entry) of this program. The grid has one dimension, as the others hold at most 65,535."""
    tiles = (length + tile - 1) // tile
    index = tl.program_id(0)
    rest = index // tiles
    return index % tiles, tl.cast(rest % heads, tl.int64), tl.cast(rest // heads, tl.int64)


@triton.jit
def load_rows(base, first, count, stride, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Load [ROWS, BD] from row `first`, with zeros in columns from D on and, if MASKED, in rows from `count` on."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BD)
    pointers = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    if MASKED:
        if D == BD:
            x = tl.load(pointers, mask=(first + rows < count)[:, None], other=0.0)
        else:
            x = tl.load(pointers, mask=(first + rows < count)[:, None] & (cols < D)[None, :], other=0.0)
    elif D == BD:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(cols < D)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(base, first, count, stride, x, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """Store x [ROWS, BD] from row `first` on, without rows from `count` on and columns from D on."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BD)
    pointers = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    mask = (first + rows < count)[:, None] & (cols < D)[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _inside(distance, n, seq_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether each pair is in the band; `distance` is p - j, negative for a key after the query."""
    ok = n < seq_k
    if HAS_LEFT:
        ok = ok & (distance <= left)
    if HAS_RIGHT:
        ok = ok & (distance >= -right)
    return ok


# ------------------------------------------------------------------------------------------ forward and dQ: over keys


@triton.jit
def _key_range(
    first_pos, last_pos, seq_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BN: tl.constexpr
):
    """[lo, hi) holds every key that a row of first_pos .. last_pos sees; [full_lo, full_hi) keys that all of them see."""
    lo = 0
    full_lo = 0
    hi = seq_k
    full_hi = seq_k
    if HAS_LEFT:
        lo = tl.maximum(first_pos - left, 0) // BN * BN
        full_lo = (tl.maximum(last_pos - left, 0) + BN - 1) // BN * BN
    if HAS_RIGHT:
        hi = tl.minimum(seq_k, last_pos + right + 1)
        full_hi = tl.minimum(seq_k, tl.maximum(first_pos + right + 1, 0))
    full_hi = tl.maximum(full_hi // BN * BN, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def _attend_tile(
    acc, l, m, q, K, V, k_stride, v_stride, n, pos, seq_k, qk_scale, slope, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = load_rows(K, n, seq_k, k_stride, D, BN, BD, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED or HAS_ALIBI:
        keys = n + tl.arange(0, BN)[None, :]
        distance = pos[:, None] - keys
        if HAS_ALIBI:
            s -= slope * tl.abs(distance).to(tl.float32)
        if MASKED:
            s = tl.where(_inside(distance, keys, seq_k, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1) * qk_scale)
    # A masked row may have seen no key yet.
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m) if MASKED else new_m
    p = tl.exp2(s * qk_scale - safe_m[:, None])
    alpha = tl.exp2(m - safe_m)
    l = l * alpha + tl.sum(p, 1)
    v = load_rows(V, n, seq_k, v_stride, D, BN, BD, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, l, new_m


@triton.jit
def attend_band(
    acc, l, m, q, K, V, k_stride, v_stride, pos, first_pos, last_pos, seq_k, qk_scale, slope, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Update (acc, l, m) of a tile of queries with the keys of its band."""
    lo, full_lo, full_hi, hi = _key_range(first_pos, last_pos, seq_k, left, right, HAS_LEFT, HAS_RIGHT, BN)
    if HAS_LEFT:
        for n in tl.range(lo, tl.minimum(full_lo, hi), BN, num_stages=EDGE):
            acc, l, m = _attend_tile(
                acc, l, m, q, K, V, k_stride, v_stride, n, pos, seq_k, qk_scale, slope, left, right,
                HAS_LEFT, HAS_RIGHT, HAS_ALIBI, True, D, BN, BD, PRECISION,
            )  # fmt: skip
    for n in range(full_lo, full_hi, BN):
        acc, l, m = _attend_tile(
            acc, l, m, q, K, V, k_stride, v_stride, n, pos, seq_k, qk_scale, slope, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_ALIBI, False, D, BN, BD, PRECISION,
        )  # fmt: skip
    for n in tl.range(full_hi, hi, BN, num_stages=EDGE):
        acc, l, m = _attend_tile(
            acc, l, m, q, K, V, k_stride, v_stride, n, pos, seq_k, qk_scale, slope, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_ALIBI, True, D, BN, BD, PRECISION,
        )  # fmt: skip
    return acc, l, m


@triton.jit
def _dq_tile(
    dq, q, do, lse, delta, K, V, k_stride, v_stride, n, pos, seq_k, qk_scale, slope, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = load_rows(K, n, seq_k, k_stride, D, BN, BD, MASKED)
    v = load_rows(V, n, seq_k, v_stride, D, BN, BD, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED or HAS_ALIBI:
        keys = n + tl.arange(0, BN)[None, :]
        distance = pos[:, None] - keys
        if HAS_ALIBI:
            s -= slope * tl.abs(distance).to(tl.float32)
        if MASKED:
            s = tl.where(_inside(distance, keys, seq_k, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
    p = tl.exp2(s * qk_scale - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def dq_band(
    dq, q, do, lse, delta, K, V, k_stride, v_stride, pos, first_pos, last_pos, seq_k, qk_scale, slope, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add dS K over the band to dq; the caller multiplies by the softmax scale. lse is in base 2, +inf for an empty row."""
    lo, full_lo, full_hi, hi = _key_range(first_pos, last_pos, seq_k, left, right, HAS_LEFT, HAS_RIGHT, BN)
    if HAS_LEFT:
        for n in tl.range(lo, tl.minimum(full_lo, hi), BN, num_stages=EDGE):
            dq = _dq_tile(
                dq, q, do, lse, delta, K, V, k_stride, v_stride, n, pos, seq_k, qk_scale, slope, left, right,
                HAS_LEFT, HAS_RIGHT, HAS_ALIBI, True, D, BN, BD, PRECISION,
            )  # fmt: skip
    for n in range(full_lo, full_hi, BN):
        dq = _dq_tile(
            dq, q, do, lse, delta, K, V, k_stride, v_stride, n, pos, seq_k, qk_scale, slope, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_ALIBI, False, D, BN, BD, PRECISION,
        )  # fmt: skip
    for n in tl.range(full_hi, hi, BN, num_stages=EDGE):
        dq = _dq_tile(
            dq, q, do, lse, delta, K, V, k_stride, v_stride, n, pos, seq_k, qk_scale, slope, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_ALIBI, True, D, BN, BD, PRECISION,
        )  # fmt: skip
    return dq


# --------------------------------------------------------------------------------------------- dK and dV: over queries


@triton.jit
def _dkdv_tile(
    dk, dv, k, v, Q, DO, LSE, DELTA, q_stride, do_stride, m, keys, offset, seq_q, seq_k, qk_scale, slope, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = m + tl.arange(0, BM)
    # Rows beyond seq_q need no band mask: their lse is +inf, so p is 0.
    q = load_rows(Q, m, seq_q, q_stride, D, BM, BD, True)
    lse = tl.load(LSE + rows, mask=rows < seq_q, other=float("inf"))
    delta = tl.load(DELTA + rows, mask=rows < seq_q, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
    if MASKED or HAS_ALIBI:
        distance = (rows + offset)[None, :] - keys[:, None]
        if HAS_ALIBI:
            s -= slope * tl.abs(distance).to(tl.float32)
        if MASKED:
            ok = _inside(distance, keys[:, None], seq_k, left, right, HAS_LEFT, HAS_RIGHT)
            s = tl.where(ok, s, float("-inf"))
    p = tl.exp2(s * qk_scale - lse[None, :])
    do = load_rows(DO, m, seq_q, do_stride, D, BM, BD, True)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkdv_tiles(
    dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, q_head_stride, q_stride, do_head_stride, do_stride, lse_head_stride,
    lo, hi, first_head, group, keys, offset, seq_q, seq_k, qk_scale, inverse_scale, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Process query tiles [lo, hi) of every query head of the group in one loop: two nested loops need more registers."""
    tiles = tl.maximum((hi - lo + BM - 1) // BM, 0)
    for i in range(0, tiles * group):
        head = tl.cast(first_head + i // tiles, tl.int64)
        m = lo + (i % tiles) * BM
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(SLOPES + head).to(tl.float32) * inverse_scale
        dk, dv = _dkdv_tile(
            dk, dv, k, v, Q + head * q_head_stride, DO + head * do_head_stride, LSE + head * lse_head_stride,
            DELTA + head * lse_head_stride, q_stride, do_stride, m, keys, offset, seq_q, seq_k, qk_scale, slope,
            left, right, HAS_LEFT, HAS_RIGHT, HAS_ALIBI, MASKED, D, BM, BD, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit
def dkdv_band(
    dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, q_head_stride, q_stride, do_head_stride, do_stride, lse_head_stride,
    first_head, group, first_key, offset, seq_q, seq_k, qk_scale, inverse_scale, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q to dk and P^T dO to dv for a group of query heads; the caller multiplies dk by the softmax scale.

    `offset` is seq_k - seq_q: query m has position m + offset.
    """
    keys = first_key + tl.arange(0, BN)
    last_key = tl.minimum(first_key + BN, seq_k) - 1
    lo = 0
    hi = seq_q
    if HAS_RIGHT:  # query m sees the key if m + offset + right >= key
        lo = tl.maximum(first_key - right - offset, 0) // BM * BM
    if HAS_LEFT:  # and if m + offset - left <= key
        hi = tl.minimum(seq_q, last_key + left - offset + 1)
    dk, dv = _dkdv_tiles(
        dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, q_head_stride, q_stride, do_head_stride, do_stride,
        lse_head_stride, lo, hi, first_head, group, keys, offset, seq_q, seq_k, qk_scale,
        inverse_scale, left, right, HAS_LEFT, HAS_RIGHT, HAS_ALIBI, HAS_LEFT or HAS_RIGHT, D, BM, BD, PRECISION,
    )  # fmt: skip
    return dk, dv


# ------------------------------------------------------------------------------------------------------------- shared


@triton.jit(do_not_specialize=["seq_q"])
def delta_kernel(
    O, DO, LSE, DLSE, LSE2, DELTA, CU_SEQLENS_Q, seq_q, heads,
    o_batch_stride, o_head_stride, o_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    lse_batch_stride, lse_head_stride,
    HAS_DLSE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store delta = sum_d o do - dlse, and the LSE in base 2, +inf for a row without keys so that exp2(s - lse) is 0."""
    if WIDE:
        o_seq_stride = tl.cast(o_seq_stride, tl.int64)
        do_seq_stride = tl.cast(do_seq_stride, tl.int64)
    tile, head, batch = program(seq_q, BM, heads)
    first = tile * BM
    start = batch * 0
    if PACKED:
        start = tl.load(CU_SEQLENS_Q + batch).to(tl.int64)
        seq_q = (tl.load(CU_SEQLENS_Q + batch + 1) - start).to(tl.int32)
        batch = batch * 0
    O += batch * o_batch_stride + head * o_head_stride + start * o_seq_stride
    DO += batch * do_batch_stride + head * do_head_stride + start * do_seq_stride
    row = batch * lse_batch_stride + head * lse_head_stride + start
    rows = first + tl.arange(0, BM)
    o = load_rows(O, first, seq_q, o_seq_stride, D, BM, BD, True).to(tl.float32)
    do = load_rows(DO, first, seq_q, do_seq_stride, D, BM, BD, True).to(tl.float32)
    delta = tl.sum(o * do, axis=1)
    if HAS_DLSE:
        delta -= tl.load(DLSE + row + rows, mask=rows < seq_q, other=0.0)
    tl.store(DELTA + row + rows, delta, mask=rows < seq_q)
    lse = tl.load(LSE + row + rows, mask=rows < seq_q, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(LSE2 + row + rows, lse, mask=rows < seq_q)
