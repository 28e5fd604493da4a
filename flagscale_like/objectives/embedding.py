"""Vectors of texts: what an embedding model computes, and what its objectives start from.

A micro-batch is packs of texts: each document of a row is a text. Padding lies at the end of a row's last document, and
`Batch.lengths` says how many tokens of each document are its own.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import Cut
from flagscale_like.model.packs import packing
from flagscale_like.objectives.segments import sums_between

Pooling = Literal["last", "mean", "first"]


class TextVectors:
    """Each text's vector.

    Args:
        pooling: see `pool`.
    """

    metric = "vector"
    sums: tuple[str, ...] = ()
    cut: Cut = "rows"
    packed = True

    def __init__(self, pooling: Pooling) -> None:
        self.pooling, self.documents_in_one = pooling, 1

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The texts of all rows as one row, [1, b * s]. No text sees the padding, whichever way attention looks."""
        inputs = {"input_ids": batch.tokens.view(1, -1), "position_ids": None, "attention_mask": None}
        return inputs | {"packed_seq_params": packing(batch.attended(), batch.tokens.device, len(batch.tokens))}

    def row_counts(self, batch: Batch) -> Tensor:
        """Texts of each row; of a subclass, what `documents_in_one` texts make."""
        rows, length = batch.tokens.shape
        counts = torch.bincount(
            batch.bounds()[: -1 : self.documents_in_one].long() // length, minlength=rows
        )  # on the host
        return counts.to(batch.tokens.device, torch.float32, non_blocking=True)

    def vectors(self, output: Tensor, batch: Batch) -> Tensor:
        """Args: output: hidden states, [1, b * s, h]. Returns: fp32 [d, h], of each text, of length 1."""
        return pool(output, batch, self.pooling)


def pool(hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    """Each text's vector: its pooled hidden states, scaled to length 1; fp32 [d, h].

    Args:
        hidden: [1, b * s, h].
        pooling: the hidden states of each text's `last` or `first` token, or the `mean` over its tokens.
    """
    rows, device = hidden.reshape(-1, hidden.shape[-1]), hidden.device
    bounds = batch.bounds().long()
    lengths = bounds.diff() if batch.lengths is None else batch.lengths
    if pooling == "mean":
        # Sums between the bounds of texts and paddings in turn; the paddings' sums are dropped.
        parts = torch.stack((bounds[:-1], bounds[:-1] + lengths), dim=1).flatten()
        parts = torch.cat((parts, bounds[-1:])).to(device, non_blocking=True)
        sums = sums_between(rows.float(), parts)[0::2]
        pooled = sums / lengths.to(device, non_blocking=True)[:, None]
    else:
        places = bounds[:-1] + (lengths - 1 if pooling == "last" else 0)
        pooled = rows[places.to(device, non_blocking=True)].float()
    return F.normalize(pooled, dim=-1)
