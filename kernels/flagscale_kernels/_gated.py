r"""The kernels of gated activations: y = w a(g) u, of one packed or two tensors, and with a weight per row or none.

    silu         a(g) = g s(g)                     s = sigmoid
    gelu_tanh    a(g) = g s(2 c (g + d g^3))       c = sqrt(2 / pi), d = 0.044715; 1 + tanh(x) = 2 s(2 x)
    gelu         a(g) = g (1 + erf(g / sqrt 2)) / 2

The backward saves g, u and w only, and computes a again:

    dg = dy w u a'(g)        du = dy w a(g)        dw = sum_j dy_j a(g_j) u_j

Packed input is [..., 2f] = [g; u], as in megatron-core's gated MLP. One kernel writes both halves of its gradient into
one buffer, so nothing is concatenated. All arithmetic is in fp32 and rounded once at the end.

Memory traffic per element in bf16: the forward moves 6 bytes (read g, u; write y), the backward 10 (read g, u, dy; write
dg, du).
"""

from collections.abc import Callable

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

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
GELU = {"gelu_tanh": "tanh", "gelu": "none"}  # as torch.nn.functional.gelu names them
MAX_BLOCK = 2048  # columns that a program processes at a time


def gated_reference(
    activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor | None, weight: Tensor | None
) -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    compute = torch.promote_types(gate.dtype, torch.float32)
    y = activation(gate.to(compute)) * up.to(compute)
    if weight is not None:
        y = y * weight.to(compute).reshape(*gate.shape[:-1], 1)
    return y.to(gate.dtype)


# ---------------------------------------------------------------------------------------------------------- CPU path


def _activated(g, activation):
    if activation == "silu":
        return torch.nn.functional.silu(g)
    return torch.nn.functional.gelu(g, approximate=GELU[activation])


def _forward_torch(gate, up, weight, activation):
    compute = torch.promote_types(gate.dtype, torch.float32)
    wide = _activated(gate.to(compute), activation).mul_(up)
    if weight is not None:
        wide.mul_(weight.unsqueeze(-1))
    return wide.to(gate.dtype)


def _backward_torch(dy, gate, up, weight, dgate, dup, activation):
    """Write dgate and dup, and return the weight's gradient, or None."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(compute)
    activated = _activated(g, activation)
    if activation == "silu":
        of_gate, options = torch.ops.aten.silu_backward, {}
    else:
        of_gate, options = torch.ops.aten.gelu_backward, {"approximate": GELU[activation]}
    grad = dy.to(compute)
    dweight = None
    if weight is not None:
        dweight = (grad * activated).mul_(up).sum(-1).to(weight.dtype)
        grad = grad * weight.unsqueeze(-1)
    if dup.dtype == compute:
        torch.mul(grad, activated, out=dup)
        of_gate.grad_input(torch.mul(grad, up, out=activated), g, grad_input=dgate, **options)
    else:
        dup.copy_(activated.mul_(grad))
        dgate.copy_(of_gate(grad * up, g, **options))
    return dweight


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    """a(g) and its derivative."""
    if ACTIVATION == "gelu":
        half = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * half, half + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        c = 1.5957691216057308  # 2 sqrt(2 / pi)
        s = tl.sigmoid(c * (g + 0.044715 * g * g * g))
        return g * s, s + g * s * (1.0 - s) * c * (1.0 + 0.134145 * g * g)
    else:
        s = tl.sigmoid(g)
        return g * s, s + g * s * (1.0 - s)


@triton.jit
def _gated_forward_kernel(
    G, U, W, Y, f, g_inner, g_outer_stride, g_inner_stride, u_inner, u_outer_stride, u_inner_stride,
    ACTIVATION: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < f
    g = tl.load(G + row_start(row, g_inner, g_outer_stride, g_inner_stride) + cols, mask=mask, other=0.0)
    u = tl.load(U + row_start(row, u_inner, u_outer_stride, u_inner_stride) + cols, mask=mask, other=0.0)
    a, _ = _activation(g.to(tl.float32), ACTIVATION)
    y = a * u.to(tl.float32)
    if HAS_WEIGHT:
        y *= tl.load(W + row).to(tl.float32)
    tl.store(Y + row.to(tl.int64) * f + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward_kernel(
    DY, G, U, W, DG, DU, DW, f, dgu_stride, dy_inner, dy_outer_stride, dy_inner_stride,
    g_inner, g_outer_stride, g_inner_stride, u_inner, u_outer_stride, u_inner_stride,
    ACTIVATION: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
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
        a, da = _activation(g, ACTIVATION)
        if HAS_WEIGHT:
            dw += dy * a * u
            dy *= w
        tl.store(DU + cols, (dy * a).to(DU.dtype.element_ty), mask=mask)
        tl.store(DG + cols, (dy * u * da).to(DG.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(DW + row, tl.sum(dw, axis=0).to(DW.dtype.element_ty))


def _block(f):
    block = min(MAX_BLOCK, next_power_of_2(f))
    return block, min(8, max(1, block // 256))


def _forward_triton(gate, up, weight, activation):
    f = gate.shape[-1]
    block, warps = _block(f)
    g, u = as_rows(gate), as_rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        _gated_forward_kernel[(g.n, cdiv(f, block))](
            g.tensor, u.tensor, y if weight is None else weight, y, f, *g.addressing, *u.addressing,
            ACTIVATION=activation, HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y


def _backward_triton(dy, gate, up, weight, dgate, dup, activation):
    f = gate.shape[-1]
    block, warps = _block(f)
    dyr, g, u = as_rows(dy), as_rows(gate), as_rows(up)
    dweight = None if weight is None else torch.empty_like(weight)
    if gate.numel():
        _gated_backward_kernel[(g.n, cdiv(f, block) if weight is None else 1)](
            dyr.tensor, g.tensor, u.tensor, dy if weight is None else weight, dgate, dup,
            dy if weight is None else dweight, f, dgate.stride(-2) if dgate.dim() > 1 else 0,
            *dyr.addressing, *g.addressing, *u.addressing,
            ACTIVATION=activation, HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dweight


# --------------------------------------------------------------------------------------------------------- custom ops


def _halves(gate_up):
    f = gate_up.shape[-1] // 2
    return gate_up[..., :f], gate_up[..., f:]


def _forward(gate, up, weight, activation, backend):
    weight = None if weight is None else weight.contiguous()
    return (_forward_torch if backend == "torch" else _forward_triton)(gate, up, weight, activation)


def _backward(dy, gate, up, weight, dgate, dup, activation, backend):
    weight = None if weight is None else weight.contiguous()
    run = _backward_torch if backend == "torch" else _backward_triton
    dweight = run(dy, gate, up, weight, dgate, dup, activation)
    return gate.new_empty(0) if dweight is None else dweight  # a custom op returns tensors only


@operator("gated_packed")
def _packed_op(gate_up: Tensor, weight: Tensor | None, activation: str, backend: str) -> Tensor:
    return _forward(*_halves(gate_up), weight, activation, backend)


@operator("gated_packed_backward")
def _packed_backward_op(
    dy: Tensor, gate_up: Tensor, weight: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    dweight = _backward(dy, *_halves(gate_up), weight, *_halves(dgate_up), activation, backend)
    return dgate_up, dweight


@operator("gated_split")
def _split_op(gate: Tensor, up: Tensor, weight: Tensor | None, activation: str, backend: str) -> Tensor:
    return _forward(gate, up, weight, activation, backend)


@operator("gated_split_backward")
def _split_backward_op(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate)
    return dgate, dup, _backward(dy, gate, up, weight, dgate, dup, activation, backend)


def _fake_dweight(x, weight):
    return x.new_empty(0) if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)


@_packed_op.register_fake
def _(gate_up, weight, activation, backend):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_packed_backward_op.register_fake
def _(dy, gate_up, weight, activation, backend):
    return gate_up.new_empty(gate_up.shape), _fake_dweight(gate_up, weight)


@_split_op.register_fake
def _(gate, up, weight, activation, backend):
    return gate.new_empty(gate.shape)


@_split_backward_op.register_fake
def _(dy, gate, up, weight, activation, backend):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), _fake_dweight(gate, weight)


def _setup(ctx, inputs, output):
    *tensors, activation, backend = inputs
    ctx.options = activation, backend
    ctx.save_for_backward(*tensors)


def _packed_autograd(ctx, dy):
    gate_up, weight = ctx.saved_tensors
    dgate_up, dweight = _packed_backward_op(dy, gate_up, weight, *ctx.options)
    return dgate_up, None if weight is None else dweight, None, None


def _split_autograd(ctx, dy):
    gate, up, weight = ctx.saved_tensors
    dgate, dup, dweight = _split_backward_op(dy, gate, up, weight, *ctx.options)
    return dgate, dup, None if weight is None else dweight, None, None


_packed_op.register_autograd(_packed_autograd, setup_context=_setup)
_split_op.register_autograd(_split_autograd, setup_context=_setup)


# ------------------------------------------------------------------------------------------------------------- shared


def gated(gate: Tensor, up: Tensor | None, weight: Tensor | None, activation: str, backend: str | None) -> Tensor:
    """weight * activation(gate) * up, as `swiglu` takes them; activation is one of ACTIVATIONS.

    Raises ValueError for a shape, dtype, device or stride that does not fit.
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
        return _packed_op(gate, weight, activation, backend)
    return _split_op(gate, up, weight, activation, backend)
