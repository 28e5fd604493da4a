"""The weights that a model begins with, drawn from (seed, parameter name): one seed gives one model on every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagscale_like.arch import OUTPUT_NAME, Parameter, Role
from flagscale_like.errors import required
from flagscale_like.model.build import LanguageModel, named_shards
from flagscale_like.model.lora import adapted
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import ParallelContext


def matrix_std(role: Role, spec: ModelSpec) -> float:
    """Standard deviation that a matrix is drawn with.

    init_std; for the two that write to the residual stream output_init_std, or, depth-scaled,
    init_std / sqrt(2 * num_layers) (Radford et al. 2019). muP (Yang et al. 2022, table 8) divides by sqrt(m) where both
    sides grow with the width, m = hidden_size / base_hidden_size, and by m in the output layer and in routers. The table's
    output multiplier 1 / m is that second factor: with Adam, a multiplier can be moved into the standard deviation and the
    learning rate.
    """
    arch, init = spec.arch, spec.init
    std, scaled = arch.init_std, init.scheme == "depth_scaled"
    if role.writes_to_residual:
        std = arch.output_init_std or (std / (2 * arch.num_layers) ** 0.5 if scaled else std)
    if init.mup and role.grows_with_width:
        width = arch.hidden_size / init.mup.base_hidden_size
        std /= width if role.outputs_stay else width**0.5
    return std


@torch.no_grad()
def initialize_weights(
    chunks: Sequence[LanguageModel], ctx: ParallelContext, *, only: Collection[nn.Parameter] | None = None
) -> None:
    """Fill the weights of this rank's chunks, as their spec says.

    Each rank draws the full matrix and keeps its own part. Matrices are normal, with `matrix_std`; a value head with variance
    1 / (hidden_size + 1) (Stiennon et al. 2020); norms are norm_init, q's and k's own norms 1. Biases and the rows of the
    padded vocabulary are zero. Of an adapter, A is drawn as lora.init says, B is zero, and DoRA's magnitudes are the lengths
    of the rows, so that the model computes what it computes without.

    Args:
        only: parameters to fill; None fills all. Magnitudes need the weights that they are of.
    """
    for chunk in chunks:
        spec = chunk.spec
        table = spec.table
        constants = {Role.NORM: spec.arch.norm_init, Role.HEAD_NORM: 1.0}
        constants |= dict.fromkeys((Role.BIAS, Role.ROUTER_BIAS, Role.ADAPTER_B), 0.0)
        for name, shard in named_shards(chunk).items():
            if only is not None and shard not in only:
                continue
            if name == OUTPUT_NAME and spec.head != "language_model":
                shard.copy_(_normal(name, shard.shape, (spec.arch.hidden_size + 1) ** -0.5, spec.seed, ctx))
                continue
            parameter = table[name]
            if parameter.role is Role.ADAPTER_MAGNITUDE:
                continue  # from the weights: see below
            if parameter.role in constants:
                shard.fill_(constants[parameter.role])
            elif parameter.experts:
                _fill_experts(shard, parameter, spec, ctx)
            else:
                shard.copy_(_shard_of(_draw(parameter, spec, ctx), parameter, ctx))
    for linear, adapter in adapted(chunks):
        magnitude = adapter.magnitude
        if magnitude is not None and (only is None or magnitude in only):
            magnitude.copy_(adapter.row_norms(linear.weight))


def _fill_experts(shard: Tensor, parameter: Parameter, spec: ModelSpec, ctx: ParallelContext) -> None:
    """Draw this rank's experts, each from its own name, so that no rank makes what others hold."""
    first = ctx.ep_rank * len(shard)
    for index, matrix in enumerate(shard):
        one = replace(parameter, name=f"{parameter.name}/{first + index}", shape=parameter.shape[1:], experts=0)
        matrix.copy_(_draw(one, spec, ctx))


def _draw(parameter: Parameter, spec: ModelSpec, ctx: ParallelContext) -> Tensor:
    """The whole matrix in fp32, without the padding of the vocabulary, which must not shift the numbers drawn."""
    if parameter.role is Role.ADAPTER_A and required(spec.lora, "lora").init == "gaussian":
        return _normal(parameter.name, parameter.shape, 1 / parameter.shape[0], spec.seed, ctx)
    if parameter.role is Role.ADAPTER_A:
        full, generator = _empty(parameter.name, parameter.shape, spec.seed, ctx)
        bound = parameter.shape[1] ** -0.5  # torch's for a linear layer: kaiming, a = sqrt(5)
        return full.uniform_(-bound, bound, generator=generator)
    return _normal(parameter.name, parameter.shape, matrix_std(parameter.role, spec), spec.seed, ctx)


def _normal(name: str, shape: Sequence[int], std: float, seed: int, ctx: ParallelContext) -> Tensor:
    full, generator = _empty(name, shape, seed, ctx)
    return full.normal_(0.0, std, generator=generator)


def _empty(name: str, shape: Sequence[int], seed: int, ctx: ParallelContext) -> tuple[Tensor, torch.Generator]:
    """A tensor to fill, and the generator of a parameter's own numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = ctx.platform.generator(int.from_bytes(digest[:6], "little"))
    return torch.empty(tuple(shape), device=ctx.platform.device, dtype=torch.float32), generator


def _shard_of(full: Tensor, parameter: Parameter, ctx: ParallelContext) -> Tensor:
    """This tensor-parallel rank's part of a whole matrix."""
    tp, rank = ctx.layout.tp, ctx.tp_rank
    padding = parameter.padded_shape(tp)[0] - full.shape[0]
    if padding:
        full = F.pad(full, (0, 0, 0, padding))
    if parameter.cut is None:
        return full
    stacked = full.chunk(parameter.blocks, dim=parameter.cut)
    return torch.cat([block.chunk(tp, dim=parameter.cut)[rank] for block in stacked], dim=parameter.cut)
