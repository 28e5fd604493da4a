"""Reward models on pairs of answers; config.RewardModel has the options and the papers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like.config import RewardModel
from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import Cut, Loss
from flagscale_like.errors import required
from flagscale_like.objectives.pairs import (
    REWARDS,
    answers_of_rows,
    chosen_and_rejected,
    pack_inputs,
    pair_loss,
    pairs_of_rows,
)


class Reward:
    """The Bradley-Terry loss of a pair, -log sigmoid(r(y+) - r(y-) - margin) + center (r(y+) + r(y-))^2.

    r is the value head's output at an answer's last token, after which a document has only padding. With k heads, a pair's
    loss is the mean of the heads' losses, and its reported rewards are the means of the heads' rewards.
    """

    metric = RewardModel.metric
    cut: Cut = "rows"
    packed = True

    def __init__(self, options: RewardModel) -> None:
        self.options = options
        self.sums: tuple[str, ...] = REWARDS + (("rewards/disagreement",) if options.heads > 1 else ())

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model has a value head, which needs no labels."""
        return pack_inputs(batch, labels=False)

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the pairs of each row."""
        return pairs_of_rows(batch)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: fp32 [1, b * s, k], or [1, b * s] of one head."""
        rewards = answer_rewards(output, batch)  # [2 p, k]
        chosen, rejected = chosen_and_rejected(rewards)  # [p, k]
        losses = reward_losses(chosen, rejected, batch.extras["margins"], self.options)
        means = chosen.detach().mean(-1), rejected.detach().mean(-1)
        more = {}
        if self.options.heads > 1:
            more["rewards/disagreement"] = rewards.detach().std(-1, correction=0).sum() / 2  # a mean over both answers
        return pair_loss(losses, means, batch, more)


def answer_rewards(output: Tensor, batch: Batch) -> Tensor:
    """The heads' outputs at the last token of each answer, fp32 [2 p, k].

    Args:
        output: fp32 [1, b * s, k], or [1, b * s] of one head.
    """
    last = (batch.bounds()[:-1] + required(batch.lengths, "lengths") - 1).to(output.device, non_blocking=True)
    return output.float().view(batch.tokens.numel(), -1)[last]


def reward_losses(chosen: Tensor, rejected: Tensor, margins: Tensor, options: RewardModel) -> Tensor:
    """The loss of each pair, [p]: the mean over the heads; see Reward.

    Args:
        chosen, rejected: rewards, [p, k].
        margins: the pairs' own, [p].
    """
    losses = -F.logsigmoid(chosen - rejected - options.margin * margins[:, None])
    if options.center:
        losses = losses + options.center * (chosen + rejected).square()
    return losses.mean(-1)


class AnswerRewards:
    """Each answer's rewards, one for each head, in Outputs.samples."""

    metric = "reward"
    sums: tuple[str, ...] = ()
    cut: Cut = "rows"
    packed = True

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model has a value head, which needs no labels."""
        return pack_inputs(batch, labels=False)

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the answers of each row."""
        return answers_of_rows(batch)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: fp32 [1, b * s, k], or [1, b * s] of one head."""
        found = answer_rewards(output, batch)
        count = torch.tensor(len(found), dtype=torch.float32, device=found.device)
        return Loss(found.sum(), count, samples={self.metric: found.detach()})
