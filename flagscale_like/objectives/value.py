"""The critic's objective in reinforcement learning.

A micro-batch is packs of rollouts; see objectives.policy. `Batch.extras`, float [b, s], has `values`, each token's value as
the rollout was scored; `returns`, what it is to become; and `drawn`, 1 at each drawn token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import Cut, Loss
from flagscale_like.objectives.pairs import pack_inputs
from flagscale_like.objectives.policy import row_samples


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the squared distance of each value from its return, with clipping (Schulman et al. 2017's published code).

        loss = 1/2 max((v - R)^2, (old + clip(v - old, -clip, clip) - R)^2)

    Returns:
        The losses, and 1 where the bound decided.
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain)
    moved = values - old
    bounded = (old + moved.clamp(-clip, clip) - returns).square()
    decided = (bounded > plain) & (moved.abs() > clip)  # within the bound they differ by rounding alone
    return 0.5 * torch.maximum(plain, bounded), decided.to(plain.dtype)


class ValueLoss:
    """The mean over the drawn tokens of value_losses()."""

    metric = "value loss"
    sums: tuple[str, ...] = ("value/clip-share",)
    cut: Cut = "tokens"
    packed = True

    def __init__(self, clip: float | None) -> None:
        self.clip = clip

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model has a value head, which needs no labels."""
        return pack_inputs(batch, labels=False)

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the drawn tokens of each row."""
        return batch.extras["drawn"].sum(-1)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: fp32 [1, b * s], each token's value."""
        extras, drawn = batch.extras, batch.extras["drawn"]
        values = output.float().view_as(drawn)
        losses, decided = value_losses(values, extras["values"], extras["returns"], self.clip)
        masked, counts = losses * drawn, self.row_counts(batch)
        sums = {"value/clip-share": (decided * drawn).sum()}
        return Loss(masked.sum(), counts.sum(), sums=sums, samples=row_samples(masked, counts))
