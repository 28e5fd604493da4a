"""Batch: the micro-batch that one rank reads. The data package passes only this type to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The micro-batch of one rank, on that rank's device. b counts sequences, s counts tokens of a sequence.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the token that each position predicts.
        loss_mask: float [b, s], the weight of the loss at each position; 0 excludes the position.
        documents: int32 [n + 1], the boundaries 0, ..., s of the n documents packed into one sequence (b = 1). Attention
            does not cross a boundary, and position ids restart at 0 in each document. None: each row is one document.
        source: int64 [b] on the host, the index of each row's data source. None: the data has no sources.
        extras: further tensors that one objective needs, by name.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor | None = None
    source: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any], device: torch.device, source: Tensor | None = None) -> Batch:
        """Build a batch from named tensors and copy them to `device`. `source` stays on the host; other names are ignored."""
        names = {f.name for f in fields(cls)} - {"source", "extras"}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if name in names}
        return cls(**moved, source=source)
