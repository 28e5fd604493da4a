"""Batch: one micro-batch as a rank reads it, and the only type that data hands to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of a rank, on the rank's device.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the token that each position predicts.
        loss_mask: float [b, s], the weight of each position's loss: 0 leaves it out.
        documents: int32 [n + 1], the bounds 0, ..., s of the documents in a pack. No token sees another document, and
            positions start at 0 in each. A pack has b = 1. None: every row is one document.
        source: int64 [b] on the host, the number of each row's data source. None where the data has no sources.
        extras: what one objective needs beside these, by name.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor | None = None
    source: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any], device: torch.device, source: Tensor | None = None) -> Batch:
        """A batch from named tensors, copied to `device`. `source` stays on the host."""
        names = {f.name for f in fields(cls)} - {"source", "extras"}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if name in names}
        return cls(**moved, source=source)
