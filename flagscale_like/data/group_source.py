"""Packs of groups: the dataset of rows that hold a query and some of its passages, of whole groups; see data.groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from flagscale_like.data.groups import GroupTable
from flagscale_like.data.order import Row
from flagscale_like.data.packing import PackedSource, pack_epochs


class GroupSource(PackedSource):
    """The rows of one source of groups in one split. A row is a pack of whole groups; see objectives.embedding.

    Attributes:
        table: all groups of the source.
        indices: the numbers of the split's groups.
        members: int32, numbers of the groups in the order of the rows, over whole epochs, each with every group once.
        starts: int64 [rows + 1], where each row begins in `members`.
        taken: int32, tokens of each member.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str,
        indices: np.ndarray,
        num_samples: int,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.table, self._pad = GroupTable(dataset_path), config.tokenizer.pad
        mark = f"{config.source_marks[dataset_path]}-{config.passages}"
        key = f"{self.unique_description_hash}-{mark}-{index_split.name}"
        self.members, self.starts, self.taken = config.index_cache.fetch(key, ("group", "row", "tokens"), self._pack)

    @staticmethod
    def units(prefix: str, dataset: IndexedDataset) -> int:
        """How many parts a split can take of the source: groups."""
        return len(GroupTable(prefix))

    def _choice(self, groups: np.ndarray, epoch: int) -> dict:
        return {"groups": groups, "passages": self.config.passages, "seed": self.config.random_seed, "epoch": epoch}

    def _pack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        taken: list[np.ndarray] = []

        def places(epoch: int) -> np.ndarray:
            taken.append(self.table.tokens_of(**self._choice(self.indices, epoch)).astype(np.int32))
            return taken[-1]

        config, count = self.config, len(self.indices)
        members, starts = pack_epochs(places, config.sequence_length, rows=self.num_samples, seed=config.random_seed)
        epochs = np.arange(len(members)) // count
        return self.indices[members], starts, np.stack(taken)[epochs, members]

    def documents_of(self, row: int) -> np.ndarray:
        """The documents of a row, int64 [groups of the row, 1 + passages]."""
        epoch = int(self.starts[row]) // len(self.indices)
        return self.table.choose(**self._choice(np.array(self.members_of(row)), epoch))

    def __getitem__(self, index: int) -> Row:
        documents = self.documents_of(index)
        row = pack_texts([self.dataset.get(n) for n in documents.flat], self.config.sequence_length, pad=self._pad)
        row["extras"]["teacher"] = torch.from_numpy(self.table.scores[documents[:, 1:].reshape(-1)])
        return row

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """What the row at `index` consists of: (document, first token, end) in the order of its tokens."""
        return [(int(n), 0, int(self.table.lengths[n])) for n in self.documents_of(index).flat]

    @property
    def epoch_tokens(self) -> int:
        """Tokens that the first epoch takes of the source in this split."""
        return int(self.taken[: len(self.indices)].sum(dtype=np.int64))

    def tokens_of(self, rows: int) -> int:
        """Tokens of the first `rows` rows; they start again after the last."""
        turns, rest = divmod(rows, len(self))
        return sum(int(part.sum(dtype=np.int64)) for part in [self.taken] * turns + [self.taken[: self.starts[rest]]])


def pack_texts(texts: Sequence[np.ndarray], length: int, *, pad: int) -> Row:
    """Put texts into one row.

    Args:
        texts: token ids [n] of each.
        length: places of the row.
        pad: the id at places that no text takes. They belong to the last document.

    Returns:
        tokens and labels int64 [length], the same; loss_mask float32 [length], 0; documents int32 [d + 1]; lengths int64 [d];
        extras: texts int64 [d], a hash of each text's ids.
    """
    tokens, ends = np.full(length, pad, dtype=np.int64), np.cumsum([len(ids) for ids in texts], dtype=np.int64)
    for ids, stop in zip(texts, ends.tolist(), strict=True):
        tokens[stop - len(ids) : stop] = ids
    hashes = np.array([xxhash.xxh3_64_intdigest(ids.astype("<i4").tobytes()) for ids in texts], dtype=np.uint64)
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(tokens.copy()),
        "loss_mask": torch.zeros(length),
        "documents": torch.from_numpy(np.concatenate(([0], ends[:-1], [length])).astype(np.int32)),
        "lengths": torch.tensor([len(ids) for ids in texts]),
        "extras": {"texts": torch.from_numpy(hashes.view(np.int64))},
    }
