r"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), alone or fused with the residual addition before it.

    r = 1 / sqrt(mean_j x_j^2 + eps)        x^ = x r        y = w * x^

Backward, with g = dy * w (elementwise) and h the row's length:

    dx = r (g - x^ mean_j(g_j x^_j))        dw = sum over rows of dy * x^

With a residual, z = x + residual is rounded to the input's dtype and normalised, and z is returned for the next layer.
The gradient dz of z is added: dx = dresidual = dz + (the formula above).

There are two conventions for rounding in bf16. "hf" (transformers' LlamaRMSNorm) rounds x^ to the input's dtype before
it multiplies by w. "megatron" (Transformer Engine, Apex, torch.nn.RMSNorm) computes all in fp32 and rounds once.

Memory traffic limits the speed: the forward reads x and writes y; the backward reads x and dy and writes dx. In the
backward a fixed number of programs each process a share of the rows and sum their part of the weight's gradient in
registers. They write a [programs, h] buffer of partial sums, without a [rows, h] buffer and without atomics, so the
result is the same on every run.
"""

import torch
from torch import Tensor

from flagscale_kernels._checks import (
    as_rows,
    called_plainly,
    check_float,
    check_same,
    check_unit_stride,
    choose_backend,
    require,
)
from flagscale_kernels._triton import cdiv, next_power_of_2, sm_count, tl, triton

ROUNDINGS = ("hf", "megatron")
MAX_HIDDEN = 65536  # one row is one tile
TILE = 2048  # elements of a tile when rows are short


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6, rounding: str = "hf") -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounding == "hf":
        return (weight * normed.to(x.dtype)).to(x.dtype)
    return (weight.to(compute) * normed).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------- CPU path


def _forward_torch(x, weight, eps, hf):
    compute = torch.promote_types(x.dtype, torch.float32)
    # vector_norm accumulates in `compute` without a wide copy of x.
    mean_square = torch.linalg.vector_norm(x, dim=-1, dtype=compute).square_().div_(x.shape[-1])
    rstd = mean_square.add_(eps).rsqrt_()
    y = x * rstd.unsqueeze(-1)  # in `compute`: rstd is wider than x
    if hf:
        y = y.to(x.dtype)
    return y.mul_(weight).to(x.dtype), rstd  # in place: fresh memory costs more than the product


def _backward_torch(dy, x, weight, rstd, hf, dz):
    h = x.shape[-1]
    scale = rstd.unsqueeze(-1)
    normed = x * scale
    saved = normed.to(x.dtype) if hf else normed  # the factor that the forward multiplied by the weight
    dy, w = dy.to(rstd.dtype), weight.to(rstd.dtype)
    product = (dy * saved).reshape(-1, h)
    dw = product.sum(0).to(weight.dtype)
    # Sum dy w normed over a row. `saved` would add its rounding error to dx.
    inner = (product if saved is normed else (dy * normed).reshape(-1, h)).mv(w).view_as(scale)
    dx = torch.mul(dy, w, out=product.view(dy.shape)).addcmul_(normed, inner.div_(-h)).mul_(scale)
    if dz is not None:
        dx.add_(dz)
    return dx.to(x.dtype), dw


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _row_offsets(rows, inner, outer_stride, inner_stride):
    return (rows // inner).to(tl.int64) * outer_stride + (rows % inner).to(tl.int64) * inner_stride


@triton.jit
def _rms_norm_forward_kernel(
    X, R, W, Y, Z, RSTD, n, h, eps,
    x_inner, x_outer_stride, x_inner_stride, r_inner, r_outer_stride, r_inner_stride,
    HAS_RESIDUAL: tl.constexpr, HF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < n)[:, None] & (cols < h)[None, :]
    out = rows.to(tl.int64)[:, None] * h + cols[None, :]
    x_offsets = _row_offsets(rows, x_inner, x_outer_stride, x_inner_stride)[:, None] + cols[None, :]
    x = tl.load(X + x_offsets, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        r_offsets = _row_offsets(rows, r_inner, r_outer_stride, r_inner_stride)[:, None] + cols[None, :]
        r = tl.load(R + r_offsets, mask=mask, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(Z.dtype.element_ty)
        tl.store(Z + out, x, mask=mask)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / h + eps)
    tl.store(RSTD + rows, rstd, mask=rows < n)
    w = tl.load(W + cols, mask=cols < h, other=0.0).to(tl.float32)
    normed = wide * rstd[:, None]
    if HF:
        normed = normed.to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + out, (normed * w[None, :]).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    DY, X, W, RSTD, DZ, DX, DW, n, h,
    dy_inner, dy_outer_stride, dy_inner_stride, x_inner, x_outer_stride, x_inner_stride,
    dz_inner, dz_outer_stride, dz_inner_stride,
    HAS_DZ: tl.constexpr, HF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    w = tl.load(W + cols, mask=cols < h, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(pid * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & (cols < h)[None, :]
        x_offsets = _row_offsets(rows, x_inner, x_outer_stride, x_inner_stride)[:, None] + cols[None, :]
        dy_offsets = _row_offsets(rows, dy_inner, dy_outer_stride, dy_inner_stride)[:, None] + cols[None, :]
        x = tl.load(X + x_offsets, mask=mask, other=0.0)
        dy = tl.load(DY + dy_offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + rows, mask=rows < n, other=0.0)[:, None]
        normed = x.to(tl.float32) * rstd
        if HF:
            dw += dy * normed.to(x.dtype).to(tl.float32)
        else:
            dw += dy * normed
        g = dy * w
        dx = (g - normed * (tl.sum(g * normed, axis=1) / h)[:, None]) * rstd
        if HAS_DZ:
            dz_offsets = _row_offsets(rows, dz_inner, dz_outer_stride, dz_inner_stride)[:, None] + cols[None, :]
            dx += tl.load(DZ + dz_offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + rows.to(tl.int64)[:, None] * h + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    tl.store(DW + pid * h + cols, tl.sum(dw, axis=0), mask=cols < h)


def _tile(h, elements_per_warp):
    block = next_power_of_2(h)
    rows = max(1, TILE // block)
    return rows, block, min(32, max(1, rows * block // elements_per_warp))


def _forward_triton(x, residual, weight, eps, hf):
    rows_per_tile, block, warps = _tile(x.shape[-1], 1024)
    xr = as_rows(x)
    rr = xr if residual is None else as_rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    z = y if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if xr.n:
        _rms_norm_forward_kernel[(cdiv(xr.n, rows_per_tile),)](
            xr.tensor, rr.tensor, weight, y, z, rstd, xr.n, x.shape[-1], eps, *xr.addressing, *rr.addressing,
            HAS_RESIDUAL=residual is not None, HF=hf, ROWS=rows_per_tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, z, rstd


def _backward_triton(dy, x, weight, rstd, hf, dz):
    h = x.shape[-1]
    rows_per_tile, block, warps = _tile(h, 512)
    xr, dyr = as_rows(x), as_rows(dy)
    dzr = xr if dz is None else as_rows(dz)
    # Enough programs to fill the chip's warps, few enough that the partial sums stay a small part of the traffic.
    programs = min(cdiv(xr.n, rows_per_tile), sm_count(x.device) * max(1, 32 // warps)) or 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty((programs, h), dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(programs,)](
        dyr.tensor, xr.tensor, weight, rstd, dzr.tensor, dx, partial, xr.n, h,
        *dyr.addressing, *xr.addressing, *dzr.addressing,
        HAS_DZ=dz is not None, HF=hf, ROWS=rows_per_tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


# --------------------------------------------------------------------------------------------------------- custom ops


def _rms_norm(x: Tensor, weight: Tensor, eps: float, hf: bool, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        return _forward_torch(x, weight, eps, hf)
    y, _, rstd = _forward_triton(x, None, weight, eps, hf)
    return y, rstd


_rms_norm_op = torch.library.custom_op("flagscale_kernels::rms_norm", _rms_norm, mutates_args=())


@torch.library.custom_op("flagscale_kernels::rms_norm_residual", mutates_args=())
def _rms_norm_residual_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, hf: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        z = (x + residual).contiguous()
        y, rstd = _forward_torch(z, weight, eps, hf)
        return y, z, rstd
    return _forward_triton(x, residual, weight, eps, hf)


@torch.library.custom_op("flagscale_kernels::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dz: Tensor | None, hf: bool, backend: str
) -> tuple[Tensor, Tensor]:
    run = _backward_torch if backend == "torch" else _backward_triton
    dx, dw = run(dy, x, weight, rstd, hf, dz)
    return dx.contiguous(), dw


def _statistics_like(x):
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@_rms_norm_op.register_fake
def _(x, weight, eps, hf, backend):
    return x.new_empty(x.shape), _statistics_like(x)


@_rms_norm_residual_op.register_fake
def _(x, residual, weight, eps, hf, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape), _statistics_like(x)


@_rms_norm_backward_op.register_fake
def _(dy, x, weight, rstd, dz, hf, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, weight, _, ctx.hf, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    dx, dw = _rms_norm_backward_op(dy, x, weight, rstd, None, ctx.hf, ctx.backend)
    return dx, dw, None, None, None


def _setup_residual(ctx, inputs, output):
    _, _, weight, _, ctx.hf, ctx.backend = inputs
    _, z, rstd = output
    ctx.save_for_backward(z, weight, rstd)
    ctx.set_materialize_grads(False)  # the last layer's z gets no gradient


def _backward_residual(ctx, dy, dz, _):
    z, weight, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(z)
    dx, dw = _rms_norm_backward_op(dy, z, weight, rstd, dz, ctx.hf, ctx.backend)
    return dx, dx, dw, None, None, None


_rms_norm_op.register_autograd(_backward, setup_context=_setup)
_rms_norm_residual_op.register_autograd(_backward_residual, setup_context=_setup_residual)


# ------------------------------------------------------------------------------------------------------------- public


def _check(x, weight, rounding, backend):
    backend = choose_backend(x, backend)
    require(rounding in ROUNDINGS, f"rounding ({rounding!r}) must be one of {ROUNDINGS}")
    require(x.dim() >= 1, f"x.dim() ({x.dim()}) must be at least 1")
    require(
        weight.shape == x.shape[-1:],
        f"weight.shape ({tuple(weight.shape)}) must equal x.shape[-1:] ({tuple(x.shape[-1:])})",
    )
    require(0 < x.shape[-1] <= MAX_HIDDEN, f"x.shape[-1] ({x.shape[-1]}) must be from 1 to {MAX_HIDDEN}")
    check_float("x", x, backend)
    check_float("weight", weight, backend)
    check_same("device", [("x", x), ("weight", weight)])
    check_unit_stride("x", x)
    check_unit_stride("weight", weight)
    return backend


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, rounding: str = "hf", backend: str | None = None
) -> Tensor:
    """RMSNorm over the last dimension: [..., h] with weight [h] -> [..., h], in x's dtype.

    rounding: "hf" rounds the normalised value before it multiplies by the weight, "megatron" rounds once after it.
    The last dimension must be contiguous; the others may be strided, as in a slice of a packed projection. The weight
    may have a wider dtype than x. Raises ValueError for a shape, dtype, device or stride that does not fit.
    """
    backend = _check(x, weight, rounding, backend)
    norm = _rms_norm if called_plainly() else _rms_norm_op
    return norm(x, weight, eps, rounding == "hf", backend)[0]


def rms_norm_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    rounding: str = "hf",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(z), z) of z = x + residual, both [..., h], with one pass over memory.

    z is the residual of the next layer. The options and errors are those of `rms_norm`.
    """
    backend = _check(x, weight, rounding, backend)
    for attribute in ("shape", "dtype", "device"):
        check_same(attribute, [("x", x), ("residual", residual)])
    check_unit_stride("residual", residual)
    y, z, _ = _rms_norm_residual_op(x, residual, weight, eps, rounding == "hf", backend)
    return y, z
