r"""The output layer and the cross-entropy in one operator that never holds the full logits.

    logits = hidden W^T [n, v]        loss = cross_entropy(logits, target)

The forward computes the logits of one chunk of tokens at a time, reduces them to four numbers per token (see
cross_entropy.py), and drops them. The backward computes them again, writes their gradient g over them, and adds

    dhidden = g W        dW = g^T hidden

so the largest buffer is one chunk of logits. Computing the logits twice takes 4 matrix products instead of 3. Computing
the gradients in the forward would avoid that, but only where the weight of each token's loss is known by then, and it
would hold dW [v, h] during the whole backward.

Tensor parallelism: W holds this rank's rows [rank * v, (rank + 1) * v), and one collective combines the numbers of all
chunks. Without sequence parallelism every rank has the same hidden, and an all-reduce sums its gradient. With it, hidden
is this rank's [s / tp, ...]: it is all-gathered along the first dimension, and its gradient is reduce-scattered.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flagscale_kernels._checks import check_float, check_same, choose_backend, require, takes_cudas_way
from flagscale_kernels._operators import autocast_to, autocasting, launching_on
from flagscale_kernels.cross_entropy import (
    check_loss_options,
    check_target,
    combine_statistics,
    cross_entropy_reference,
    gradient_inplace_op,
    group_size_and_rank,
    losses_and_lse,
    reduce_losses,
    statistics_op,
)

HAS_WIDE_ADDMM = "dtype_out" in torch.ops.aten.addmm.overloads()
MIN_CHUNK_TOKENS = 1024  # fewer rows do not keep the matrix units busy


def default_chunk_tokens(tokens: int, hidden: int, vocab: int) -> int:
    """Tokens whose logits take about as much memory as `hidden`, but at least MIN_CHUNK_TOKENS (or all tokens)."""
    chunk = max(MIN_CHUNK_TOKENS, tokens * hidden // vocab)
    return max(1, min(tokens, chunk))


def _gather_sequence(hidden, group):
    """[s / tp, ...] of each rank -> [s, ...]."""
    whole = hidden.new_empty((dist.get_world_size(group) * hidden.shape[0], *hidden.shape[1:]))
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def _reduce_scatter_sequence(whole, group):
    """[s, ...] -> this rank's [s / tp, ...] of the sum over the ranks."""
    part = whole.new_empty((whole.shape[0] // dist.get_world_size(group), *whole.shape[1:]))
    dist.reduce_scatter_tensor(part, whole, group=group)
    return part


class _Options(NamedTuple):
    """The options of one call, for its forward and its backward."""

    group: dist.ProcessGroup | None
    sequence_parallel: bool
    chunk_tokens: int | None
    vocab_size: int  # without padding, over the whole group
    ignore_index: int
    label_smoothing: float
    z_loss: float
    accumulate_main_grad: bool
    backend: str


def _rows_in_use(weight, options):
    """The leading rows of this rank's weight that are not padding; there may be none."""
    first = group_size_and_rank(options.group)[1] * weight.shape[0]
    return weight[: min(max(options.vocab_size - first, 0), weight.shape[0])]


def _set_or_add_product(total, a, b, *, add):
    """total = a @ b, or total += a @ b, where total has the operands' dtype or is fp32.

    On a GPU an fp32 total gets the products as the matrix units sum them: nothing is rounded to a's dtype, and no product
    of total's size is written to memory and read again.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=int(add))
    elif takes_cudas_way(a) and HAS_WIDE_ADDMM and total.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=int(add), out=total)
    elif add:
        total.add_(a @ b)
    else:
        total.copy_(a @ b)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, options):
        with launching_on(hidden.device):
            return _forward(ctx, hidden, weight, target, options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        with launching_on(dloss.device):
            return *_backward(ctx, dloss), None, None


def _forward(ctx, hidden, weight, target, options):
    v, h = weight.shape
    used = _rows_in_use(weight, options).to(hidden.dtype)  # [v, h] -> [u, h]
    vocab_start = group_size_and_rank(options.group)[1] * v
    whole = _gather_sequence(hidden, options.group) if options.sequence_parallel else hidden
    x = whole.reshape(-1, h)  # [s, b, h] -> [s * b, h]
    flat_target = target.reshape(-1)
    chunk = options.chunk_tokens or default_chunk_tokens(x.shape[0], h, v)
    smoothing = options.label_smoothing
    stats = [
        statistics_op(part @ used.t(), wanted, vocab_start, smoothing != 0, options.backend)
        for part, wanted in zip(x.split(chunk), flat_target.split(chunk))
    ]
    statistics = combine_statistics(torch.cat(stats), options.group)
    ignored = flat_target == options.ignore_index
    loss, lse = losses_and_lse(statistics, ignored, options.vocab_size, smoothing, options.z_loss)
    ctx.save_for_backward(hidden, weight, flat_target, lse, ignored)
    ctx.chunk, ctx.options = chunk, options
    ctx.gradient_options = vocab_start, options.vocab_size, smoothing, options.z_loss, options.backend
    return loss


def _backward(ctx, dloss):
    """The gradients of hidden and weight."""
    hidden, weight, target, lse, ignored = ctx.saved_tensors
    options, group = ctx.options, ctx.options.group
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    used = _rows_in_use(weight, options).to(hidden.dtype)
    whole = _gather_sequence(hidden, group) if options.sequence_parallel else hidden
    x = whole.reshape(-1, weight.shape[1])
    scale = dloss.to(lse.dtype).masked_fill(ignored, 0.0)
    dx: Any = torch.empty_like(x) if need_hidden else None
    main_grad = getattr(weight, "main_grad", None) if options.accumulate_main_grad else None
    dw: Any = main_grad
    dw_used: Any = None
    if need_weight:
        if main_grad is None:
            # The chunks' sum is kept in fp32: a bf16 sum loses small terms.
            one_chunk = x.shape[0] <= ctx.chunk and weight.dtype == x.dtype
            dw = torch.empty(weight.shape, dtype=weight.dtype if one_chunk else lse.dtype, device=weight.device)
            dw[used.shape[0] if x.shape[0] else 0 :] = 0
        dw_used = dw[: used.shape[0]]  # nothing is added to the padding rows
    for start in range(0, x.shape[0], ctx.chunk):
        rows = slice(start, start + ctx.chunk)
        g = x[rows] @ used.t()
        gradient_inplace_op(g, target[rows], lse[rows], scale[rows], *ctx.gradient_options)
        if need_hidden:
            torch.mm(g, used, out=dx[rows])
        if need_weight:
            _set_or_add_product(dw_used, g.t(), x[rows], add=start > 0 or main_grad is not None)
    if need_hidden:
        dx = dx.view(whole.shape)
        if options.sequence_parallel:
            dx = _reduce_scatter_sequence(dx, group)
        elif group_size_and_rank(group)[0] > 1:
            dist.all_reduce(dx, group=group)
    if main_grad is not None and need_weight:
        # megatron-core's convention: with this flag its hook does not add .grad to main_grad.
        weight.grad_added_to_main_grad = True
        dw = torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
    return dx, dw.to(weight.dtype) if need_weight else None


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, *, vocab_size: int | None = None, **options
) -> Tensor:
    """The definition in plain PyTorch, without reduction or sharding: hidden [..., h], weight [v, h] -> loss [...]."""
    return cross_entropy_reference(hidden @ weight[:vocab_size].t(), target, **options)


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    accumulate_main_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(hidden @ weight.T, target): hidden [..., h], weight [v, h], target [...] -> fp32 [...] or [].

    group: a tensor-parallel group. weight holds this rank's rows of the vocabulary, and every rank has the same target
    and gets the same result. The gradient of hidden is already summed over the group.
    sequence_parallel: hidden is this rank's [s / tp, b, h], in rank order; target is the whole [s, b].
    chunk_tokens: number of tokens whose logits are computed at a time. By default their logits take about as much memory
    as hidden.
    vocab_size: number of tokens in the vocabulary, over the whole group. The rows of the weight after them are padding:
    their logits count as -inf, and their gradient is exactly 0. By default no row is padding.
    Under torch.autocast both are multiplied in its dtype, as by torch.nn.functional.linear: bf16 hidden states go with an
    fp32 weight, whose gradient is summed in fp32.
    accumulate_main_grad: add the weight's gradient to weight.main_grad, if it exists, and set
    weight.grad_added_to_main_grad, as megatron-core's gradient accumulation fusion does.
    The other options and the errors are those of `cross_entropy`.
    """
    mixed = autocasting(hidden.device)  # then the weight is cast inside: its main_grad stays its own
    (hidden,) = autocast_to(hidden)
    backend = choose_backend(hidden, backend)
    check_loss_options(label_smoothing, z_loss, reduction)
    check_float("hidden", hidden, backend)
    check_float("weight", weight, backend)
    for attribute in ("device",) if mixed else ("dtype", "device"):
        check_same(attribute, [("hidden", hidden), ("weight", weight)])
    require(hidden.dim() >= 2, f"hidden.dim() ({hidden.dim()}) must be at least 2")
    require(weight.dim() == 2, f"weight.dim() ({weight.dim()}) must be 2")
    require(
        weight.shape[1] == hidden.shape[-1],
        f"weight.shape[1] ({weight.shape[1]}) must equal hidden.shape[-1] ({hidden.shape[-1]})",
    )
    require(chunk_tokens is None or chunk_tokens > 0, f"chunk_tokens ({chunk_tokens}) must be at least 1")
    require(not sequence_parallel or group is not None, "sequence_parallel (True) needs a group (None)")
    size = group_size_and_rank(group)[0]
    rows = hidden.shape[:-1]
    if sequence_parallel:
        rows = torch.Size((rows[0] * size, *rows[1:]))
    padded = weight.shape[0] * size
    vocab_size = padded if vocab_size is None else vocab_size
    require(0 < vocab_size <= padded, f"vocab_size ({vocab_size}) must be from 1 to the weight's {padded} rows")
    check_target(target, rows, hidden.device, ignore_index, vocab_size)
    options = _Options(
        group, sequence_parallel and size > 1, chunk_tokens, vocab_size, ignore_index, label_smoothing, z_loss,
        accumulate_main_grad, backend,
    )  # fmt: skip
    loss = _LinearCrossEntropy.apply(hidden, weight, target, options)
    return reduce_losses(loss.view(target.shape), target, ignore_index, reduction)
