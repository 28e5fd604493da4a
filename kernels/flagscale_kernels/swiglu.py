r"""SwiGLU (Shazeer 2020, arXiv:2002.05202) of one packed or two tensors. Mixtures of experts add a weight per token.

    y = w silu(g) u,    silu(g) = g s,    s = sigmoid(g)

The backward saves g, u and w only, and computes s again:

    dg = dy w u s (1 + g (1 - s))        du = dy w g s        dw = sum_j dy_j silu(g_j) u_j

Packed input is [..., 2f] = [g; u], as in megatron-core's gated MLP. One kernel writes both halves of its gradient into
one buffer, so nothing is concatenated. All arithmetic is in fp32 and rounded once at the end.

Memory traffic per element in bf16: the forward moves 6 bytes (read g, u; write y), the backward 10 (read g, u, dy; write
dg, du).
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
from flagscale_kernels._operators import operator
from flagscale_kernels._rows import as_rows, row_start
from flagscale_kernels._triton import cdiv, next_power_of_2, tl, triton

MAX_BLOCK = 2048  # columns that a program processes at a time


def swiglu_reference(gate: Tensor, up: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    compute = torch.promote_types(gate.dtype, torch.float32)
    y = torch.nn.functional.silu(gate.to(compute)) * up.to(compute)
    if weight is not None:
        y = y * weight.to(compute).reshape(*gate.shape[:-1], 1)
    return y.to(gate.dtype)


# ---------------------------------------------------------------------------------------------------------- CPU path


def _forward_torch(gate, up, weight):
    compute = torch.promote_types(gate.dtype, torch.float32)
    wide = torch.nn.functional.silu(gate.to(compute)).mul_(up)
    if weight is not None:
        wide.mul_(weight.unsqueeze(-1))
    return wide.to(gate.dtype)


def _backward_torch(dy, gate, up, weight, dgate, dup):
    """Write dgate and dup, and return the weight's gradient, or None."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(compute)
    silu = torch.nn.functional.silu(g)
    grad = dy.to(compute)
    dweight = None
    if weight is not None:
        dweight = (grad * silu).mul_(up).sum(-1).to(weight.dtype)
        grad = grad * weight.unsqueeze(-1)
    if dup.dtype == compute:
        torch.mul(grad, silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=silu), g, grad_input=dgate)
    else:
        dup.copy_(silu.mul_(grad))
        dgate.copy_(torch.ops.aten.silu_backward(grad * up, g))
    return dweight


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _swiglu_forward_kernel(
    G, U, W, Y, f, g_inner, g_outer_stride, g_inner_stride, u_inner, u_outer_stride, u_inner_stride,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < f
    g = tl.load(G + row_start(row, g_inner, g_outer_stride, g_inner_stride) + cols, mask=mask, other=0.0)
    u = tl.load(U + row_start(row, u_inner, u_outer_stride, u_inner_stride) + cols, mask=mask, other=0.0)
    g = g.to(tl.float32)
    y = g * tl.sigmoid(g) * u.to(tl.float32)
    if HAS_WEIGHT:
        y *= tl.load(W + row).to(tl.float32)
    tl.store(Y + row.to(tl.int64) * f + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    DY, G, U, W, DG, DU, DW, f, dgu_stride, dy_inner, dy_outer_stride, dy_inner_stride,
    g_inner, g_outer_stride, g_inner_stride, u_inner, u_outer_stride, u_inner_stride,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    DY += row_start(row, dy_inner, dy_outer_stride, dy_inner_stride)
    G += row_start(row, g_inner, g_outer_stride, g_inner_stride)
    U += row_start(row, u_inner, u_outer_stride, u_inner_stride)
    DG += row.to(tl.int64) * dgu_stride
    DU += row.to(tl.int64) * dgu_stride
    if HAS_WEIGHT:
        w = tl.load(W + row).to(tl.float32)
        dw = tl.zeros([BLOCK], tl.float32)
    # With a weight one program processes the whole row, because dw is a sum over it; else one program per block.
    for first in range(tl.program_id(1) * BLOCK, f, tl.num_programs(1) * BLOCK):
        cols = first + tl.arange(0, BLOCK)
        mask = cols < f
        dy = tl.load(DY + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(G + cols, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(U + cols, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        silu = g * s
        if HAS_WEIGHT:
            dw += dy * silu * u
            dy *= w
        tl.store(DU + cols, (dy * silu).to(DU.dtype.element_ty), mask=mask)
        tl.store(DG + cols, (dy * u * (s + silu * (1.0 - s))).to(DG.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(DW + row, tl.sum(dw, axis=0).to(DW.dtype.element_ty))


def _block(f):
    block = min(MAX_BLOCK, next_power_of_2(f))
    return block, min(8, max(1, block // 256))


def _forward_triton(gate, up, weight):
    f = gate.shape[-1]
    block, warps = _block(f)
    g, u = as_rows(gate), as_rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        _swiglu_forward_kernel[(g.n, cdiv(f, block))](
            g.tensor, u.tensor, y if weight is None else weight, y, f, *g.addressing, *u.addressing,
            HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y


def _backward_triton(dy, gate, up, weight, dgate, dup):
    f = gate.shape[-1]
    block, warps = _block(f)
    dyr, g, u = as_rows(dy), as_rows(gate), as_rows(up)
    dweight = None if weight is None else torch.empty_like(weight)
    if gate.numel():
        _swiglu_backward_kernel[(g.n, cdiv(f, block) if weight is None else 1)](
            dyr.tensor, g.tensor, u.tensor, dy if weight is None else weight, dgate, dup,
            dy if weight is None else dweight, f, dgate.stride(-2) if dgate.dim() > 1 else 0,
            *dyr.addressing, *g.addressing, *u.addressing,
            HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dweight


# --------------------------------------------------------------------------------------------------------- custom ops


def _halves(gate_up):
    f = gate_up.shape[-1] // 2
    return gate_up[..., :f], gate_up[..., f:]


def _forward(gate, up, weight, backend):
    weight = None if weight is None else weight.contiguous()
    return (_forward_torch if backend == "torch" else _forward_triton)(gate, up, weight)


def _backward(dy, gate, up, weight, dgate, dup, backend):
    weight = None if weight is None else weight.contiguous()
    run = _backward_torch if backend == "torch" else _backward_triton
    dweight = run(dy, gate, up, weight, dgate, dup)
    return gate.new_empty(0) if dweight is None else dweight  # a custom op returns tensors only


@operator("swiglu_packed")
def _packed_op(gate_up: Tensor, weight: Tensor | None, backend: str) -> Tensor:
    return _forward(*_halves(gate_up), weight, backend)


@operator("swiglu_packed_backward")
def _packed_backward_op(dy: Tensor, gate_up: Tensor, weight: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    dweight = _backward(dy, *_halves(gate_up), weight, *_halves(dgate_up), backend)
    return dgate_up, dweight


@operator("swiglu_split")
def _split_op(gate: Tensor, up: Tensor, weight: Tensor | None, backend: str) -> Tensor:
    return _forward(gate, up, weight, backend)


@operator("swiglu_split_backward")
def _split_backward_op(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate)
    return dgate, dup, _backward(dy, gate, up, weight, dgate, dup, backend)


def _fake_dweight(x, weight):
    return x.new_empty(0) if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)


@_packed_op.register_fake
def _(gate_up, weight, backend):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_packed_backward_op.register_fake
def _(dy, gate_up, weight, backend):
    return gate_up.new_empty(gate_up.shape), _fake_dweight(gate_up, weight)


@_split_op.register_fake
def _(gate, up, weight, backend):
    return gate.new_empty(gate.shape)


@_split_backward_op.register_fake
def _(dy, gate, up, weight, backend):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), _fake_dweight(gate, weight)


def _setup(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _packed_autograd(ctx, dy):
    gate_up, weight = ctx.saved_tensors
    dgate_up, dweight = _packed_backward_op(dy, gate_up, weight, ctx.backend)
    return dgate_up, None if weight is None else dweight, None


def _split_autograd(ctx, dy):
    gate, up, weight = ctx.saved_tensors
    dgate, dup, dweight = _split_backward_op(dy, gate, up, weight, ctx.backend)
    return dgate, dup, None if weight is None else dweight, None


_packed_op.register_autograd(_packed_autograd, setup_context=_setup)
_split_op.register_autograd(_split_autograd, setup_context=_setup)


# ------------------------------------------------------------------------------------------------------------- public


def swiglu(
    gate: Tensor, up: Tensor | None = None, *, weight: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """silu(gate) * up * weight.

    gate, up: each [..., f] -> [..., f]; or gate alone, [..., 2f] with the gate in the first half -> [..., f].
    weight: one number per row, such as a router's probability: [...] or [..., 1], of any float dtype, with a gradient.
    The last dimension must be contiguous; the others may be strided. Raises ValueError for a shape, dtype, device or
    stride that does not fit.
    """
    backend = choose_backend(gate, backend)
    require(gate.dim() >= 1, f"gate.dim() ({gate.dim()}) must be at least 1")
    check_float("gate", gate, backend)
    check_unit_stride("gate", gate)
    if up is None:
        require(
            gate.shape[-1] % 2 == 0 and gate.shape[-1] > 0,
            f"gate.shape[-1] ({gate.shape[-1]}) must be divisible by 2 and positive when it holds both halves",
        )
    else:
        require(gate.shape[-1] > 0, f"gate.shape[-1] ({gate.shape[-1]}) must be positive")
        for attribute in ("shape", "dtype", "device"):
            check_same(attribute, [("gate", gate), ("up", up)])
        check_unit_stride("up", up)
    if weight is not None:
        check_float("weight", weight, backend)
        check_same("device", [("gate", gate), ("weight", weight)])
        rows = gate.shape[:-1]
        require(
            weight.shape in (rows, (*rows, 1)),
            f"weight.shape ({tuple(weight.shape)}) must be {tuple(rows)} or {(*rows, 1)}, one element per row of gate",
        )
        weight = weight.reshape(rows)
    if up is None:
        return _packed_op(gate, weight, backend)
    return _split_op(gate, up, weight, backend)
