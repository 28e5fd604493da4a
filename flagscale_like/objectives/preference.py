"""Direct preference optimisation and its relatives; config.DirectPreference has the options and the papers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like.config import DirectPreference
from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import Cut, Loss
from flagscale_like.objectives.pairs import (
    REWARDS,
    answer_sums,
    answers_of_rows,
    chosen_and_rejected,
    log_probabilities,
    pack_inputs,
    pair_loss,
    pairs_of_rows,
)


class Preference:
    """DPO (Rafailov et al. 2023): the log-probabilities of a pair's answers, against those of the reference, decide its loss.

    With pi the model, ref the reference, x the prompt, y+ the chosen and y- the rejected answer,

        r(y) = log pi(y | x) - log ref(y | x)        divided by the counted tokens of y with `by_length`
        h    = beta (r(y+) - r(y-)) - margin - pair_margin * (the pair's margin)

    and the loss is -(1 - e) log sigmoid(h) - e log sigmoid(-h) with label smoothing e; max(0, 1 - h); or
    (r(y+) - r(y-) - 1 / (2 beta))^2. Reported rewards are beta r(y).
    """

    metric = DirectPreference.metric
    sums: tuple[str, ...] = (*REWARDS, "log-probability/chosen", "log-probability/rejected")
    cut: Cut = "rows"
    packed = True

    def __init__(self, options: DirectPreference) -> None:
        self.options = options

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model computes each token's cross-entropy."""
        return pack_inputs(batch, labels=True)

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the pairs of each row."""
        return pairs_of_rows(batch)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: [1, b * s], each token's cross-entropy."""
        options = self.options
        own = log_probabilities(output, batch)  # [2 p]
        counted = answer_sums(batch.loss_mask.view(-1), batch).clamp(min=1.0)  # [2 p]
        ratios = own - batch.extras["references"] if options.reference != "none" else own
        if options.by_length:
            ratios = ratios / counted
        chosen, rejected = chosen_and_rejected(ratios)
        losses = preference_losses(chosen - rejected, batch.extras["margins"], options)
        if options.sft:
            losses = losses - options.sft * chosen_and_rejected(own / counted)[0]
        rewards = options.beta * chosen.detach(), options.beta * rejected.detach()
        totals = [side.detach().sum() for side in chosen_and_rejected(own)]
        return pair_loss(losses, rewards, batch, dict(zip(self.sums[-2:], totals, strict=True)))


def preference_losses(difference: Tensor, margins: Tensor, options: DirectPreference) -> Tensor:
    """The loss of each pair, [p]; see Preference.

    Args:
        difference: r(y+) - r(y-), [p].
        margins: the pairs' own, [p].
    """
    beta, smoothing = options.beta, options.label_smoothing
    if options.loss == "ipo":
        return (difference - 1 / (2 * beta)).square()
    h = beta * difference - options.margin - options.pair_margin * margins
    if options.loss == "hinge":
        return torch.relu(1 - h)
    losses = -F.logsigmoid(h)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * F.logsigmoid(-h)
    return losses


class AnswerLogProbabilities:
    """Each answer's log-probability, in Outputs.samples: what the reference of DPO is asked for."""

    metric = "log-probability"
    sums: tuple[str, ...] = ()
    cut: Cut = "rows"
    packed = True

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model computes each token's cross-entropy."""
        return pack_inputs(batch, labels=True)

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the answers of each row."""
        return answers_of_rows(batch)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: [1, b * s], each token's cross-entropy."""
        found = log_probabilities(output, batch)
        count = torch.tensor(len(found), dtype=torch.float32, device=found.device)
        return Loss(found.sum(), count, samples={self.metric: found.detach()})
