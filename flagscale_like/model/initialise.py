"""The weights that a model begins with, drawn from (seed, parameter name): one seed gives one model on every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagscale_like.arch import OUTPUT_NAME, Parameter, Role, parameters_by_name
from flagscale_like.model.build import LanguageModel, named_shards
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import ParallelContext


def matrix_std(role: Role, spec: ModelSpec) -> float:
    """Standard deviation that a matrix is drawn with.

    init_std; for the two that write to the residual stream output_init_std, or, depth-scaled,
    init_std / sqrt(2 * num_layers) (Radford et al. 2019). muP (Yang et al. 2022, table 8) divides by sqrt(m) where both
    sides grow with the width, m = hidden_size / base_hidden_size, and by m in the output layer. The table's output
    multiplier 1 / m is that second factor: with Adam, a multiplier can be moved into the standard deviation and the
    learning rate.
    """
    arch, init = spec.arch, spec.init
    std, scaled = arch.init_std, init.scheme == "depth_scaled"
    if role.writes_to_residual:
        std = arch.output_init_std or (std / (2 * arch.num_layers) ** 0.5 if scaled else std)
    if init.mup and role.grows_with_width:
        width = arch.hidden_size / init.mup.base_hidden_size
        std /= width if role is Role.OUTPUT else width**0.5
    return std


@torch.no_grad()
def initialize_weights(
    chunks: Sequence[LanguageModel], ctx: ParallelContext, *, only: Collection[nn.Parameter] | None = None
) -> None:
    """Fill the weights of this rank's chunks, as their spec says.

    Each rank draws the full matrix and keeps its own part. Matrices are normal, with `matrix_std`; a value head with variance
    1 / (hidden_size + 1) (Stiennon et al. 2020); norms are norm_init, q's and k's own norms 1. Biases and the rows of the
    padded vocabulary are zero.

    Args:
        only: parameters to fill; None fills all.
    """
    for chunk in chunks:
        spec = chunk.spec
        table = parameters_by_name(spec.arch)
        constants = {Role.NORM: spec.arch.norm_init, Role.HEAD_NORM: 1.0, Role.BIAS: 0.0}
        for name, shard in named_shards(chunk).items():
            if only is not None and shard not in only:
                continue
            if name == OUTPUT_NAME and spec.head != "language_model":
                shard.copy_(_normal(name, shard.shape, (spec.arch.hidden_size + 1) ** -0.5, spec.seed, ctx))
                continue
            parameter = table[name]
            if parameter.role in constants:
                shard.fill_(constants[parameter.role])
            else:
                shard.copy_(_shard_of(_draw(parameter, spec, ctx), parameter, ctx))


def _draw(parameter: Parameter, spec: ModelSpec, ctx: ParallelContext) -> Tensor:
    """The whole matrix in fp32, without the padding of the vocabulary, which must not shift the numbers drawn."""
    return _normal(parameter.name, parameter.shape, matrix_std(parameter.role, spec), spec.seed, ctx)


def _normal(name: str, shape: Sequence[int], std: float, seed: int, ctx: ParallelContext) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = ctx.platform.generator(int.from_bytes(digest[:6], "little"))
    full = torch.empty(tuple(shape), device=ctx.platform.device, dtype=torch.float32)
    return full.normal_(0.0, std, generator=generator)


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
