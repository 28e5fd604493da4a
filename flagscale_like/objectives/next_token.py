"""Next-token prediction: the objective of pretraining, and of fine-tuning with other data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import Loss
from flagscale_like.model.packs import packing


class NextToken:
    """The mean cross-entropy, in nats, of the tokens that the loss mask counts.

    Args:
        packed: the batches are packs of documents. Every pipeline stage then reads their bounds.
    """

    metric = "lm loss"
    sums: tuple[str, ...] = ()

    def __init__(self, *, packed: bool = False) -> None:
        self.packed = packed

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model computes each token's cross-entropy itself, because its head may fuse it with the output layer."""
        inputs = {"input_ids": batch.tokens, "position_ids": None, "attention_mask": None, "labels": batch.labels}
        if self.packed:  # one row, [1, b * s]
            inputs |= {"input_ids": batch.tokens.view(1, -1), "labels": batch.labels.view(1, -1)}
            inputs["packed_seq_params"] = packing(batch.documents, batch.tokens.device)
        return inputs

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Args: output: fp32 [b, s], or [1, b * s] of packs: each token's cross-entropy."""
        masked = output.float().view_as(batch.loss_mask) * batch.loss_mask  # [b, s]
        samples = {"loss": masked.detach().sum(-1), "tokens": batch.loss_mask.sum(-1)}  # [b]
        if batch.source is not None:
            samples["source"] = batch.source
        return Loss(masked.sum(), batch.loss_mask.sum(), samples=samples)
