"""Triton functions for dQ as a sum in memory: the kernel of dK and dV adds dS K of its keys to it, five products in all.

SUM is a constant of that kernel: APART leaves dQ to a kernel of its own, ADDED adds in the order in which programs come,
ORDERED adds in the order of the keys, from the last to the first, so that each run gives the same bits. With ONLY_DK or
ONLY_DV it leaves dQ, and dV or dK, to others: a pass for each has registers for wide heads, and computes S again.

The sums are a buffer of our own, fp32 [batch, heads, rows, WIDTH] with rows to spare behind each sequence: whole tiles are
added without masks, and one address a thread is enough. `_attention_launch.py` makes it and reads it.

ORDERED: each tile of queries has a count of the key tiles that have been added to it. A program waits until the count is
the number of tiles before its own (as FlashAttention 3 does where it is asked to be deterministic). It can wait for ever
only for a program that does not run. So a program takes its place in the row from a counter when it begins: those before it
have begun, and by the same argument none of them waits for ever. Under a causal mask a program of later keys begins at later
queries and is ahead of the one that waits for it by BN / BM tiles, so that in the main it does not wait.
"""

from typing import NamedTuple

from flagscale_kernels._triton import interpreting, tl, triton

APART, ADDED, ORDERED = 0, 1, 2
ONLY_DK, ONLY_DV = -1, -2
NO_DV, NO_DK = tl.constexpr(ONLY_DK), tl.constexpr(ONLY_DV)  # the values of SUM that leave a gradient out
_INTERPRETED = tl.constexpr(interpreting())

# Each thread reads the count until it is the given number. Labels and registers are local to the braces.
_WAIT = tl.constexpr("""{
    .reg .pred later;
    AGAIN:
    ld.acquire.gpu.global.b32 $0, [$1];
    setp.ne.b32 later, $0, $2;
    @later bra AGAIN;
}""")
# All threads of the block have added; then one counts. Triton's own barrier would keep the loop from being pipelined.
_COUNT = tl.constexpr("""{
    .reg .pred one;
    mov.u32 $0, %tid.x;
    setp.eq.u32 one, $0, 0;
    bar.sync 0;
    @one red.release.gpu.global.add.s32 [$1], 1;
}""")


class Sums(NamedTuple):
    """Where a program adds to dQ, and its place in the order."""

    base: tl.tensor  # of the sequence's sums, head 0
    head_stride: tl.tensor
    order: tl.tensor  # the counter of programs, a count that nobody reads, the counts
    counts: tl.tensor  # the place in `order` of the count of the sequence's first tile of queries, head 0
    tiles: tl.tensor  # of queries, of a head
    tile: tl.tensor  # this program's tile of keys


NOBODYS = tl.constexpr(1)  # the place of the count that nobody reads


@triton.jit
def place(ORDER, tiles, SUM: tl.constexpr):
    """The index of this program, or its place in the row: the tiles of a head from the last to the first."""
    index = tl.program_id(0)
    if SUM == 2:
        taken = tl.atomic_add(ORDER, 1, sem="relaxed")
        index = taken // tiles * tiles + (tiles - 1 - taken % tiles)
    return index


@triton.jit
def sums_of(
    DQ, ORDER, entry, start, entry_stride, head_stride, heads, max_q, tile,
    BAND: tl.constexpr, BANDS: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The Sums of band BAND of a batch entry, whose sequence begins at token `start` of a pack."""
    tiles = (max_q + BM - 1) // BM
    counts = 2 + tl.cast((entry * BANDS + BAND) * heads * tiles, tl.int32)
    return Sums(DQ + entry * entry_stride + start * WIDTH, head_stride, ORDER, counts, tiles, tile)


@triton.jit
def count_tile(sums, pending):
    """Add 1 to the count at place `pending`, whose sums all threads have added to."""
    if _INTERPRETED:
        tl.atomic_add(sums.order + pending, 1)
    else:
        COUNT = (sums.order + pending).to(tl.int64)
        tl.inline_asm_elementwise(_COUNT, "=&r,l", [COUNT], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _await(COUNT, before):
    """Wait until COUNT is `before`, and return it. The interpreter, which runs programs one by one, does not wait."""
    if _INTERPRETED:
        count = tl.load(COUNT)
    else:
        count = tl.inline_asm_elementwise(
            _WAIT, "=&r,l,r", [COUNT.to(tl.int64), before], dtype=tl.int32, is_pure=False, pack=1
        )
    return count


@triton.jit
def _add(X, first, column, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    tl.atomic_add(X + tl.cast(first, tl.int64) * WIDTH + rows[:, None] * WIDTH + columns[None, :], x, sem="relaxed")


@triton.jit
def add_to_dq(
    sums, pending, head, m, last_key, x, A: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Add x, a pair of tiles, to rows m .. m + BM of a head. `last_key` is the last that a row of m .. m + BM may see.

    ORDERED: `pending` is the count of the tile that this program has added to before, and the result that of this one. It
    is counted a tile later, because the counting waits until the sums have reached memory.
    """
    a, b = x
    if SUM == 2:
        count_tile(sums, pending)
        pending = sums.counts + tl.cast(head, tl.int32) * sums.tiles + m // BM
        before = last_key // BN - sums.tile
        count = _await(sums.order + pending, before)
        if _INTERPRETED:  # a wrong order shows
            a = tl.where(count == before, a, float("nan"))
    WIDTH: tl.constexpr = A * 2 if B > 0 else A
    base = sums.base + head * sums.head_stride
    _add(base, m, 0, a, BM, A, WIDTH)
    if B > 0:
        _add(base, m, A, b, BM, B, WIDTH)
    return pending
