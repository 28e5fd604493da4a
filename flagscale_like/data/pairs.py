"""Packs of pairs: the dataset of rows that hold the chosen and the rejected answers of whole pairs; see objectives.pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from flagscale_like.data.conversations import mask_of, pair_values
from flagscale_like.data.order import Row
from flagscale_like.data.packing import ConversationSource


class PairRows:
    """The pairs of a prefix, and rows of any of them.

    Document 2 i of the prefix is the chosen answer of pair i, and 2 i + 1 the rejected one.

    Args:
        dataset: the tokens of `prefix`.
        length: places of a row.
        pad: the id at places that no answer takes.

    Attributes:
        sizes: int64 [pairs], tokens of each.
        values: float32 [pairs, 2], margin and weight of each.
    """

    def __init__(self, prefix: str, dataset: IndexedDataset, *, length: int, pad: int) -> None:
        self.dataset, self.weights, self.length, self.pad = dataset, IndexedDataset(mask_of(prefix)), length, pad
        self.sizes = dataset.sequence_lengths.reshape(-1, 2).sum(1, dtype=np.int64)
        self.values = pair_values(prefix)

    def row(self, pairs: Sequence[int]) -> Row:
        """The row of these pairs, of which one row has room; see pack_pairs."""
        documents = [2 * pair + side for pair in pairs for side in (0, 1)]
        answers = [(self.dataset.get(number), self.weights.get(number)) for number in documents]
        return pack_pairs(answers, self.values[pairs], self.length, pad=self.pad)


class PairSource(ConversationSource):
    """The rows of one source of pairs in one split; see data.conversations. A row is a pack of whole pairs.

    Attributes:
        rows: of all pairs of the source.
        indices: the numbers of the split's pairs.
        members: int32, numbers of the pairs in the order of the rows, over whole epochs.
        references: float32 [2 pairs of the source], each answer's log-probability under the reference; None where the
            objective does not read them.
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
        self.rows = PairRows(dataset_path, dataset, length=config.sequence_length, pad=config.tokenizer.pad)
        self.references: np.ndarray | None = None
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)

    @staticmethod
    def units(prefix: str, dataset: IndexedDataset) -> int:
        """How many parts a split can take of the source: pairs, of two documents each."""
        return len(dataset) // 2

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each pair of the source, [n]: a pair takes a place for each."""
        return self.rows.sizes

    places = sizes

    def __getitem__(self, index: int) -> Row:
        pairs = self.members_of(index)
        row = self.rows.row(pairs)
        if self.references is not None:
            row["extras"]["references"] = torch.from_numpy(self.references.reshape(-1, 2)[pairs].reshape(-1))
        return row

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """What the row at `index` consists of: (document, first token, end) in the order of its tokens."""
        lengths = self.dataset.sequence_lengths
        return [(n, 0, int(lengths[n])) for pair in self.members_of(index) for n in (2 * pair, 2 * pair + 1)]


def pack_answers(answers: Sequence[tuple[np.ndarray, np.ndarray]], length: int, *, pad: int) -> Row:
    """Put answers into one row, each after its prompt.

    Args:
        answers: token ids [n] and their weights [n], of each.
        length: places of the row.
        pad: the id at places that no answer takes. They belong to the last document.

    Returns:
        tokens and labels int64 [length]; loss_mask float32 [length], 1 where the label counts; documents int32 [d + 1];
        lengths int64 [d].
    """
    tokens = np.full(length, pad, dtype=np.int64)
    labels, mask, ends = tokens.copy(), np.zeros(length, dtype=np.float32), np.cumsum([len(ids) for ids, _ in answers])
    for (ids, weights), stop in zip(answers, ends.tolist(), strict=True):
        start = stop - len(ids)
        tokens[start:stop] = ids
        labels[start : stop - 1], mask[start : stop - 1] = ids[1:], weights[1:] != 0
    bounds = np.concatenate(([0], ends[:-1], [length])).astype(np.int32)
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(mask),
        "documents": torch.from_numpy(bounds),
        "lengths": torch.tensor([len(ids) for ids, _ in answers]),
    }


def pack_pairs(answers: Sequence[tuple[np.ndarray, np.ndarray]], values: np.ndarray, length: int, *, pad: int) -> Row:
    """Put the answers of whole pairs into one row.

    Args:
        answers: of each pair the chosen one and the rejected one; see pack_answers().
        values: margin and weight of each pair, float32 [p, 2].
        length, pad: see pack_answers().

    Returns:
        What pack_answers() returns, and extras as objectives.pairs describes them.
    """
    extras = {"margins": torch.from_numpy(values[:, 0].copy()), "weights": torch.from_numpy(values[:, 1].copy())}
    return pack_answers(answers, length, pad=pad) | {"extras": extras}
