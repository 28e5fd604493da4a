"""The weights that a model begins with, drawn from (seed, parameter name): one seed gives one model on every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like.arch import ModelArch, Parameter, Role, parameters_by_name
from flagscale_like.config import Init, RunConfig
from flagscale_like.model.build import LanguageModel, named_shards
from flagscale_like.runtime.parallel import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """What the first weights depend on; the layout is no part of it."""

    arch: ModelArch
    init: Init
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Initialisation:
        return cls(arch=config.model, init=config.init, seed=config.train.seed)

    def matrix_std(self, role: Role) -> float:
        """Standard deviation that a matrix is drawn with.

        init_std; for the two that write to the residual stream output_init_std, or, depth-scaled,
        init_std / sqrt(2 * num_layers) (Radford et al. 2019). muP (Yang et al. 2022, table 8) divides by sqrt(m) where both
        sides grow with the width, m = hidden_size / base_hidden_size, and by m in the output layer. The table's output
        multiplier 1 / m is that second factor: with Adam, a multiplier can be moved into the standard deviation and the
        learning rate.
        """
        arch, init = self.arch, self.init
        std, scaled = arch.init_std, init.scheme == "depth_scaled"
        if role.writes_to_residual:
            std = arch.output_init_std or (std / (2 * arch.num_layers) ** 0.5 if scaled else std)
        if init.mup and role.grows_with_width:
            width = arch.hidden_size / init.mup.base_hidden_size
            std /= width if role is Role.OUTPUT else width**0.5
        return std


@torch.no_grad()
def initialize_weights(
    chunks: Sequence[LanguageModel],
    initialisation: Initialisation,
    ctx: ParallelContext,
    *,
    only: Collection[str] | None = None,
) -> None:
    """Fill the weights of this rank's chunks.

    Each rank draws the full matrix and keeps its own part. Matrices are normal, with `matrix_std`; norms are norm_init, q's
    and k's own norms 1. Biases and the rows of the padded vocabulary are zero.

    Args:
        only: names of the parameters to fill, as in `arch.parameters`; None is all. The last stage's copy of a tied
            embedding goes by the embedding's name.
    """
    arch = initialisation.arch
    table = parameters_by_name(arch)
    constants = {Role.NORM: arch.norm_init, Role.HEAD_NORM: 1.0, Role.BIAS: 0.0}
    for chunk in chunks:
        for name, shard in named_shards(chunk).items():
            parameter = table[name]
            if only is not None and parameter.name not in only:
                continue
            if parameter.role in constants:
                shard.fill_(constants[parameter.role])
            else:
                shard.copy_(_shard_of(_draw(parameter, initialisation, ctx), parameter, ctx))


def _draw(parameter: Parameter, initialisation: Initialisation, ctx: ParallelContext) -> Tensor:
    """The whole matrix in fp32, without the padding of the vocabulary, which must not shift the numbers drawn."""
    digest = hashlib.sha256(f"{initialisation.seed}/{parameter.name}".encode()).digest()
    generator = ctx.platform.generator(int.from_bytes(digest[:6], "little"))
    full = torch.empty(parameter.shape, device=ctx.platform.device, dtype=torch.float32)
    return full.normal_(0.0, initialisation.matrix_std(parameter.role), generator=generator)


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
