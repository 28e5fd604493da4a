r"""The kernels of RMSNorm and LayerNorm: with CENTER a row's mean is taken off first, and a bias may be added last.

    x^ = (x - m) r        y = (offset + w) x^ + b        m = 0 without CENTER

Backward, with g = dy (offset + w) and the means over a row:

    dx = r (g - mean(g) - x^ mean(g x^))        dw = sum over rows of dy x^        db = sum over rows of dy

mean(g) is 0 without CENTER. Memory traffic limits the speed. In the backward a fixed number of programs each process a
share of the rows and sum their part of dw and db. They write a [programs, h] buffer of partial sums, without a [rows, h]
buffer and without atomics, so the result is the same on every run.

A row that the registers hold is one tile, which is read once. Longer rows are read in parts, twice (thrice by LayerNorm's
forward), and a program's rows are so few that the second reading comes from the L2 cache. There the partial sums lie in
memory, and are added to once for each group of rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flagscale_kernels._rows import as_rows, row_start
from flagscale_kernels._triton import cdiv, next_power_of_2, sm_count, tl, triton

SHORT_TILE = 2048  # elements of a tile when rows are short
FORWARD_ROW, BACKWARD_ROW = 32768, 8192  # the longest rows that are one tile: longer ones would spill registers
PARTS_TILE = 4096  # elements of a tile when rows are longer
GROUP_ELEMENTS = 32768  # of the rows that a program reads twice: in bf16 x and dy take 128 KiB of the L2 cache
SM_WARPS = 16  # in the backward, on each multiprocessor: 128 registers a thread


@triton.jit
def _load_sum(X, R, OUT, mask, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to the output's dtype, of the pointers X and R."""
    x = tl.load(X, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(R, mask=mask, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(OUT.dtype.element_ty)
    return x


@triton.jit
def _scaled(normed, W, B, OUT, cols, h, offset, HF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(offset + w) normed + b of a tile [rows, cols], rounded to the output's dtype; HF rounds `normed` before."""
    if HF:
        normed = normed.to(OUT.dtype.element_ty).to(tl.float32)
    w = tl.load(W + cols, mask=cols < h, other=0.0).to(tl.float32) + offset
    y = normed * w[None, :]
    if HAS_BIAS:
        y += tl.load(B + cols, mask=cols < h, other=0.0).to(tl.float32)[None, :]
    return y.to(OUT.dtype.element_ty)


@triton.jit
def norm_forward_kernel(
    X, R, W, B, Y, Z, MEAN, RSTD, n, h, eps, offset,
    x_inner, x_outer_stride, x_inner_stride, r_inner, r_outer_stride, r_inner_stride,
    HAS_RESIDUAL: tl.constexpr, CENTER: tl.constexpr, HAS_BIAS: tl.constexpr, HF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < n)[:, None] & (cols < h)[None, :]
    out = rows.to(tl.int64)[:, None] * h + cols[None, :]
    x_offsets = row_start(rows, x_inner, x_outer_stride, x_inner_stride)[:, None] + cols[None, :]
    r_offsets = row_start(rows, r_inner, r_outer_stride, r_inner_stride)[:, None] + cols[None, :]
    x = _load_sum(X + x_offsets, R + r_offsets, Z, mask, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        tl.store(Z + out, x, mask=mask)
    wide = x.to(tl.float32)
    if CENTER:
        mean = tl.sum(wide, axis=1) / h
        tl.store(MEAN + rows, mean, mask=rows < n)
        wide = tl.where(mask, wide - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / h + eps)
    tl.store(RSTD + rows, rstd, mask=rows < n)
    tl.store(Y + out, _scaled(wide * rstd[:, None], W, B, Y, cols, h, offset, HF, HAS_BIAS), mask=mask)


@triton.jit
def norm_forward_parts_kernel(
    X, R, W, B, Y, Z, MEAN, RSTD, n, h, eps, offset,
    x_inner, x_outer_stride, x_inner_stride, r_inner, r_outer_stride, r_inner_stride,
    HAS_RESIDUAL: tl.constexpr, CENTER: tl.constexpr, HAS_BIAS: tl.constexpr, HF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """norm_forward_kernel of one row that is read in parts of BLOCK columns. ROWS is 1."""
    row = tl.program_id(0)
    X += row_start(row, x_inner, x_outer_stride, x_inner_stride)
    R += row_start(row, r_inner, r_outer_stride, r_inner_stride)
    Y += row.to(tl.int64) * h
    Z += row.to(tl.int64) * h
    mean = 0.0
    if CENTER:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, h, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            total += _load_sum(X + cols, R + cols, Z, cols < h, HAS_RESIDUAL).to(tl.float32)
        mean = tl.sum(total, axis=0) / h
        tl.store(MEAN + row, mean)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, h, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = _load_sum(X + cols, R + cols, Z, cols < h, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(Z + cols, x, mask=cols < h)
        wide = tl.where(cols < h, x.to(tl.float32) - mean, 0.0)
        squares += wide * wide
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / h + eps)
    tl.store(RSTD + row, rstd)
    for first in range(0, h, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = _load_sum(X + cols, R + cols, Z, cols < h, HAS_RESIDUAL)
        normed = ((x.to(tl.float32) - mean) * rstd)[None, :]
        y = _scaled(normed, W, B, Y, cols, h, offset, HF, HAS_BIAS)
        tl.store(Y + cols[None, :], y, mask=(cols < h)[None, :])


@triton.jit
def norm_backward_kernel(
    DY, X, W, MEAN, RSTD, DZ, DX, DW, DB, n, h, offset,
    dy_inner, dy_outer_stride, dy_inner_stride, x_inner, x_outer_stride, x_inner_stride,
    dz_inner, dz_outer_stride, dz_inner_stride,
    HAS_DZ: tl.constexpr, CENTER: tl.constexpr, HAS_BIAS: tl.constexpr, HF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    w = (tl.load(W + cols, mask=cols < h, other=0.0).to(tl.float32) + offset)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    # Stages: the next rows travel to shared memory while these are summed, so that no warp waits for memory.
    for first in tl.range(pid * ROWS, n, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & (cols < h)[None, :]
        x_offsets = row_start(rows, x_inner, x_outer_stride, x_inner_stride)[:, None] + cols[None, :]
        dy_offsets = row_start(rows, dy_inner, dy_outer_stride, dy_inner_stride)[:, None] + cols[None, :]
        x = tl.load(X + x_offsets, mask=mask, other=0.0)
        dy = tl.load(DY + dy_offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + rows, mask=rows < n, other=0.0)[:, None]
        normed = x.to(tl.float32) * rstd
        if CENTER:
            normed -= (tl.load(MEAN + rows, mask=rows < n, other=0.0)[:, None]) * rstd
        if HF:
            dw += dy * normed.to(x.dtype).to(tl.float32)
        else:
            dw += dy * normed
        if HAS_BIAS:
            db += dy
        g = dy * w
        dx = g - normed * (tl.sum(g * normed, axis=1) / h)[:, None]
        if CENTER:
            dx -= (tl.sum(g, axis=1) / h)[:, None]
        dx *= rstd
        if HAS_DZ:
            dz_offsets = row_start(rows, dz_inner, dz_outer_stride, dz_inner_stride)[:, None] + cols[None, :]
            dx += tl.load(DZ + dz_offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + rows.to(tl.int64)[:, None] * h + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    tl.store(DW + pid * h + cols, tl.sum(dw, axis=0), mask=cols < h)
    if HAS_BIAS:
        tl.store(DB + pid * h + cols, tl.sum(db, axis=0), mask=cols < h)


@triton.jit
def _load_normed_and_dy(X, DY, mean, rstd, mask, CENTER: tl.constexpr):
    normed = tl.load(X, mask=mask, other=0.0).to(tl.float32)
    if CENTER:
        normed -= mean
    return normed * rstd, tl.load(DY, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_backward_parts_kernel(
    DY, X, W, MEAN, RSTD, DZ, DX, DW, DB, n, h, offset,
    dy_inner, dy_outer_stride, dy_inner_stride, x_inner, x_outer_stride, x_inner_stride,
    dz_inner, dz_outer_stride, dz_inner_stride,
    HAS_DZ: tl.constexpr, CENTER: tl.constexpr, HAS_BIAS: tl.constexpr, HF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """norm_backward_kernel of ROWS rows that are read in parts of BLOCK columns. DW and DB hold zeros before.

    STAGES has no meaning here.
    """
    DW += tl.program_id(0) * h
    DB += tl.program_id(0) * h
    for first_row in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first_row + tl.arange(0, ROWS)
        here = (rows < n)[:, None]
        x_rows = X + row_start(rows, x_inner, x_outer_stride, x_inner_stride)[:, None]
        dy_rows = DY + row_start(rows, dy_inner, dy_outer_stride, dy_inner_stride)[:, None]
        dz_rows = DZ + row_start(rows, dz_inner, dz_outer_stride, dz_inner_stride)[:, None]
        dx_rows = DX + rows.to(tl.int64)[:, None] * h
        rstd = tl.load(RSTD + rows, mask=rows < n, other=0.0)[:, None]
        mean = rstd
        if CENTER:
            mean = tl.load(MEAN + rows, mask=rows < n, other=0.0)[:, None]
        along = tl.zeros([ROWS, BLOCK], tl.float32)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(0, h, BLOCK):
            cols = first + tl.arange(0, BLOCK)[None, :]
            mask = here & (cols < h)
            normed, dy = _load_normed_and_dy(x_rows + cols, dy_rows + cols, mean, rstd, mask, CENTER)
            g = dy * (tl.load(W + cols, mask=cols < h, other=0.0).to(tl.float32) + offset)
            along += g * normed
            if CENTER:
                total += g
        along_mean = (tl.sum(along, axis=1) / h)[:, None]
        total_mean = (tl.sum(total, axis=1) / h)[:, None]
        for first in range(0, h, BLOCK):
            part = first + tl.arange(0, BLOCK)
            cols = part[None, :]
            mask = here & (cols < h)
            normed, dy = _load_normed_and_dy(x_rows + cols, dy_rows + cols, mean, rstd, mask, CENTER)
            g = dy * (tl.load(W + cols, mask=cols < h, other=0.0).to(tl.float32) + offset)
            dx = (g - total_mean - normed * along_mean) * rstd
            if HAS_DZ:
                dx += tl.load(dz_rows + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_rows + cols, dx.to(DX.dtype.element_ty), mask=mask)
            if HF:
                normed = normed.to(X.dtype.element_ty).to(tl.float32)
            dw = tl.sum(dy * normed, axis=0) + tl.load(DW + part, mask=part < h, other=0.0)
            tl.store(DW + part, dw, mask=part < h)
            if HAS_BIAS:
                db = tl.sum(dy, axis=0) + tl.load(DB + part, mask=part < h, other=0.0)
                tl.store(DB + part, db, mask=part < h)


# ---------------------------------------------------------------------------------------------------------- launchers


class Tile(NamedTuple):
    """rows by columns of a tile, its warps, and whether a row takes several tiles."""

    rows: int
    block: int
    warps: int
    parts: bool


def forward_tile(h: int) -> Tile:
    """The tile of the forward for rows of length h."""
    block = next_power_of_2(h)
    if block > FORWARD_ROW:
        return Tile(1, PARTS_TILE, 8, True)
    rows = max(1, SHORT_TILE // block)
    return Tile(rows, block, min(32, max(1, rows * block // 1024)), False)


def backward_tile(h: int) -> Tile:
    """The tile of the backward for rows of length h."""
    block = next_power_of_2(h)
    if block > BACKWARD_ROW:
        rows = max(1, GROUP_ELEMENTS // block)
        return Tile(rows, PARTS_TILE // rows, 8, True)
    rows = max(1, SHORT_TILE // block)
    return Tile(rows, block, min(16, max(1, rows * block // 512)), False)


class Norm(NamedTuple):
    """What a norm is: eps; what is added to the weight; whether it takes off the mean; HF's rounding before the weight."""

    eps: float
    offset: float
    center: bool
    hf: bool


def launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, norm: Norm):
    """(y, z, mean, rstd): z is y without a residual, and mean is rstd without centring."""
    h = x.shape[-1]
    tile = forward_tile(h)
    xr = as_rows(x)
    rr = xr if residual is None else as_rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    z = y if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if norm.center else rstd
    if xr.n:
        kernel = norm_forward_parts_kernel if tile.parts else norm_forward_kernel
        kernel[(cdiv(xr.n, tile.rows),)](
            xr.tensor, rr.tensor, weight, weight if bias is None else bias, y, z, mean, rstd, xr.n, h,
            norm.eps, norm.offset, *xr.addressing, *rr.addressing,
            HAS_RESIDUAL=residual is not None, CENTER=norm.center, HAS_BIAS=bias is not None, HF=norm.hf,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    return y, z, mean, rstd


def launch_backward(dy, x, weight, mean, rstd, dz, norm: Norm, *, bias: bool = False):
    """(dx, dw, db): db is None without a bias. dz, or None, is added to dx."""
    h = x.shape[-1]
    tile = backward_tile(h)
    xr, dyr = as_rows(x), as_rows(dy)
    dzr = xr if dz is None else as_rows(dz)
    programs = min(cdiv(xr.n, tile.rows), sm_count(x.device) * (SM_WARPS // tile.warps)) or 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty((2 if bias else 1, programs, h), dtype=torch.float32, device=x.device)
    if tile.parts:
        partial.zero_()
    kernel = norm_backward_parts_kernel if tile.parts else norm_backward_kernel
    kernel[(programs,)](
        dyr.tensor, xr.tensor, weight, mean, rstd, dzr.tensor, dx, partial[0], partial[-1], xr.n, h, norm.offset,
        *dyr.addressing, *xr.addressing, *dzr.addressing,
        HAS_DZ=dz is not None, CENTER=norm.center, HAS_BIAS=bias, HF=norm.hf,
        ROWS=tile.rows, BLOCK=tile.block, STAGES=3 if x.element_size() == 2 else 2, num_warps=tile.warps,
    )  # fmt: skip
    sums = partial.sum(1).to(weight.dtype)
    return dx, sums[0], sums[1] if bias else None
