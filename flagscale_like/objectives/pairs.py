"""What objectives on pairs of answers share: which tokens are whose, and what is reported.

A micro-batch is packs of whole pairs. Of its documents, 2 i is the chosen answer of pair i, and 2 i + 1 the rejected one,
each after its prompt. Padding lies at the end of a row's last document, where no counted token sees it, and `Batch.lengths`
leaves it out. `Batch.extras` has

    weights     float [p], the factor on each pair's loss
    margins     float [p], by how much the chosen answer is better; 0 where the data does not say
    references  float [2 p], each answer's log-probability under the reference; only where the objective reads them
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import Loss
from flagscale_like.model.packs import packing
from flagscale_like.objectives.segments import sums_between

REWARDS = ("rewards/accuracy", "rewards/margin", "rewards/chosen", "rewards/rejected")


def pack_inputs(batch: Batch, *, labels: bool) -> dict[str, Any]:
    """The model's keyword arguments: the documents of all rows as one row, [1, b * s]."""
    inputs = {"input_ids": batch.tokens.view(1, -1), "position_ids": None, "attention_mask": None}
    if labels:
        inputs["labels"] = batch.labels.view(1, -1)
    return inputs | {"packed_seq_params": packing(batch.bounds(), batch.tokens.device, len(batch.tokens))}


def pairs_of_rows(batch: Batch) -> Tensor:
    """fp32 [b]: the pairs of each row."""
    b, s = batch.tokens.shape
    counts = torch.bincount(batch.bounds()[:-1:2].long() // s, minlength=b)  # on the host
    return counts.to(batch.tokens.device, torch.float32, non_blocking=True)


def answers_of_rows(batch: Batch) -> Tensor:
    """fp32 [b]: the answers of each row, which need not be pairs."""
    b, s = batch.tokens.shape
    counts = torch.bincount(batch.bounds()[:-1].long() // s, minlength=b)  # on the host
    return counts.to(batch.tokens.device, torch.float32, non_blocking=True)


def answer_sums(values: Tensor, batch: Batch) -> Tensor:
    """Add up [b * s] numbers over each document: [2 p]. The order of the additions is fixed, on every device."""
    bounds = batch.bounds().to(values.device, non_blocking=True)
    return sums_between(values, bounds.long())


def log_probabilities(output: Tensor, batch: Batch) -> Tensor:
    """Each answer's log-probability, in nats: the sum over its counted tokens, fp32 [2 p].

    Args:
        output: [1, b * s], each token's cross-entropy.
    """
    return -answer_sums(output.float().view(-1) * batch.loss_mask.view(-1), batch)


def chosen_and_rejected(values: Tensor) -> tuple[Tensor, Tensor]:
    """[2 p, ...] -> [p, ...] of the chosen and of the rejected answers."""
    return values[0::2], values[1::2]


def pair_loss(losses: Tensor, rewards: tuple[Tensor, Tensor], batch: Batch, more: Mapping[str, Tensor]) -> Loss:
    """The loss of a micro-batch of pairs; its count is the number of pairs.

    Args:
        losses: [p], without the pairs' weights.
        rewards: of the chosen and of the rejected answers, each [p], detached.
        more: further sums by name, detached.
    """
    chosen, rejected = rewards
    weighted = losses * batch.extras["weights"]
    sums = (chosen > rejected, chosen - rejected, chosen, rejected)
    b, s = batch.tokens.shape
    rows = (batch.bounds()[:-1:2] // s).long().to(losses.device, non_blocking=True)  # [p], the row of each pair
    per_row = torch.zeros(b, device=losses.device).index_add_(0, rows, weighted.detach())
    counts = pairs_of_rows(batch)
    samples = {"loss": per_row, "tokens": counts}
    if batch.source is not None:
        samples["source"] = batch.source
    return Loss(
        weighted.sum(),
        counts.sum(),
        sums={name: value.float().sum() for name, value in zip(REWARDS, sums, strict=True)} | dict(more),
        samples=samples,
    )
