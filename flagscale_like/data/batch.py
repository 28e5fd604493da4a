"""Batch: the micro-batch that one rank reads. The data package passes only this type to the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from flagscale_like.runtime.row_cut import RowCut

# In Batch.extras, float [b, s]: 1 at the first label of each conversation, where each has the same weight in the loss.
CONVERSATIONS = "conversations"


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
        lengths: int64 [n] on the host, the tokens of each document without the padding at its end. None: none is padded.
        source: int64 [b] on the host, the index of each row's data source. None: the data has no sources.
        extras: further tensors that one objective needs, by name.
        cut: how the rows lie over context-parallel ranks, where they do; see `part_of`. s then counts this rank's tokens, and
            `documents` keeps the boundaries of the whole rows.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor | None = None
    lengths: Tensor | None = None
    source: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    cut: RowCut | None = None

    def bounds(self) -> Tensor:
        """`documents`; where each row is one document, its boundaries."""
        if self.documents is not None:
            return self.documents
        rows, length = self.tokens.shape
        if self.cut is not None:
            length *= self.cut.size
        return torch.arange(0, rows * length + 1, length, dtype=torch.int32)

    def attended(self) -> Tensor:
        """`bounds()` with the padding at a document's end as a document of its own, so that no token sees it."""
        bounds = self.bounds()
        if self.lengths is None:
            return bounds
        ends = (bounds[:-1] + self.lengths).to(torch.int32)
        return torch.unique(torch.cat((bounds, ends)))

    @classmethod
    def of(cls, values: Mapping[str, Any], device: torch.device, source: Tensor | None = None) -> Batch:
        """Build a batch from named tensors and copy them to `device`; other names are ignored.

        `documents`, `lengths` and `source` stay on the host.
        """
        names = {"tokens", "labels", "loss_mask"}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if name in names}
        extras = {name: value.to(device, non_blocking=True) for name, value in values.get("extras", {}).items()}
        host = {name: values[name] for name in ("documents", "lengths") if name in values}
        return cls(**moved, **host, source=source, extras=extras)

    def part_of(self, cut: RowCut) -> Batch:
        """What one context-parallel rank gets of a batch of whole rows: its part of every row.

        Extras are cut where their first two dimensions are those of the tokens, [b, s, ...]; others stay as they are.
        """
        rows = self.tokens.shape

        def part(x: Tensor) -> Tensor:
            return cut.part(x, 1) if x.shape[:2] == rows else x

        return replace(
            self,
            tokens=part(self.tokens),
            labels=part(self.labels),
            loss_mask=part(self.loss_mask),
            extras={name: part(value) for name, value in self.extras.items()},
            cut=cut,
        )


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of a dataset as one micro-batch.

    Args:
        rows: each with tokens, labels and loss_mask [s], and what else the dataset gives. A pack has `documents`, int32
            [n + 1], the boundaries 0, ..., s of its documents; beside packs, a row without them is one document. `lengths`,
            int64 [n], are theirs without padding. `extras` are tensors by name with an entry for each of something that a
            row holds any number of.

    Returns:
        By name, the rows' values stacked; `documents` counted on over the rows, where any row is a pack; `lengths` and
        `extras` of all rows one after another.
    """
    special = ("documents", "lengths", "extras")
    batch = default_collate([{name: value for name, value in row.items() if name not in special} for row in rows])
    if "extras" in rows[0]:
        batch["extras"] = {name: torch.cat([row["extras"][name] for row in rows]) for name in rows[0]["extras"]}
    if "lengths" in rows[0]:
        batch["lengths"] = torch.cat([row["lengths"] for row in rows])
    if any("documents" in row for row in rows):
        length = len(rows[0]["tokens"])
        whole = torch.tensor([0, length], dtype=torch.int32)
        ends = [row.get("documents", whole)[1:] + number * length for number, row in enumerate(rows)]
        batch["documents"] = torch.cat([whole[:1], *ends])
    return batch
