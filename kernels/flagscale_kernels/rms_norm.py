r"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), alone or fused with the residual addition before it.

    r = 1 / sqrt(mean_j x_j^2 + eps)        x^ = x r        y = w * x^

Backward, with g = dy * w (elementwise) and h the row's length:

    dx = r (g - x^ mean_j(g_j x^_j))        dw = sum over rows of dy * x^

With a residual, z = x + residual is rounded to the input's dtype and normalised, and z is returned for the next layer.
The gradient dz of z is added: dx = dresidual = dz + (the formula above).

There are two conventions for rounding in bf16. "hf" (transformers' LlamaRMSNorm) rounds x^ to the input's dtype before
it multiplies by w. "megatron" (Transformer Engine, Apex, torch.nn.RMSNorm) computes all in fp32 and rounds once.

Some models learn the weight's distance from 1 (Gemma): y = (1 + w) * x^. The kernels are those of _norms.py.
"""

import torch
from torch import Tensor

from flagscale_kernels._checks import (
    check_float,
    check_same,
    check_unit_stride,
    choose_backend,
    require,
)
from flagscale_kernels._norms import Norm, launch_backward, launch_forward
from flagscale_kernels._operators import operator

ROUNDINGS = ("hf", "megatron")


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, rounding: str = "hf", weight_offset: float = 0.0
) -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight_offset:
        weight = weight.to(compute) + weight_offset
    if rounding == "hf":
        return (weight * normed.to(x.dtype)).to(x.dtype)
    return (weight.to(compute) * normed).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------- CPU path


def _forward_torch(x, weight, eps, hf, offset):
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(compute) + offset if offset else weight
    # vector_norm accumulates in `compute` without a wide copy of x.
    mean_square = torch.linalg.vector_norm(x, dim=-1, dtype=compute).square_().div_(x.shape[-1])
    rstd = mean_square.add_(eps).rsqrt_()
    y = x * rstd.unsqueeze(-1)  # in `compute`: rstd is wider than x
    if hf:
        y = y.to(x.dtype)
    return y.mul_(weight).to(x.dtype), rstd  # in place: fresh memory costs more than the product


def _backward_torch(dy, x, weight, rstd, hf, dz, offset):
    h = x.shape[-1]
    scale = rstd.unsqueeze(-1)
    normed = x * scale
    saved = normed.to(x.dtype) if hf else normed  # the factor that the forward multiplied by the weight
    dy, w = dy.to(rstd.dtype), weight.to(rstd.dtype) + offset
    product = (dy * saved).reshape(-1, h)
    dw = product.sum(0).to(weight.dtype)
    # Sum dy w normed over a row. `saved` would add its rounding error to dx.
    inner = (product if saved is normed else (dy * normed).reshape(-1, h)).mv(w).view_as(scale)
    dx = torch.mul(dy, w, out=product.view(dy.shape)).addcmul_(normed, inner.div_(-h)).mul_(scale)
    if dz is not None:
        dx.add_(dz)
    return dx.to(x.dtype), dw


# ---------------------------------------------------------------------------------------------------------- launchers


def _forward_triton(x, residual, weight, eps, hf, offset=0.0):
    y, z, _, rstd = launch_forward(x, residual, weight, None, Norm(eps, offset, False, hf))
    return y, z, rstd


def _backward_triton(dy, x, weight, rstd, hf, dz, offset=0.0):
    return launch_backward(dy, x, weight, rstd, rstd, dz, Norm(0.0, offset, False, hf))[:2]


# --------------------------------------------------------------------------------------------------------- custom ops


@operator("rms_norm")
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float, hf: bool, offset: float, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        return _forward_torch(x, weight, eps, hf, offset)
    y, _, rstd = _forward_triton(x, None, weight, eps, hf, offset)
    return y, rstd


@operator("rms_norm_residual")
def _rms_norm_residual_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, hf: bool, offset: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        z = (x + residual).contiguous()
        y, rstd = _forward_torch(z, weight, eps, hf, offset)
        return y, z, rstd
    return _forward_triton(x, residual, weight, eps, hf, offset)


@operator("rms_norm_backward")
def _rms_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dz: Tensor | None, hf: bool, offset: float, backend: str
) -> tuple[Tensor, Tensor]:
    run = _backward_torch if backend == "torch" else _backward_triton
    dx, dw = run(dy, x, weight, rstd, hf, dz, offset)
    return dx.contiguous(), dw


def _statistics_like(x):
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@_rms_norm_op.register_fake
def _(x, weight, eps, hf, offset, backend):
    return x.new_empty(x.shape), _statistics_like(x)


@_rms_norm_residual_op.register_fake
def _(x, residual, weight, eps, hf, offset, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape), _statistics_like(x)


@_rms_norm_backward_op.register_fake
def _(dy, x, weight, rstd, dz, hf, offset, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)  # the statistics get no gradient, and zeros for it would be a kernel


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 6
    x, weight, rstd = ctx.saved_tensors
    dx, dw = _rms_norm_backward_op(dy, x, weight, rstd, None, *ctx.options)
    return dx, dw, None, None, None, None


def _setup_residual(ctx, inputs, output):
    _, _, weight, _, *ctx.options = inputs
    _, z, rstd = output
    ctx.save_for_backward(z, weight, rstd)
    ctx.set_materialize_grads(False)  # the last layer's z gets no gradient


def _backward_residual(ctx, dy, dz, _):
    z, weight, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(z)
    dx, dw = _rms_norm_backward_op(dy, z, weight, rstd, dz, *ctx.options)
    return dx, dx, dw, None, None, None, None


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
    require(x.shape[-1] > 0, f"x.shape[-1] ({x.shape[-1]}) must be positive")
    check_float("x", x, backend)
    check_float("weight", weight, backend)
    check_same("device", [("x", x), ("weight", weight)])
    check_unit_stride("x", x)
    check_unit_stride("weight", weight)
    return backend


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    rounding: str = "hf",
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm over the last dimension: [..., h] with weight [h] -> [..., h], in x's dtype.

    rounding: "hf" rounds the normalised value before it multiplies by the weight, "megatron" rounds once after it.
    weight_offset: added to the weight, in fp32. Gemma's norm is weight_offset=1.0 with rounding="megatron".
    The last dimension must be contiguous; the others may be strided, as in a slice of a packed projection. The weight
    may have a wider dtype than x. Raises ValueError for a shape, dtype, device or stride that does not fit.
    """
    backend = _check(x, weight, rounding, backend)
    return _rms_norm_op(x, weight, eps, rounding == "hf", float(weight_offset), backend)[0]


def rms_norm_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    rounding: str = "hf",
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(z), z) of z = x + residual, both [..., h], with one pass over memory.

    z is the residual of the next layer. The options and errors are those of `rms_norm`.
    """
    backend = _check(x, weight, rounding, backend)
    for attribute in ("shape", "dtype", "device"):
        check_same(attribute, [("x", x), ("residual", residual)])
    check_unit_stride("residual", residual)
    y, z, _ = _rms_norm_residual_op(x, residual, weight, eps, rounding == "hf", float(weight_offset), backend)
    return y, z
