"""Next-token prediction: the objective of pretraining, and of fine-tuning with other data."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from flagscale_like.config import NextTokenLoss
from flagscale_like.data.batch import CONVERSATIONS, Batch
from flagscale_like.engine.objective import Cut, Loss
from flagscale_like.model.packs import packing


class NextToken:
    """The mean cross-entropy, in nats, of the tokens whose weight in the loss mask is not 0. A weight scales a token's loss.

    Args:
        packed: the batches are packs of documents. Every pipeline stage then reads their bounds.
        per: what has the same weight in the mean: a `token`, or a `conversation`. Its weights in the loss mask then add up to
            1, and the batch's extras say where each begins.
    """

    metric = NextTokenLoss.metric
    sums: tuple[str, ...] = ()
    cut: Cut = "tokens"

    def __init__(self, *, packed: bool = False, per: Literal["token", "conversation"] = "token") -> None:
        self.packed, self.per = packed, per

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model computes each token's cross-entropy itself, because its head may fuse it with the output layer."""
        inputs = {"input_ids": batch.tokens, "position_ids": None, "attention_mask": None, "labels": batch.labels}
        if self.packed:  # one row, [1, b * s]
            inputs |= {"input_ids": batch.tokens.view(1, -1), "labels": batch.labels.view(1, -1)}
            inputs["packed_seq_params"] = packing(batch.bounds(), batch.tokens.device, len(batch.tokens))
        return inputs

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: the tokens, or conversations, of each row that count."""
        each = batch.extras[CONVERSATIONS] if self.per == "conversation" else (batch.loss_mask != 0).float()
        return each.sum(-1)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: fp32 [b, s], or [1, b * s] of packs: each token's cross-entropy."""
        masked = output.float().view_as(batch.loss_mask) * batch.loss_mask  # [b, s]
        counts = self.row_counts(batch)
        samples = {"loss": masked.detach().sum(-1), "tokens": counts}  # [b]
        if batch.source is not None:
            samples["source"] = batch.source
        return Loss(masked.sum(), counts.sum(), samples=samples)
