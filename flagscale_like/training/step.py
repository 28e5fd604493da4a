"""One optimizer step and one evaluation, through megatron-core's pipeline schedules."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from flagscale_like.config import RunConfig
from flagscale_like.model.build import unwrap
from flagscale_like.runtime.parallel import ParallelContext

Batches = Iterator[dict[str, Tensor]]


class Verdict(Enum):
    """What becomes of a step, once loss and gradient norm are known and before the parameters change."""

    UPDATE = "update"
    SKIP = "skip"
    REWIND = "rewind"
    STOP = "stop"


# (loss, gradient norm, fp16 overflow) -> Verdict. It sees reduced values, so that every rank comes to the same one.
Decide = Callable[[float, float, bool], Verdict]


def update_if_finite(loss: float, grad_norm: float, overflow: bool) -> Verdict:
    """The least that a step must ask for."""
    return Verdict.UPDATE if math.isfinite(loss) and math.isfinite(grad_norm) and not overflow else Verdict.SKIP


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the tokens of the global batch, in nats.
        grad_norm: global L2 norm of the gradient, before clipping.
        tokens: tokens that counted for the loss.
        verdict: whether the update was made; if not, what is to be done.
        flags: sums over all ranks of what each gave as `flags`.
        micro_batch_losses: on the last stage, what `_loss` reported of this rank's micro-batches; still on the device.
    """

    loss: float
    grad_norm: float
    tokens: int
    verdict: Verdict
    flags: list[float]
    micro_batch_losses: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def updated(self) -> bool:
        return self.verdict is Verdict.UPDATE

    def sample_losses(self) -> list[float]:
        """On the last stage, each sample's mean loss a token, as this rank read them; waits for the device."""
        if not self.micro_batch_losses:
            return []
        sums, tokens = (
            torch.cat([item[name] for item in self.micro_batch_losses]) for name in ("sample sums", "sample tokens")
        )
        return (sums / tokens).tolist()


# (a micro-batch, its tokens' losses [b, s]): called where losses are computed, which is on the last stage.
Watch = Callable[[dict[str, Tensor], Tensor], None]


def _loss(batch: dict[str, Tensor], watch: Watch | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over the micro-batch and its token count; megatron-core divides the gradients by the count of the whole batch.

    Args:
        batch: with several sources it holds each sample's, `source` [b].
        losses: [b, s], each token's cross-entropy.
    """
    if watch is not None:
        watch(batch, losses)
    loss_mask, source = batch["loss_mask"], batch.get("source")
    masked = losses.float() * loss_mask  # [b, s]
    total, tokens = masked.sum(), loss_mask.sum().to(torch.int)
    # The schedules scale the first value in place after this returns: what is reported must be a copy.
    report = {"sum": total.detach().clone(), "tokens": tokens.clone()}
    report |= {"sample sums": masked.detach().sum(-1), "sample tokens": loss_mask.sum(-1)}  # [b]
    return total, tokens, report | ({"source": source} if source is not None else {})


def _forward(
    batches: Batches | None, chunk: MegatronModule, *, watch: Watch | None = None
) -> tuple[Tensor, functools.partial]:
    model = unwrap(chunk)
    batch = next(batches) if (model.pre_process or model.post_process) else {}
    output = chunk(input_ids=batch.get("tokens"), position_ids=None, attention_mask=None, labels=batch.get("labels"))
    return output, functools.partial(_loss, batch, watch)


def _run_schedule(
    chunks: list[MegatronModule],
    config: RunConfig,
    batches: Batches,
    num_microbatches: int,
    *,
    forward_only: bool,
    watch: Watch | None = None,
) -> list[dict[str, Tensor]]:
    """Run the schedule on all chunks; returns the losses of the last stage's micro-batches."""
    iterators = itertools.tee(batches, len(chunks))
    return get_forward_backward_func()(
        forward_step_func=functools.partial(_forward, watch=watch),
        data_iterator=list(iterators) if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=config.train.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )


def _sum_losses(losses: list[dict[str, Tensor]], ctx: ParallelContext, *extra: float) -> list[float]:
    """[loss sum, tokens, *extra], summed over all ranks; tensor-parallel ranks hold the same loss and count once."""
    counts = ctx.is_last_stage and ctx.tp_rank == 0
    local = [float(sum(item[name] for item in losses)) if counts and losses else 0.0 for name in ("sum", "tokens")]
    return ctx.sum([*local, *extra])


def _add_by_source(totals: Tensor, losses: list[dict[str, Tensor]]) -> None:
    """Add the samples' losses and tokens to `totals`, [2, sources] float64 on the host, where the samples have a source."""
    for item in losses:
        if "source" in item:
            values = torch.stack((item["sample sums"], item["sample tokens"])).double().cpu()  # [2, b]
            totals.index_add_(1, item["source"], values)


def _clip(optimizer: MegatronOptimizer, limit: float, grad_norm: float) -> None:
    """Scale the gradients to norm `limit` where theirs is larger: in place, and on a GPU in one launch for many."""
    scale = limit / (grad_norm + 1e-6)
    if scale < 1:
        torch._foreach_mul_([p.grad for p in optimizer.get_parameters() if p.grad is not None], scale)


def train_step(
    chunks: list[MegatronModule],
    optimizer: MegatronOptimizer,
    config: RunConfig,
    ctx: ParallelContext,
    batches: Batches,
    num_microbatches: int,
    *,
    decide: Decide = update_if_finite,
    watch: Watch | None = None,
    flags: Callable[[], Sequence[float]] = tuple,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward and backward over `num_microbatches`, then the update, if `decide` says so.

    Args:
        watch: sees each micro-batch's losses; rank-local.
        flags: what this rank has to tell the others (that it was asked to stop, say), asked for at the end of the step and
            added up over the ranks in the reduction of the loss.
        before_update: called when parameters are about to change.
    """
    losses, overflow = make_gradients(chunks, optimizer, config, batches, num_microbatches, watch=watch)
    grad_norm = float(optimizer.get_grad_norm())
    total, tokens, *summed = _sum_losses(losses, ctx, *flags())
    loss = total / tokens if tokens else math.nan
    verdict = decide(loss, grad_norm, overflow)
    if verdict is Verdict.UPDATE:
        before_update()
        if config.optimizer.clip_grad > 0:
            _clip(optimizer, config.optimizer.clip_grad, grad_norm)
        optimizer.step_with_ready_grads()
    return StepResult(loss, grad_norm, int(tokens), verdict, summed, losses)


def micro_batch_count(config: RunConfig, ctx: ParallelContext, samples: int) -> int:
    """Micro-batches a data-parallel rank that hold `samples` or a few more; the interleaved schedule wants whole rounds."""
    round_ = config.parallel.pp if config.parallel.vpp > 1 else 1
    count = -(-samples // (config.train.micro_batch_size * ctx.dp))
    return -(-count // round_) * round_


def make_gradients(
    chunks: list[MegatronModule],
    optimizer: MegatronOptimizer,
    config: RunConfig,
    batches: Batches,
    num_microbatches: int,
    *,
    watch: Watch | None = None,
) -> tuple[list[dict[str, Tensor]], bool]:
    """Forward and backward: the reduced gradients lie with the optimizer's fp32 weights, and no parameter changes.

    Returns:
        The losses of this rank's micro-batches, and whether the fp16 gradients overflowed.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    # The schedule asks for exactly num_microbatches from each chunk's iterator.
    part = itertools.islice(batches, num_microbatches)
    losses = _run_schedule(chunks, config, part, num_microbatches, forward_only=False, watch=watch)
    return losses, optimizer.prepare_grads()


@torch.no_grad()
def forward_losses(
    chunks: list[MegatronModule], config: RunConfig, ctx: ParallelContext, batches: Batches, num_microbatches: int
) -> tuple[float, float]:
    """Sum of the tokens' losses, in nats, and their number, over `num_microbatches` of every data-parallel rank."""
    total, tokens = _sum_losses(_run_schedule(chunks, config, batches, num_microbatches, forward_only=True), ctx)
    return total, tokens


@torch.no_grad()
def evaluate(
    chunks: list[MegatronModule],
    config: RunConfig,
    ctx: ParallelContext,
    batches: Batches,
    steps: int,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[float, dict[str, float]]:
    """Mean loss, in nats a token, over `steps` global batches, and of the samples of each source of a blend that were read.

    Args:
        on_step: called before each global batch.
    """
    gathers = chunks[0].ddp_config.overlap_param_gather
    for chunk in chunks:
        if gathers:
            chunk.disable_forward_pre_hook()
        chunk.eval()
    num_microbatches = config.train.global_batch_size // (config.train.micro_batch_size * ctx.dp)
    names = config.data.source_names
    overall, by_source = torch.zeros(2, dtype=torch.float64), torch.zeros(2, len(names), dtype=torch.float64)
    for _ in range(steps):
        on_step()
        part = itertools.islice(batches, num_microbatches)
        losses = _run_schedule(chunks, config, part, num_microbatches, forward_only=True)
        overall += torch.tensor(_sum_losses(losses, ctx), dtype=torch.float64)
        if ctx.is_last_stage and ctx.tp_rank == 0:
            _add_by_source(by_source, losses)
    for chunk in chunks:
        chunk.train()
        if gathers:
            chunk.enable_forward_pre_hook()
    sums = ctx.sum(by_source.flatten().tolist()) if names else []
    pairs = zip(names, sums[: len(names)], sums[len(names) :], strict=True)
    read = {name: loss / tokens for name, loss, tokens in pairs if tokens}
    return (overall[0] / overall[1]).item() if overall[1] else math.nan, read
