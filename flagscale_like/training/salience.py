"""Salience-consistent initialisation: a calibration before step 0 that evens out how much each residual branch matters.

Baichuan 3's report names the idea, that the importance of parameters to the loss should agree over layers and over the first
steps instead of exploding in a few, and publishes no definition. The following one is ours.

A decoder of L layers has 2 L residual branches, x <- x + W_b u_b(x), with W_b the attention's or the FFN's output matrix.
The salience of a branch is what its output matrix contributes to the loss, to first order and without regard to sign:

    S_b = sum over the elements w of W_b of |w * dloss/dw|

on some batches of the training data. A scale a_b is put on each W_b, and found by iterating

    a_b <- a_b * sqrt(mean(S) / S_b)        (geometric mean; the root, because the branches change each other's gradients)
    a_b <- a_b / sqrt(mean(a^2))            (what the branches add to the residual stream stays what the scheme gave it)

until the S_b agree. Depth is switched on progressively: in round r of R the branches of the first r L / R layers take part
and the deeper ones are silent, so that each is fitted into a network that is already even; some iterations with all layers
follow.

The scales end up in the weights: nothing is left in the forward pass, and an exported model is an ordinary one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flagscale_like.arch import ModelArch, Role, parameters
from flagscale_like.config import RunConfig
from flagscale_like.data.pretrain import build_datasets, micro_batch_count, micro_batches
from flagscale_like.data.selection import Mixture
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.shards import OwnedShard
from flagscale_like.model.build import named_shards
from flagscale_like.objectives.next_token import NextToken


def calibrate(config: RunConfig, engine: Engine, train_samples: int) -> str:
    """Scale the output matrices of the residual branches in place. All ranks call it, before the first step.

    Args:
        train_samples: see `data.pretrain.build_datasets`; the first samples are read, and not counted as consumed.

    Returns:
        How far apart the branches' saliences were, and are, in words.
    """
    return SalienceCalibration(config, engine).run(train_samples)


class SalienceCalibration:
    """The calibration's working state. Branch 2 i is layer i's attention, branch 2 i + 1 its FFN.

    Attributes:
        scales: a_b of every branch, the same on every rank.
    """

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self.config, self.engine, self.ctx = config, engine, engine.ctx
        self.options = config.init.salience
        self.count = 2 * config.model.num_layers
        self.scales = [1.0] * self.count
        branches = branches_of(config.model)
        named = [item for model in engine.models for item in named_shards(model).items()]
        self.matrices: dict[int, tuple[nn.Parameter, Tensor]] = {
            branch: (parameter, parameter.detach().clone())
            for name, parameter in named
            if (branch := branches.get(name)) is not None
        }
        self.shards: list[tuple[int, OwnedShard]] = [
            (branch, shard)
            for shard in engine.owned
            if shard.trained and (branch := branches.get(shard.name)) is not None
        ]
        self.batches = micro_batch_count(config, self.ctx, self.options.samples)

    def run(self, train_samples: int) -> str:
        """See `calibrate`."""
        data, _ = build_datasets(self.config, self.ctx, train_samples=train_samples, valid_samples=0)
        self._set(self.count)
        before = spread(self._saliences(data))
        for active in self._schedule():
            self._set(active)
            self._even_out(self._saliences(data), active)
        self._set(self.count)
        after = spread(self._saliences(data))
        low, high = min(self.scales), max(self.scales)
        return (
            f"salience of the {self.count} residual branches: largest / smallest {before:.1f} before, {after:.1f} after "
            f"their output matrices were scaled by {low:.2f} to {high:.2f}"
        )

    def _schedule(self) -> Iterator[int]:
        """How many branches take part in each iteration."""
        layers = self.config.model.num_layers
        for turn in range(1, self.options.rounds + 1):
            yield 2 * math.ceil(turn * layers / self.options.rounds)
        yield from [self.count] * self.options.settle

    @torch.no_grad()
    def _set(self, active: int) -> None:
        """Write scale * initial value into the branches' matrices; 0 where a branch takes no part."""
        for branch, (parameter, initial) in self.matrices.items():
            parameter.copy_(initial * (self.scales[branch] if branch < active else 0.0))
        self.engine.optimizer.reload_model_params()

    def _saliences(self, data: torch.utils.data.Dataset) -> list[float]:
        """S_b of every branch, the same on every rank."""
        config, ctx = self.config, self.ctx
        mixture = None
        if config.data.selection is not None:
            mixture = Mixture(config.data.selection, [source.weight for source in config.data.sources])
            mixture.draw(self.batches * config.train.micro_batch_size * ctx.dp)
        batches = micro_batches(data, config, ctx, mixture=mixture)
        self.engine.forward_backward(batches, NextToken(), self.batches)
        sums = torch.zeros(self.count, dtype=torch.float64, device=ctx.platform.device)
        for branch, shard in self.shards:
            sums[branch] += (shard.main.detach().view(-1) * shard.main.grad.view(-1)).abs().sum().double()
        return ctx.sum(sums.tolist())

    def _even_out(self, saliences: list[float], active: int) -> None:
        limit = self.options.max_scale
        found = {b: s for b, s in enumerate(saliences[:active]) if s > 0 and math.isfinite(s)}
        if not found:
            return
        mean = math.exp(math.fsum(math.log(s) for s in found.values()) / len(found))
        for branch, salience in found.items():
            self.scales[branch] *= math.sqrt(mean / salience)
        length = math.sqrt(math.fsum(scale**2 for scale in self.scales[:active]) / active)
        for branch in range(active):
            self.scales[branch] = min(max(self.scales[branch] / length, 1 / limit), limit)


def branches_of(arch: ModelArch) -> dict[str, int]:
    """The residual branches by the names of their output matrices."""
    return {
        parameter.name: 2 * parameter.layer + (parameter.role is Role.FFN_OUT)
        for parameter in parameters(arch)
        if parameter.role.writes_to_residual
    }


def spread(saliences: list[float]) -> float:
    """The largest over the smallest; infinite where a branch does not matter at all."""
    return max(saliences) / min(saliences) if min(saliences) > 0 else math.inf
