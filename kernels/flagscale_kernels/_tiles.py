"""Triton functions for one tile of attention: loading, products, masks and the scores' other terms.

A matrix of D columns is held in one tile or, where its next power of two would waste a quarter or more, in two side by
side: 96 columns are 64 + 32, 192 are 128 + 64. Functions on such matrices take and return pairs of tiles; the second is
not used where the first holds all columns.

Token offsets are 64-bit: a [s, b, n, d] tensor with a long sequence has more than 2^31 elements. Inside a tile they are
32-bit unless the strides need more (`Form.wide`), as they take registers.
"""

from typing import NamedTuple

from flagscale_kernels._triton import tl, triton


class Form(NamedTuple):
    """What the code of a kernel depends on, besides its tile. A kernel is compiled once for each."""

    d: int  # columns of q and k
    d_a: int  # columns of their first tile
    d_b: int  # columns of their second tile, 0 without one
    v: int  # columns of v and o
    v_a: int
    v_b: int
    left: bool  # flash attention's band has a left bound
    right: bool  # the band has a right bound; in piecewise attention: causal
    alibi: bool
    cap: bool  # the scores are capped
    sinks: bool
    packed: bool
    wide: bool  # offsets inside a tile need 64 bits
    precision: str  # of products of fp32


class Rows(NamedTuple):
    """The rows of a sequence and head: a pointer to the first and the stride, or a descriptor and the indices."""

    base: tl.tensor
    stride: tl.tensor
    batch: tl.tensor
    head: tl.tensor


class Terms(NamedTuple):
    """The numbers that masks and scores need. Scores are in units of 1 / softmax scale until exp2."""

    seq_q: tl.tensor
    seq_k: tl.tensor
    left: tl.tensor
    right: tl.tensor
    slope: tl.tensor  # of ALiBi, over the softmax scale
    to_cap: tl.tensor  # 2 log2(e) scale / cap
    from_cap: tl.tensor  # cap / scale
    to_log2: tl.tensor  # scale log2(e): from scores to the exponents of exp2


@triton.jit
def program(index, length, tile: tl.constexpr, heads):
    """(tile, head, batch entry) of program `index`. The grid has one dimension, as the others hold at most 65,535."""
    tiles = (length + tile - 1) // tile
    rest = index // tiles
    return index % tiles, tl.cast(rest % heads, tl.int64), tl.cast(rest // heads, tl.int64)


@triton.jit
def sequence(CU_SEQLENS, entry, length, PACKED: tl.constexpr):
    """(batch index, first token, length) of a batch entry. The entries of a pack are sequences of batch index 0."""
    batch = entry
    start = entry * 0
    if PACKED:
        start = tl.load(CU_SEQLENS + entry).to(tl.int64)
        length = (tl.load(CU_SEQLENS + entry + 1) - start).to(tl.int32)
        batch = entry * 0
    return batch, start, length


@triton.jit
def rows_at(X, batch, head, start, batch_stride, head_stride, seq_stride, WIDE: tl.constexpr):
    """The Rows of a head of a sequence, by a pointer."""
    base = X + batch * batch_stride + head * head_stride + start * seq_stride
    if WIDE:
        seq_stride = tl.cast(seq_stride, tl.int64)
    return Rows(base, seq_stride, 0, 0)


@triton.jit
def rows_of(X, batch, head, start, batch_stride, head_stride, seq_stride, WIDE: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """The Rows of a head of a sequence, by a pointer or by the descriptor of a whole [b, n, s, d] tensor."""
    if DESCRIPTOR:
        rows = Rows(X, 0, tl.cast(batch, tl.int32), tl.cast(head, tl.int32))
    else:
        rows = rows_at(X, batch, head, start, batch_stride, head_stride, seq_stride, WIDE)
    return rows


@triton.jit
def of_head(rows, head, head_stride, DESCRIPTOR: tl.constexpr):
    """The Rows of `head`, from those of head 0."""
    if DESCRIPTOR:
        found = Rows(rows.base, rows.stride, rows.batch, tl.cast(head, tl.int32))
    else:
        found = Rows(rows.base + head * head_stride, rows.stride, rows.batch, rows.head)
    return found


@triton.jit
def _load(
    src, first, count, column, LIMIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """[ROWS, WIDTH] from row `first` on, with zeros in columns from LIMIT on and, if MASKED, in rows from `count` on."""
    rows = tl.arange(0, ROWS)
    cols = column + tl.arange(0, WIDTH)
    pointers = src.base + tl.cast(first, tl.int64) * src.stride + rows[:, None] * src.stride + cols[None, :]
    if MASKED:
        if LIMIT - column >= WIDTH:
            x = tl.load(pointers, mask=(first + rows < count)[:, None], other=0.0)
        else:
            x = tl.load(pointers, mask=(first + rows < count)[:, None] & (cols < LIMIT)[None, :], other=0.0)
    elif LIMIT - column >= WIDTH:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(cols < LIMIT)[None, :], other=0.0)
    return x


@triton.jit
def load_rows(
    src, first, count, LIMIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The pair of tiles with A and B columns of the rows from `first` on."""
    if DESCRIPTOR:  # the hardware gives zeros outside of the tensor
        a = src.base.load([src.batch, src.head, first, 0]).reshape(ROWS, A)
        b = a
    else:
        a = _load(src, first, count, 0, LIMIT, ROWS, A, MASKED)
        b = a
        if B > 0:
            b = _load(src, first, count, A, LIMIT, ROWS, B, MASKED)
    return a, b


@triton.jit
def _store(dst, first, count, column, x, LIMIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, ROWS)
    cols = column + tl.arange(0, WIDTH)
    pointers = dst.base + tl.cast(first, tl.int64) * dst.stride + rows[:, None] * dst.stride + cols[None, :]
    mask = (first + rows < count)[:, None] & (cols < LIMIT)[None, :]
    tl.store(pointers, x.to(dst.base.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(dst, first, count, x, factor, LIMIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):
    """Store factor * x, a pair of tiles, without rows from `count` on and columns from LIMIT on."""
    _store(dst, first, count, 0, x[0] * factor, LIMIT, ROWS, A)
    if B > 0:
        _store(dst, first, count, A, x[1] * factor, LIMIT, ROWS, B)


@triton.jit
def zeros(ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    a = tl.zeros([ROWS, A], tl.float32)
    b = a
    if B > 0:
        b = tl.zeros([ROWS, B], tl.float32)
    return a, b


@triton.jit
def product(x, y, B: tl.constexpr, FORM: tl.constexpr):
    """x y^T of two pairs of tiles: [rows of x, rows of y]."""
    s = tl.dot(x[0], tl.trans(y[0]), input_precision=FORM.precision)
    if B > 0:
        s = tl.dot(x[1], tl.trans(y[1]), s, input_precision=FORM.precision)
    return s


@triton.jit
def add_product(acc, p, x, B: tl.constexpr, FORM: tl.constexpr):
    """acc + p x, where acc and x are pairs of tiles."""
    a = tl.dot(p, x[0], acc[0], input_precision=FORM.precision)
    b = a
    if B > 0:
        b = tl.dot(p, x[1], acc[1], input_precision=FORM.precision)
    return a, b


@triton.jit
def _inside(positions, keys, terms, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether each pair is in the band: one comparison for each bound, as the limits are numbers of a query."""
    last = positions * 0 + (terms.seq_k - 1)
    if RIGHT:
        last = tl.minimum(last, positions + terms.right)
    ok = keys <= last
    if LEFT:
        ok = ok & (keys >= positions - terms.left)
    return ok


@triton.jit
def scores(
    x, y, positions, keys, terms, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr, FORM: tl.constexpr
):
    """(x y^T as scores, their derivative by x y^T). Positions and keys have one axis of size 1 each.

    -inf outside of the band, if MASKED. The derivative is 1 where the scores have no cap.
    """
    s = product(x, y, FORM.d_b, FORM)
    slope = 1.0
    if FORM.cap:
        # tanh(z) = 1 - 2 / (1 + exp(2 z))
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(s * terms.to_cap))
        slope = 1.0 - tanh * tanh
        s = tanh * terms.from_cap
    if FORM.alibi:
        s -= terms.slope * tl.abs(positions - keys).to(tl.float32)
    if MASKED:
        s = tl.where(_inside(positions, keys, terms, LEFT, RIGHT), s, float("-inf"))
    return s, slope


@triton.jit(do_not_specialize=["seq_q"])
def delta_kernel(
    O, DO, LSE, DLSE, LSE2, DELTA, CU_SEQLENS_Q, seq_q, heads,
    o_batch_stride, o_head_stride, o_seq_stride, do_batch_stride, do_head_stride, do_seq_stride,
    lse_batch_stride, lse_head_stride, HAS_DLSE: tl.constexpr, FORM: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store delta = sum_d o do - dlse, and the LSE in base 2, +inf for a row without keys so that exp2(s - lse) is 0."""
    tile, head, entry = program(tl.program_id(0), seq_q, BM, heads)
    first = tile * BM
    batch, start, seq_q = sequence(CU_SEQLENS_Q, entry, seq_q, FORM.packed)
    o_rows = rows_at(O, batch, head, start, o_batch_stride, o_head_stride, o_seq_stride, FORM.wide)
    do_rows = rows_at(DO, batch, head, start, do_batch_stride, do_head_stride, do_seq_stride, FORM.wide)
    o = load_rows(o_rows, first, seq_q, FORM.v, FORM.v_a, FORM.v_b, BM, True, False)
    do = load_rows(do_rows, first, seq_q, FORM.v, FORM.v_a, FORM.v_b, BM, True, False)
    delta = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), axis=1)
    if FORM.v_b > 0:
        delta += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), axis=1)
    row = batch * lse_batch_stride + head * lse_head_stride + start
    rows = first + tl.arange(0, BM)
    if HAS_DLSE:
        delta -= tl.load(DLSE + row + rows, mask=rows < seq_q, other=0.0)
    tl.store(DELTA + row + rows, delta, mask=rows < seq_q)
    lse = tl.load(LSE + row + rows, mask=rows < seq_q, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(LSE2 + row + rows, lse, mask=rows < seq_q)
