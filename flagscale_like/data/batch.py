"""Batch: the micro-batch that one rank reads. The data package passes only this type to the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The micro-batch of one rank, on that rank's device. b counts sequences, s counts tokens of a sequence.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the token that each position predicts.
        loss_mask: float [b, s], the weight of the loss at each position; 0 excludes the position.
        documents: int32 [n + 1] on the host, the boundaries 0, ..., b * s of the n documents that fill the rows one after
            another. A row begins with a document. Attention does not cross a boundary, and positions restart at 0 in each
            document. None: each row is one document.
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
        """Build a batch from named tensors and copy them to `device`; other names are ignored.

        `documents` and `source` stay on the host.
        """
        names = {f.name for f in fields(cls)} - {"documents", "source", "extras"}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if name in names}
        return cls(**moved, documents=values.get("documents"), source=source)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of a dataset as one micro-batch.

    Args:
        rows: each with tokens, labels and loss_mask [s], and what else the dataset gives. A pack has `documents`, int32
            [n + 1], the boundaries 0, ..., s of its documents; beside packs, a row without them is one document.

    Returns:
        By name, the rows' values stacked; `documents` counted on over the rows, where any row is a pack.
    """
    batch = default_collate([{name: value for name, value in row.items() if name != "documents"} for row in rows])
    if any("documents" in row for row in rows):
        length = len(rows[0]["tokens"])
        whole = torch.tensor([0, length], dtype=torch.int32)
        ends = [row.get("documents", whole)[1:] + number * length for number, row in enumerate(rows)]
        batch["documents"] = torch.cat([whole[:1], *ends])
    return batch
