r"""LayerNorm (Ba et al. 2016, arXiv:1607.06450).

    m = mean_j x_j        r = 1 / sqrt(mean_j (x_j - m)^2 + eps)        x^ = (x - m) r        y = w * x^ + b

The gradient and the kernels are those of _norms.py. All arithmetic is in fp32 and rounded once, as in PyTorch.
"""

import torch
from torch import Tensor

from flagscale_kernels._checks import check_float, check_same, check_unit_stride, choose_backend, require
from flagscale_kernels._norms import Norm, launch_backward, launch_forward
from flagscale_kernels._operators import operator


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------- CPU path


def _forward_torch(x, weight, bias, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parameters = [None if t is None else t.to(wide.dtype) for t in (weight, bias)]
    y, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], *parameters, eps)
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _backward_torch(dy, x, weight, mean, rstd, bias):
    wide, w = x.to(rstd.dtype), weight.to(rstd.dtype)
    statistics = (t.unsqueeze(-1) for t in (mean, rstd))
    wanted = [True, True, bias]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.to(rstd.dtype), wide, x.shape[-1:], *statistics, w, w if bias else None, wanted
    )
    return dx.to(x.dtype), dw.to(weight.dtype), db.to(weight.dtype) if bias else None


# ---------------------------------------------------------------------------------------------------------- launchers


def _forward_triton(x, weight, bias, eps):
    y, _, mean, rstd = launch_forward(x, None, weight, bias, Norm(eps, 0.0, True, False))
    return y, mean, rstd


def _backward_triton(dy, x, weight, mean, rstd, bias):
    return launch_backward(dy, x, weight, mean, rstd, None, Norm(0.0, 0.0, True, False), bias=bias)


# --------------------------------------------------------------------------------------------------------- custom ops


@operator("layer_norm")
def _layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = _forward_torch if backend == "torch" else _forward_triton
    return run(x, weight, bias, eps)


@operator("layer_norm_backward")
def _layer_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = _backward_torch if backend == "torch" else _backward_triton
    dx, dw, db = run(dy, x, weight, mean, rstd, bias)
    return dx.contiguous(), dw, weight.new_empty(0) if db is None else db  # a custom op returns tensors only


@_layer_norm_op.register_fake
def _(x, weight, bias, eps, backend):
    statistics = [x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]
    return x.new_empty(x.shape), *statistics


@_layer_norm_backward_op.register_fake
def _(dy, x, weight, mean, rstd, bias, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if bias else 0)


def _setup(ctx, inputs, output):
    x, weight, bias, _, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.set_materialize_grads(False)  # the statistics get no gradient


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 5
    dx, dw, db = _layer_norm_backward_op(dy, *ctx.saved_tensors, ctx.has_bias, ctx.backend)
    return dx, dw, db if ctx.has_bias else None, None, None


_layer_norm_op.register_autograd(_backward, setup_context=_setup)


# ------------------------------------------------------------------------------------------------------------- public


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """LayerNorm over the last dimension: [..., h] with weight and bias [h], or no bias -> [..., h], in x's dtype.

    The last dimension must be contiguous; the others may be strided. Weight and bias may have a wider dtype than x, and have
    the same one. Raises ValueError for a shape, dtype, device or stride that does not fit.
    """
    backend = choose_backend(x, backend)
    require(x.dim() >= 1 and x.shape[-1] > 0, f"x.shape ({tuple(x.shape)}) must end with a positive dimension")
    check_float("x", x, backend)
    check_unit_stride("x", x)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            require(t.shape == x.shape[-1:], f"{name}.shape ({tuple(t.shape)}) must equal x.shape[-1:] ({x.shape[-1]})")
            check_float(name, t, backend)
            check_same("device", [("x", x), (name, t)])
            check_same("dtype", [("weight", weight), (name, t)])
            check_unit_stride(name, t)
    return _layer_norm_op(x, weight, bias, float(eps), backend)[0]
