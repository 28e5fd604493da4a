r"""Tokens in the order of their experts, and back: the permutation of a mixture of experts without a message or a wait.

A token goes to k experts, so that t tokens are n = t k copies. `token[p]` is the token at place p of the experts' order, and
`inverse[i, j]` the place of token i's copy for its j-th expert.

    spread    y_p = x_{token[p]}                     dx_i = sum_j dy_{inverse[i, j]}
    collect   y_i = sum_j x_{inverse[i, j]}          dx_p = dy_{token[p]}

Each is the other's gradient. A sum of k rows is read, added up in fp32 and written once, in the order of j: the same bits on
every run, where an addition into the rows (index_add) would need atomics. Memory traffic per element in bf16: spread moves
2 (k + 1) / k bytes for each element that it writes, collect 2 (k + 1) for each.
"""

import torch
from torch import Tensor

from flagscale_kernels._checks import check_float, choose_backend, require
from flagscale_kernels._operators import operator
from flagscale_kernels._triton import cdiv, next_power_of_2, tl, triton

MAX_BLOCK = 2048  # columns that a program processes at a time


def spread_reference(x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    return x[token]


def collect_reference(x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return x.to(compute)[inverse].sum(1).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _sum_rows_kernel(X, INVERSE, Y, h, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < h
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(K):
        place = tl.load(INVERSE + row * K + j).to(tl.int64)
        total += tl.load(X + place * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + row * h + cols, total.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _copy_rows_kernel(X, INVERSE, Y, h, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < h
    x = tl.load(X + row * x_stride + cols, mask=mask)
    for j in range(K):
        place = tl.load(INVERSE + row * K + j).to(tl.int64)
        tl.store(Y + place * h + cols, x, mask=mask)


def _block(h):
    block = min(MAX_BLOCK, next_power_of_2(h))
    return block, min(8, max(1, block // 256))


def _copy_rows_triton(x, inverse):
    (t, k), h = inverse.shape, x.shape[-1]
    y = torch.empty((t * k, h), dtype=x.dtype, device=x.device)
    if y.numel():
        block, warps = _block(h)
        inverse = inverse.contiguous()
        _copy_rows_kernel[(t, cdiv(h, block))](x, inverse, y, h, x.stride(0), K=k, BLOCK=block, num_warps=warps)
    return y


def _sum_rows_triton(x, inverse):
    (t, k), h = inverse.shape, x.shape[-1]
    y = torch.empty((t, h), dtype=x.dtype, device=x.device)
    if y.numel():
        block, warps = _block(h)
        inverse = inverse.contiguous()
        _sum_rows_kernel[(t, cdiv(h, block))](x, inverse, y, h, x.stride(0), K=k, BLOCK=block, num_warps=warps)
    return y


def _sum_rows_torch(x, inverse):
    rows = x.index_select(0, inverse.flatten()).view(*inverse.shape, x.shape[-1])
    return rows.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


# --------------------------------------------------------------------------------------------------------- custom ops


def _sum_rows(x, inverse, backend):
    return (_sum_rows_torch if backend == "torch" else _sum_rows_triton)(x, inverse)


@operator("spread_tokens")
def _spread_op(x: Tensor, token: Tensor, inverse: Tensor, backend: str) -> Tensor:
    return x.index_select(0, token) if backend == "torch" else _copy_rows_triton(x, inverse)


@operator("collect_tokens")
def _collect_op(x: Tensor, token: Tensor, inverse: Tensor, backend: str) -> Tensor:
    return _sum_rows(x, inverse, backend)


@_spread_op.register_fake
def _(x, token, inverse, backend):
    return x.new_empty((token.shape[0], x.shape[1]))


@_collect_op.register_fake
def _(x, token, inverse, backend):
    return x.new_empty((inverse.shape[0], x.shape[1]))


def _setup_spread(ctx, inputs, output):
    _, token, inverse, ctx.backend = inputs
    ctx.save_for_backward(token, inverse)


def _spread_autograd(ctx, dy):
    return _collect_op(_dense_rows(dy), *ctx.saved_tensors, ctx.backend), None, None, None


def _collect_autograd(ctx, dy):
    return _spread_op(_dense_rows(dy), *ctx.saved_tensors, ctx.backend), None, None, None


def _dense_rows(x):
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


_spread_op.register_autograd(_spread_autograd, setup_context=_setup_spread)
_collect_op.register_autograd(_collect_autograd, setup_context=_setup_spread)


# ------------------------------------------------------------------------------------------------------------- public


def token_order(experts: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the experts, of equal experts that of the tokens. Nothing waits for the device.

    experts: int64 [t, k], the experts of each token -> token int64 [t * k] and inverse int64 [t, k], as the functions below
    take them.
    """
    order = experts.flatten().argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order // experts.shape[1], inverse.view(experts.shape)


def spread_tokens(x: Tensor, token: Tensor, inverse: Tensor, *, backend: str | None = None) -> Tensor:
    """x [t, h] -> [t * k, h], a copy of a token's row at each of its places.

    token, inverse: see token_order. Raises ValueError for a shape, dtype or device that does not fit.
    """
    backend = _check(x, token, inverse, backend, rows=inverse.shape[0])
    return _spread_op(_dense_rows(x), token, inverse, backend)


def collect_tokens(x: Tensor, token: Tensor, inverse: Tensor, *, backend: str | None = None) -> Tensor:
    """x [t * k, h] -> [t, h], the sums of each token's rows, in fp32 and rounded once.

    token, inverse: see token_order. Raises ValueError for a shape, dtype or device that does not fit.
    """
    backend = _check(x, token, inverse, backend, rows=token.shape[0])
    return _collect_op(_dense_rows(x), token, inverse, backend)


def _check(x, token, inverse, backend, *, rows):
    backend = choose_backend(x, backend)
    require(inverse.dim() == 2, f"inverse.dim() ({inverse.dim()}) must be 2")
    require(
        token.shape == (inverse.numel(),),
        f"token.shape ({tuple(token.shape)}) must be ({inverse.numel()},), as inverse",
    )
    require(x.dim() == 2 and x.shape[0] == rows, f"x.shape ({tuple(x.shape)}) must be ({rows}, h)")
    check_float("x", x, backend)
    for name, index in (("token", token), ("inverse", inverse)):
        require(index.dtype == torch.int64, f"{name}.dtype ({index.dtype}) must be torch.int64")
        require(index.device == x.device, f"{name}.device ({index.device}) must equal x.device ({x.device})")
    return backend
