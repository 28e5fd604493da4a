r"""Cross-entropy over a vocabulary that may be sharded over a tensor-parallel group.

With logits x of a token, target t, vocabulary size V, label smoothing e and z-loss weight z (Chowdhery et al. 2022,
arXiv:2204.02311, section 5):

    lse = log sum_j exp x_j        loss = (1 - e) (lse - x_t) + e (lse - mean_j x_j) + z lse^2
    dloss/dx_j = p_j (1 + 2 z lse) - (1 - e) [j = t] - e / V,      p_j = exp(x_j - lse)

and both are 0 where t = ignore_index.

The forward reads the logits once and computes, in fp32, the online maximum m, the sum l = sum_j exp(x_j - m), x_t and
sum_j x_j. A rank of the group computes these four numbers for its shard of the vocabulary, and the shards combine exactly

    m = max_r m_r,    l = sum_r l_r exp(m_r - m),    x_t and sum_j x_j add up

so a group needs one collective of [tokens, 4] numbers; the usual implementation has three all-reduces, of the maximum,
the target's logit and the sum. The backward reads the logits again and writes the gradient over them. Both together move
6 bytes per logit in bf16 and allocate no second buffer of the logits' size.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flagscale_kernels._checks import check_float, check_same, choose_backend, require, say_once
from flagscale_kernels._operators import operator
from flagscale_kernels._rows import as_rows, row_start
from flagscale_kernels._triton import cdiv, next_power_of_2, tl, triton

REDUCTIONS = ("none", "mean", "sum")
MAX_BLOCK = 4096
MAX_LANES, MAX_DEPTH = (
    1024,
    4,
)  # columns of a tile of the statistics: each of 128 threads has 8 lanes, or 16 bytes of bf16
CPU_CHUNK = 1 << 18  # logits that the CPU path processes at a time, so that they stay in its cache

LOG2E = tl.constexpr(1.4426950408889634)


def cross_entropy_reference(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """The definition without reduction, in plain PyTorch: logits [..., v], target [...] -> loss [...], fp32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = wide.logsumexp(-1)
    picked = wide.gather(-1, target.clamp(0, logits.shape[-1] - 1).long().unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * (lse - picked) + z_loss * lse.square()
    if label_smoothing:
        loss = loss + label_smoothing * (lse - wide.mean(-1))
    return loss.masked_fill(target == ignore_index, 0.0)


# ---------------------------------------------------------------------------------------------------------- CPU path


def _row_chunks(logits):
    step = max(1, CPU_CHUNK // logits.shape[1])
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def _statistics_torch(logits, target, vocab_start, with_sum):
    compute = torch.promote_types(logits.dtype, torch.float32)
    n, v = logits.shape
    stats = torch.zeros((n, 4), dtype=compute, device=logits.device)
    column = target.long() - vocab_start
    here = (column >= 0) & (column < v)
    column = column.clamp(0, v - 1)
    stats[:, 2] = torch.where(here, logits.gather(1, column[:, None])[:, 0].to(compute), 0.0)
    for rows in _row_chunks(logits):
        x = logits[rows].to(compute)
        if with_sum:
            torch.sum(x, dim=1, out=stats[rows, 3])
        m = x.amax(1)
        stats[rows, 0] = m
        x = x - m.masked_fill(m == -torch.inf, 0.0)[:, None]
        torch.sum(x.exp_(), dim=1, out=stats[rows, 1])
    return stats


def _gradient_torch(logits, target, lse, scale, out, vocab_start, vocab, label_smoothing, z_loss):
    v = logits.shape[1]
    column = target.long() - vocab_start
    here = (column >= 0) & (column < v)
    column = column.clamp(0, v - 1)
    at_target = torch.where(here, scale * (label_smoothing - 1), 0.0)
    factor = scale * (1 + 2 * z_loss * lse)
    for rows in _row_chunks(logits):
        x = (logits[rows] - lse[rows, None]).exp_().mul_(factor[rows, None])
        if label_smoothing:
            x.sub_((scale * (label_smoothing / vocab))[rows, None])
        out[rows] = x.scatter_add_(1, column[rows, None], at_target[rows, None])
    out.masked_fill_((scale == 0)[:, None], 0.0)  # even where the logits are nan or inf


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _statistics_kernel(
    X, TARGET, STATS, v, vocab_start, inner, outer_stride, inner_stride,
    WITH_SUM: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    X += row_start(row, inner, outer_stride, inner_stride)
    # Each lane keeps the numbers of its own columns. They are combined once, after the loop, so that no iteration waits
    # for other warps; a lane has DEPTH columns an iteration, so that a rescaling costs 1 / DEPTH exponentials a logit.
    m = tl.full([LANES], float("-inf"), tl.float32)
    l = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for first in range(0, v, DEPTH * LANES):
        cols = first + offsets
        x = tl.load(X + cols, mask=cols < v, other=float("-inf")).to(tl.float32)
        if WITH_SUM:
            total += tl.sum(tl.where(cols < v, x, 0.0), axis=0)
        new_m = tl.maximum(m, tl.max(x, axis=0))
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # all logits so far are -inf
        l = l * tl.exp2((m - safe_m) * LOG2E) + tl.sum(tl.exp2((x - safe_m[None, :]) * LOG2E), axis=0)
        m = new_m
    row_m = tl.max(m, axis=0)
    safe_m = tl.where(row_m == float("-inf"), 0.0, row_m)
    row_l = tl.sum(l * tl.exp2((m - safe_m) * LOG2E), axis=0)
    column = tl.load(TARGET + row) - vocab_start
    picked = tl.load(X + column, mask=(column >= 0) & (column < v), other=0.0).to(tl.float32)
    STATS += row.to(tl.int64) * 4
    tl.store(STATS, row_m)
    tl.store(STATS + 1, row_l)
    tl.store(STATS + 2, picked)
    tl.store(STATS + 3, tl.sum(total, axis=0))


@triton.jit
def _gradient_kernel(
    X, TARGET, LSE, SCALE, OUT, v, vocab_start, label_smoothing, smoothed, z_loss, inner, outer_stride, inner_stride,
    out_inner, out_outer_stride, out_inner_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < v
    scale = tl.load(SCALE + row)
    OUT += row_start(row, out_inner, out_outer_stride, out_inner_stride)
    if scale == 0.0:  # an ignored token: the gradient is 0, even where its logits are nan or inf
        tl.store(OUT + cols, tl.zeros([BLOCK], OUT.dtype.element_ty), mask=mask)
    else:
        lse = tl.load(LSE + row)
        column = tl.load(TARGET + row) - vocab_start
        x = tl.load(X + row_start(row, inner, outer_stride, inner_stride) + cols, mask=mask, other=0.0)
        p = tl.exp2((x.to(tl.float32) - lse) * LOG2E)
        grad = p * (1.0 + 2.0 * z_loss * lse) - smoothed
        grad = tl.where(cols == column, grad - (1.0 - label_smoothing), grad) * scale
        tl.store(OUT + cols, grad.to(OUT.dtype.element_ty), mask=mask)


def _block(v):
    block = min(MAX_BLOCK, next_power_of_2(v))
    return block, min(8, max(1, block // 512))


def _statistics_triton(logits, target, vocab_start, with_sum):
    rows = as_rows(logits)
    stats = torch.empty((rows.n, 4), dtype=torch.float32, device=logits.device)
    lanes = min(MAX_LANES, next_power_of_2(logits.shape[-1]))
    depth = min(MAX_DEPTH, next_power_of_2(cdiv(logits.shape[-1], lanes)))
    if rows.n:
        _statistics_kernel[(rows.n,)](
            rows.tensor, target, stats, logits.shape[-1], vocab_start, *rows.addressing,
            WITH_SUM=with_sum, DEPTH=depth, LANES=lanes, num_warps=max(1, lanes // 256),
        )  # fmt: skip
    return stats


def _gradient_triton(logits, target, lse, scale, out, vocab_start, vocab, label_smoothing, z_loss):
    rows, out_rows = as_rows(logits), as_rows(out)
    assert out_rows.tensor is out, "as_rows copied the output"
    v = logits.shape[-1]
    block, warps = _block(v)
    if rows.n:
        _gradient_kernel[(rows.n, cdiv(v, block))](
            rows.tensor, target, lse, scale, out, v, vocab_start, label_smoothing, label_smoothing / vocab, z_loss,
            *rows.addressing, *out_rows.addressing, BLOCK=block, num_warps=warps,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- custom ops


def _gradient(logits, target, lse, scale, out, vocab_start, vocab, label_smoothing, z_loss, backend):
    run = _gradient_torch if backend == "torch" else _gradient_triton
    target, lse, scale = (t.contiguous() for t in (target, lse, scale))  # the kernels read element `row` of each
    run(logits, target, lse, scale, out, vocab_start, vocab, label_smoothing, z_loss)


@operator("cross_entropy_statistics")
def statistics_op(logits: Tensor, target: Tensor, vocab_start: int, with_sum: bool, backend: str) -> Tensor:
    """Reduce [n, v] logits to [n, 4]: maximum, sum of exponentials, the target's logit, sum of logits.

    The target's logit is 0 where another rank holds it, and the sum of logits is 0 unless `with_sum`. v may be 0.
    """
    if logits.shape[1] == 0:
        empty = torch.tensor((-torch.inf, 0.0, 0.0, 0.0), dtype=torch.promote_types(logits.dtype, torch.float32))
        return empty.to(logits.device).repeat(logits.shape[0], 1)
    if backend == "torch":
        return _statistics_torch(logits, target, vocab_start, with_sum)
    return _statistics_triton(logits, target.contiguous(), vocab_start, with_sum)


@operator("cross_entropy_gradient")
def gradient_op(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor,
    vocab_start: int, vocab: int, label_smoothing: float, z_loss: float, backend: str,
) -> Tensor:  # fmt: skip
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _gradient(logits, target, lse, scale, out, vocab_start, vocab, label_smoothing, z_loss, backend)
    return out


@operator("cross_entropy_gradient_", mutates=("logits",))
def gradient_inplace_op(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor,
    vocab_start: int, vocab: int, label_smoothing: float, z_loss: float, backend: str,
) -> None:  # fmt: skip
    if logits.shape[1]:
        _gradient(logits, target, lse, scale, logits, vocab_start, vocab, label_smoothing, z_loss, backend)


@statistics_op.register_fake
def _(logits, target, vocab_start, with_sum, backend):
    return logits.new_empty((logits.shape[0], 4), dtype=torch.promote_types(logits.dtype, torch.float32))


@gradient_op.register_fake
def _(logits, target, lse, scale, vocab_start, vocab, label_smoothing, z_loss, backend):
    return logits.new_empty(logits.shape)


def group_size_and_rank(group):
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


def combine_statistics(stats: Tensor, group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Combine the ranks' [n, 4] into (m, log l, target's logit, sum of logits) of the whole vocabulary, each [n].

    A group needs one all-gather.
    """
    size = group_size_and_rank(group)[0]
    if size > 1:
        parts = stats.new_empty((size * stats.shape[0], 4))
        dist.all_gather_into_tensor(parts, stats, group=group)
        parts = parts.view(size, -1, 4)
        m = parts[..., 0].amax(0)
        l = (parts[..., 1] * (parts[..., 0] - m).exp()).sum(0)
        return m, l.log(), parts[..., 2].sum(0), parts[..., 3].sum(0)
    return stats[:, 0], stats[:, 1].log(), stats[:, 2], stats[:, 3]


def losses_and_lse(statistics, ignored, vocab, label_smoothing, z_loss):
    """(loss, lse), each [n]; the backward needs lse."""
    m, log_l, picked, total = statistics
    lse = m + log_l
    loss = (m - picked) + log_l  # large logits cancel before the small logarithm is added
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * ((m - total / vocab) + log_l)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill(ignored, 0.0), lse


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, group, ignore_index, label_smoothing, z_loss, inplace_backward, backend):
        size, rank = group_size_and_rank(group)
        vocab_start, vocab = rank * logits.shape[-1], size * logits.shape[-1]
        ignored = target == ignore_index
        stats = statistics_op(logits, target, vocab_start, label_smoothing != 0, backend)
        statistics = combine_statistics(stats, group)
        loss, lse = losses_and_lse(statistics, ignored, vocab, label_smoothing, z_loss)
        ctx.save_for_backward(logits, target, lse, ignored)
        ctx.options = vocab_start, vocab, label_smoothing, z_loss, backend
        ctx.inplace_backward = inplace_backward
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, target, lse, ignored = ctx.saved_tensors
        scale = dloss.to(lse.dtype).masked_fill(ignored, 0.0)
        if ctx.inplace_backward:
            gradient_inplace_op(logits, target, lse, scale, *ctx.options)
            return logits, *(None,) * 7
        return gradient_op(logits, target, lse, scale, *ctx.options), *(None,) * 7


# ------------------------------------------------------------------------------------------------------------- public


def check_target(target, rows, device, ignore_index, vocab):
    require(target.dtype in (torch.int32, torch.int64), f"target.dtype ({target.dtype}) must be torch.int32 or int64")
    require(target.shape == rows, f"target.shape ({tuple(target.shape)}) must equal the rows' shape {tuple(rows)}")
    require(target.device == device, f"target.device ({target.device}) must equal the logits' device ({device})")
    if device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():  # on a GPU it would wait
        ignored = target == ignore_index
        if not bool(ignored.all()):
            low = int(target.masked_fill(ignored, vocab - 1).min())
            high = int(target.masked_fill(ignored, 0).max())
            require(low >= 0 and high < vocab, f"target holds {low} .. {high}, outside the vocabulary 0 .. {vocab - 1}")


def check_loss_options(label_smoothing, z_loss, reduction):
    require(0 <= label_smoothing < 1, f"label_smoothing ({label_smoothing}) must be from 0 to less than 1")
    require(z_loss >= 0, f"z_loss ({z_loss}) must be at least 0")
    require(reduction in REDUCTIONS, f"reduction ({reduction!r}) must be one of {REDUCTIONS}")


def reduce_losses(loss, target, ignore_index, reduction):
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (target != ignore_index).sum()  # nan when every token is ignored, as in PyTorch


def owns_dense_memory(x: Tensor) -> bool:
    """Whether nothing else shows x's memory and no two of its elements share it, so that it may be written over."""
    return not x.is_leaf and not x._is_view() and x.is_contiguous()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of logits [..., v] and target [...] (int32 or int64): fp32 [...] for reduction "none", else [].

    group: a tensor-parallel group. This rank's logits are columns [rank * v, (rank + 1) * v) of the vocabulary. Every
    rank has the same global targets and gets the same result. The forward has one collective, the backward none.
    ignore_index, label_smoothing, reduction: as in torch.nn.functional.cross_entropy; "mean" is over tokens that are
    not ignored.
    z_loss: weight of lse^2, which is added to each token's loss.
    inplace_backward: the backward writes the gradient over the logits, which saves a buffer of their size. Nothing may
    read them afterwards; autograd raises RuntimeError where another backward does. Logits that are a leaf, a view of
    another tensor or not dense are left as they are, with one warning in a process; torch.compile plans its own buffers.
    Raises ValueError for a shape, dtype or device that does not fit, or (on the CPU) a target outside the vocabulary.
    """
    backend = choose_backend(logits, backend)
    check_loss_options(label_smoothing, z_loss, reduction)
    check_float("logits", logits, backend)
    require(logits.dim() >= 1, f"logits.dim() ({logits.dim()}) must be at least 1")
    require(logits.shape[-1] > 0, f"logits.shape[-1] ({logits.shape[-1]}) must be positive")
    vocab = logits.shape[-1] * group_size_and_rank(group)[0]
    check_target(target, logits.shape[:-1], logits.device, ignore_index, vocab)
    check_same("device", [("logits", logits), ("target", target)])
    inplace = inplace_backward and logits.requires_grad and not torch.compiler.is_compiling()
    if inplace and not owns_dense_memory(logits):
        say_once("flagscale_kernels.cross_entropy: inplace_backward needs logits that are dense, no leaf and no view")
        inplace = False
    # A view where strides allow it, so that the gradient is written into the caller's buffer.
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.shape[-1] > 1 and flat.stride(-1) != 1:
        flat = flat.contiguous()
    options = (group, ignore_index, label_smoothing, z_loss, inplace, backend)
    loss = _CrossEntropy.apply(flat, target.reshape(-1), *options).view(target.shape)
    return reduce_losses(loss, target, ignore_index, reduction)
