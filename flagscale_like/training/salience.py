"""Salience-consistent initialisation: a calibration before the first step that gives all residual branches equal salience.

The report of Baichuan 3 describes the idea: the importance of parameters to the loss should be consistent across layers and
over the first steps, instead of exploding in a few layers. It publishes no definition. This module uses its own:

A decoder of L layers has 2 L residual branches, x <- x + W_b u_b(x), where W_b is the output matrix of the attention or the
FFN. The salience of a branch is the contribution of its output matrix to the loss, to first order and without sign:

    S_b = sum over the elements w of W_b of |w * dloss/dw|

on some batches of the training data. Each W_b gets a scale a_b, which is found by iterating

    a_b <- a_b * sqrt(mean(S) / S_b)        (geometric mean; the root damps the step, because branches change each other's S)
    a_b <- a_b / sqrt(mean(a^2))            (keeps the total that the branches add to the residual stream)

until the S_b agree. Layers are added progressively: in round r of R, the branches of the first r L / R layers take part, and
the branches of deeper layers are scaled to 0. Each layer is thus fitted into a network that is calibrated already. Some
iterations with all layers follow.

The scales are multiplied into the weights. The forward pass and an exported model are those of an ordinary model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flagscale_like.arch import ModelArch, Role, parameters
from flagscale_like.config import RunConfig
from flagscale_like.data.blend import is_packed
from flagscale_like.data.order import Samples
from flagscale_like.data.pretrain import build_datasets, micro_batch_count, micro_batches
from flagscale_like.data.selection import Mixture
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.shards import OwnedShard
from flagscale_like.errors import required
from flagscale_like.model.build import named_shards
from flagscale_like.objectives.choice import objective_of


def calibrate(config: RunConfig, engine: Engine, train_samples: int) -> str:
    """Scale the output matrices of the residual branches in place. All ranks call it before the first step.

    Args:
        config: the run's configuration; init.salience has the options.
        engine: the model and the optimizer.
        train_samples: see `data.pretrain.build_datasets`. The calibration reads the first samples; training reads them again.

    Returns:
        A line for the log: the ratio of the largest to the smallest salience, before and after.
    """
    return SalienceCalibration(config, engine).run(train_samples)


class SalienceCalibration:
    """The state of the calibration. Branch 2 i is the attention of layer i, branch 2 i + 1 its FFN.

    Attributes:
        scales: a_b of each branch, the same on every rank.
    """

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self.config, self.engine, self.ctx = config, engine, engine.ctx
        self.options = required(config.init.salience, "init.salience")
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
            self._update_scales(self._saliences(data), active)
        self._set(self.count)
        after = spread(self._saliences(data))
        low, high = min(self.scales), max(self.scales)
        return (
            f"salience of the {self.count} residual branches: largest / smallest {before:.1f} before, {after:.1f} after "
            f"their output matrices were scaled by {low:.2f} to {high:.2f}"
        )

    def _schedule(self) -> Iterator[int]:
        """Yield the number of branches that take part in each iteration."""
        layers = self.config.model.num_layers
        for turn in range(1, self.options.rounds + 1):
            yield 2 * math.ceil(turn * layers / self.options.rounds)
        yield from [self.count] * self.options.settle

    @torch.no_grad()
    def _set(self, active: int) -> None:
        """Set each branch's output matrix to scale * initial value, and to 0 from branch `active` on."""
        for branch, (parameter, initial) in self.matrices.items():
            parameter.copy_(initial * (self.scales[branch] if branch < active else 0.0))
        self.engine.required_optimizer.reload_model_params()

    def _saliences(self, data: Samples) -> list[float]:
        """Compute S_b of each branch, reduced over all ranks."""
        config, ctx = self.config, self.ctx
        mixture = None
        if config.data.selection is not None:
            mixture = Mixture(config.data.selection, [source.weight for source in config.data.sources])
            mixture.draw(self.batches * config.train.micro_batch_size * ctx.dp)
        batches = micro_batches(data, config, ctx, mixture=mixture)
        objective = objective_of(config, packed=is_packed(data))
        self.engine.forward_backward(batches, objective, self.batches)
        sums = torch.zeros(self.count, dtype=torch.float64, device=ctx.platform.device)
        for branch, shard in self.shards:
            grad = required(shard.main.grad, "grad")
            sums[branch] += (shard.main.detach().view(-1) * grad.view(-1)).abs().sum().double()
        return ctx.sum(sums.tolist())

    def _update_scales(self, saliences: list[float], active: int) -> None:
        """Update the scales of the first `active` branches: one iteration of the module's formula, limited to max_scale."""
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
    """Map the name of each residual branch's output matrix to the number of the branch."""
    return {
        parameter.name: 2 * parameter.layer + (parameter.role is Role.FFN_OUT)
        for parameter in parameters(arch)
        if parameter.role.writes_to_residual and parameter.layer is not None
    }


def spread(saliences: list[float]) -> float:
    """The largest salience divided by the smallest; infinite if the smallest is 0."""
    return max(saliences) / min(saliences) if min(saliences) > 0 else math.inf
