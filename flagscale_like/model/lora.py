"""LoRA (Hu et al. 2022): y = W x + scale B A x, as a child module and a forward hook of megatron-core's parallel linears.

Nothing is wrapped, so no parameter of the base changes its name. A matrix W [out, in] has A [r, in] and B [out, r]:

    ColumnParallelLinear   A whole on every rank, B [out/tp, r] cut as the rows of W
    RowParallelLinear      A [r, in/tp] cut as the columns of W, B whole
    GroupedLinear          of each expert its own A and B, on the rank that holds the expert

What crosses tensor-parallel ranks is A x, [s, b, r]. With SP, each rank sees its part of the sequence where a matrix is
whole; megatron-core sums the gradients of parameters that are marked `sequence_parallel`.

DoRA (Liu et al. 2024) also trains the lengths m of the rows: y = m / |W + scale B A| (W x + scale B A x), rows' norms taken
over `in` and, as in the paper's section 4.3, without a gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from flagscale_like.config import Lora
from flagscale_like.model.experts import GroupedLinear, mark_expert
from flagscale_like.model.modules import mark
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.platforms import Platform

if TYPE_CHECKING:
    from flagscale_like.model.build import LanguageModel

# The number of masks drawn so far, among megatron-core's random streams: a recomputed forward pass gets its own number back,
# and checkpoints save it with the other streams.
MASKS_DRAWN = "adapter-dropout"

MegatronLinear = ColumnParallelLinear | RowParallelLinear


class _AddProduct(torch.autograd.Function):
    """base + scale * low Bᵀ, [s, b, out] from [s, b, r] and [out, r]; no other tensor of [s, b, out] is made.

    The gradients are computed as their transposes. autograd's own products have r columns, for which a CPU's take up to ten
    times as long.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(low, b)
        ctx.scale = scale
        rows = base.reshape(-1, base.shape[-1])
        return torch.addmm(rows, low.reshape(-1, low.shape[-1]), b.t(), alpha=scale).view_as(base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        low, b = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_low = (b.t() @ rows.t()).t() * ctx.scale
        grad_b = (low.reshape(-1, low.shape[-1]).t() @ rows).t() * ctx.scale
        return grad, grad_low.contiguous().view_as(low), grad_b, None


class Adapter(nn.Module):
    """A and B of one matrix, or of a stack of them.

    Args:
        seed: of the dropout, different on ranks that see different data or layers.
        platform: draws the masks of the dropout.

    Attributes:
        on: whether the adapter takes part in the forward pass.
    """

    a: nn.Parameter
    b: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(self, options: Lora, seed: str, platform: Platform) -> None:
        super().__init__()
        self.generator, self.seed = platform.generator, seed
        self.scale, self.dropout, self.on = options.scale, options.dropout, True

    def _drop(self, x: Tensor) -> Tensor:
        """x with some elements set to 0; the others are scaled up with the product (see forward())."""
        if not self.dropout or not self.training:
            return x
        tracker = get_cuda_rng_tracker()
        states = tracker.get_states()
        drawn = states[MASKS_DRAWN]
        tracker.set_states(states | {MASKS_DRAWN: drawn + 1})
        digest = hashlib.sha256(f"{self.seed}/{int(drawn)}".encode()).digest()
        generator = self.generator(int.from_bytes(digest[:6], "little"))
        return x * torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(
            1 - self.dropout, generator=generator
        )

    def row_norms(self, weight: Tensor) -> Tensor:
        """|W + scale B A| over `in`, fp32."""
        raise NotImplementedError


class LinearAdapter(Adapter):
    """A and B of one of megatron-core's linears, whose dtype and device the adapter has."""

    def __init__(self, linear: MegatronLinear, options: Lora, seed: str, platform: Platform) -> None:
        super().__init__(options, seed, platform)
        self.column, self.group = isinstance(linear, ColumnParallelLinear), linear.tp_group
        self.sequence_parallel = linear.sequence_parallel
        # Ranks that hold the same inputs draw the same mask: otherwise their copies of A would grow apart.
        if not self.column or self.sequence_parallel:
            self.seed = f"{seed}/tp{self.group.rank()}"
        out, inner = linear.weight.shape

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=linear.weight.dtype, device=linear.weight.device))

        self.a, self.b = new(options.rank, inner), new(out, options.rank)
        cut, whole = ({self.b: 0}, [self.a]) if self.column else ({self.a: 1}, [self.b])
        if options.dora:
            self.magnitude = new(out)
            if self.column:
                cut[self.magnitude] = 0
            else:
                whole.append(self.magnitude)
        else:
            self.magnitude = None
        for parameter, dimension in (*cut.items(), *((parameter, -1) for parameter in whole)):
            mark(parameter, tensor_model_parallel=dimension >= 0, partition_dim=dimension, partition_stride=1)
        for parameter in whole:
            mark(parameter, sequence_parallel=self.sequence_parallel)

    def forward(self, x: Tensor, base: Tensor, linear: MegatronLinear) -> Tensor:
        """The output with the adapter.

        Args:
            x: input of the linear: column [s, b, in] (s/tp with SP), row [s, b, in/tp].
            base: its output: column [s, b, out/tp], row [s, b, out] (s/tp with SP).
        """
        low = F.linear(self._drop(x), self.a)  # [s(/tp), b, r]
        if self.column and self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.group)
        elif self.column:
            low = copy_to_tensor_model_parallel_region(low, group=self.group)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.group)
        kept = self.scale / (1 - self.dropout if self.training else 1.0)
        y = _AddProduct.apply(base, low, self.b, kept)
        if self.magnitude is None:
            return y
        factor = (self.magnitude / self.row_norms(linear.weight)).to(y.dtype)
        bias = linear.bias if linear.bias is not None and not linear.skip_bias_add else None
        return y * factor if bias is None else (y - bias) * factor + bias

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """|W + scale B A| over `in`, fp32: [out/tp] of a column's W, [out] of a row's, whose columns lie on all ranks.

        By |W|² + 2 scale B·(W Aᵀ) + scale² B (A Aᵀ)·B, so that the sum is never made.
        """
        a, b = self.a.float(), self.b.float()
        square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        square += 2 * self.scale * ((weight @ self.a.t()).float() * b).sum(1)
        square += self.scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        if not self.column and self.group.size() > 1:
            dist.all_reduce(square, group=self.group)
        return square.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


class ExpertAdapter(Adapter):
    """A [e, r, in] and B [e, out, r] of this rank's experts, beside the matrices of a GroupedLinear. Nothing of it is cut."""

    def __init__(self, linear: GroupedLinear, options: Lora, seed: str, platform: Platform) -> None:
        super().__init__(options, seed, platform)
        experts, out, inner = linear.weight.shape

        def new(*shape: int) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(shape, dtype=linear.weight.dtype, device=linear.weight.device))
            mark_expert(parameter, copies_as_dense=linear.weight.allreduce)
            return parameter

        self.a, self.b = new(experts, options.rank, inner), new(experts, out, options.rank)
        self.magnitude = new(experts, out) if options.dora else None

    def forward(self, x: Tensor, base: Tensor, linear: GroupedLinear, ends: Tensor) -> Tensor:
        """x [t, in] and the linear's output, base [t, out], in the order of the experts -> the output with the adapter.

        Args:
            ends: int32 [e], where each expert's tokens end.
        """
        low = F.grouped_mm(self._drop(x), self.a.transpose(1, 2), offs=ends)
        kept = self.scale / (1 - self.dropout if self.training else 1.0)
        y = base + kept * F.grouped_mm(low, self.b.transpose(1, 2), offs=ends)
        if self.magnitude is None:
            return y
        factor = (self.magnitude / self.row_norms(linear.weight)).to(y.dtype)  # [e, out]
        expert = torch.searchsorted(ends, torch.arange(len(x), dtype=torch.int32, device=x.device), right=True)
        return y * factor[expert]

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """|W + scale B A| over `in` of each expert's rows, fp32 [e, out]."""
        return torch.linalg.vector_norm(weight.float() + self.scale * (self.b.float() @ self.a.float()), dim=-1).clamp(
            min=torch.finfo(torch.float32).tiny ** 0.5
        )


def attach_adapters(chunk: LanguageModel, options: Lora, ctx: ParallelContext, seed: int) -> None:
    """Give every linear of the layers that `options` names an adapter, with uninitialised weights."""
    tracker = get_cuda_rng_tracker()
    if MASKS_DRAWN not in tracker.get_states():
        tracker.set_states(tracker.get_states() | {MASKS_DRAWN: torch.zeros((), dtype=torch.int64, device="cpu")})
    place = f"{seed}/dp{ctx.replica_rank}/pp{ctx.groups.pp.rank()}"
    for name, module in list(chunk.decoder.layers.named_modules()):
        if name.rpartition(".")[2] not in options.targets:
            continue
        if isinstance(module, MegatronLinear):
            module.lora = LinearAdapter(module, options, place, ctx.platform)
            module.register_forward_hook(_adapt)
        elif isinstance(module, GroupedLinear):  # over tp, too, ranks see different tokens
            module.lora = ExpertAdapter(module, options, f"{place}/tp{ctx.tp_rank}", ctx.platform)
            module.register_forward_hook(_adapt_experts)


def _adapt(linear: MegatronLinear, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
    return (linear.lora(inputs[0], output[0], linear), output[1]) if linear.lora.on else None


def _adapt_experts(linear: GroupedLinear, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor | None:
    x, ends = inputs
    adapter: Any = linear.lora
    return adapter(x, output, linear, ends) if adapter.on else None


def adapted(chunks: Iterable[nn.Module]) -> Iterator[tuple[Any, Adapter]]:
    """The linears that have an adapter, with it."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(adapter := getattr(module, "lora", None), Adapter):
                yield module, adapter


@contextmanager
def adapters_off(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Within it the chunks compute what they compute without adapters."""
    adapters = [adapter for _, adapter in adapted(chunks)]
    before = [adapter.on for adapter in adapters]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter, on in zip(adapters, before, strict=True):
            adapter.on = on
