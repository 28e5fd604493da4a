"""The policy's objective in reinforcement learning, and what a model is asked for of each token of a rollout.

A micro-batch is packs of rollouts, each after its prompt; rl.packs makes it. `Batch.loss_mask` has each drawn token's weight
in the loss, at the position that predicts it, and `Batch.extras`, all float [b, s] and 0 elsewhere,

    advantages  of each drawn token
    engine      its log-probability as the engine drew it
    old         its log-probability under the weights that the ratio is measured from; without it, the weights are the ones
                that learn, and the ratio is 1
    reference   its log-probability under the reference; only where the divergence is part of the loss
    counts      what the gradients are divided by, added up: 1 at each drawn token, or at the first of each rollout
    drawn       1 at each drawn token
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flagscale_like.config import Clip
from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import Cut, Loss
from flagscale_like.objectives.pairs import pack_inputs

SUMS = ("policy/clip-share", "policy/kl-old", "policy/entropy", "policy/engine-difference", "policy/importance")
DRAWN, KL_REFERENCE = "policy/drawn", "policy/kl-reference"


def policy_losses(new: Tensor, old: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token (Schulman et al. 2017, equation 7), with DAPO's two bounds and the dual clip.

    With r = exp(new - old) and A the advantage,

        loss = -min(r A, clip(r, 1 - low, 1 + high) A)
        loss = min(loss, -dual A) where A < 0       (Ye et al. 2020, equation 6)

    Args:
        new, old: log-probabilities, of one shape; `new` is differentiable.

    Returns:
        The losses, and 1 where a bound decided, so that the token has no gradient.
    """
    ratio = (new - old).exp()
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    losses, decided = torch.maximum(plain, bounded), bounded > plain
    if clip.dual is not None:
        most = -clip.dual * advantages
        over = (advantages < 0) & (losses > most)
        losses, decided = torch.where(over, most, losses), decided | over
    return losses, decided.to(losses.dtype)


def divergence(new: Tensor, other: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Each token's estimate of KL(new || other), in nats, from a token that `new` drew (Schulman 2020).

    With d = new - other: k1 is d, k3 is exp(-d) - 1 + d.

    Args:
        new, other: log-probabilities.
    """
    d = new - other
    return d if estimator == "k1" else torch.exp(-d) - 1 + d


def truncated_weights(trainer: Tensor, engine: Tensor, cap: float) -> Tensor:
    """Truncated importance weights of what an engine drew, for a trainer: min(exp(trainer - engine), cap) (Yao et al. 2025).

    Args:
        trainer, engine: log-probabilities of the drawn tokens.
    """
    return (trainer - engine).exp().clamp(max=cap)


@dataclass(frozen=True)
class PolicyOptions:
    """What the policy's loss depends on.

    Attributes:
        clip: see policy_losses().
        cap: of the importance weights; None weighs no token.
        coefficient: factor on the divergence from the reference in the loss; None: it is no part of the loss.
        estimator: of that divergence.
    """

    clip: Clip
    cap: float | None = None
    coefficient: float | None = None
    estimator: Literal["k1", "k3"] = "k3"


class PolicyLoss:
    """The loss of the policy: of each drawn token

        w * policy_losses(new, old, A) + coefficient * divergence(new, reference)

    times its weight in the loss mask, with w the truncated importance weight of old against engine.

    Reported are sums over drawn tokens, to be divided by `policy/drawn`: the share that a bound decided; the divergence from
    the old weights, as k3; the entropy, as minus the log-probability of what was drawn; the size of the difference between
    the engine's and the model's log-probabilities; and the importance weights.
    """

    metric = "policy loss"
    cut: Cut = "tokens"
    packed = True

    def __init__(self, options: PolicyOptions) -> None:
        self.options = options
        self.sums: tuple[str, ...] = (*SUMS, DRAWN, *((KL_REFERENCE,) if options.coefficient is not None else ()))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model computes each token's cross-entropy: minus its log-probability."""
        return pack_inputs(batch, labels=True)

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the drawn tokens, or rollouts, of each row."""
        return batch.extras["counts"].sum(-1)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: fp32 [1, b * s], each token's cross-entropy."""
        options, extras, drawn = self.options, batch.extras, batch.extras["drawn"]
        new = -output.float().view_as(drawn) * drawn  # 0 where nothing was drawn, so that no sum meets an inf
        old = extras.get("old", new.detach())
        losses, decided = policy_losses(new, old, extras["advantages"], options.clip)
        weights = torch.ones_like(old) if options.cap is None else truncated_weights(old, extras["engine"], options.cap)
        losses = losses * weights
        seen = new.detach()
        numbers = (decided, divergence(old, seen, "k3"), -seen, (seen - extras["engine"]).abs(), weights)
        sums = {name: (value * drawn).sum() for name, value in zip(SUMS, numbers, strict=True)} | {DRAWN: drawn.sum()}
        if options.coefficient is not None:
            apart = divergence(new, extras["reference"], options.estimator)
            losses = losses + options.coefficient * apart
            sums[KL_REFERENCE] = (apart.detach() * drawn).sum()
        masked, counts = losses * batch.loss_mask, self.row_counts(batch)
        return Loss(masked.sum(), counts.sum(), sums=sums, samples=row_samples(masked, counts))


def row_samples(masked: Tensor, counts: Tensor) -> Mapping[str, Tensor]:
    """Loss and counts of each row, [b].

    Args:
        masked: weighted losses, [b, s].
    """
    return {"loss": masked.detach().sum(-1), "tokens": counts}


class TokenLogProbabilities:
    """Each token's log-probability, [b, s] of each micro-batch in Outputs.samples."""

    metric = "log-probability"
    sums: tuple[str, ...] = ()
    cut: Cut = "rows"
    packed = True

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model computes each token's cross-entropy."""
        return pack_inputs(batch, labels=True)

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the drawn tokens of each row."""
        return batch.loss_mask.sum(-1)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: fp32 [1, b * s], each token's cross-entropy."""
        return _of_tokens(self.metric, -output, batch)


class TokenValues:
    """Each token's value, [b, s] of each micro-batch in Outputs.samples."""

    metric = "value"
    sums: tuple[str, ...] = ()
    cut: Cut = "rows"
    packed = True

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model has a value head, which needs no labels."""
        return pack_inputs(batch, labels=False)

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the drawn tokens of each row."""
        return batch.loss_mask.sum(-1)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: fp32 [1, b * s], each token's value."""
        return _of_tokens(self.metric, output, batch)


def _of_tokens(name: str, output: Tensor, batch: Batch) -> Loss:
    found = output.detach().float().view(batch.tokens.shape)
    return Loss(found.sum(), batch.loss_mask.sum(), samples={name: found})
