"""Rows of random tokens in the shape of what an objective reads: for benchmarks, rehearsals, and tests that need no text.

A row is full. A pack is made by the functions that pack a real source's items, and holds several documents: the first takes
half of the row, or each takes as much as the others where they are compared with each other. ROWS has a class for each kind
of rows; an objective that reads a kind that is not listed adds a class here, and is then benchmarked and rehearsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flagscale_like.config import RunConfig
from flagscale_like.data.conversations import conversations_at
from flagscale_like.data.group_source import pack_texts
from flagscale_like.data.order import OneSource, Row, Samples
from flagscale_like.data.packing import pack_row
from flagscale_like.data.pairs import pack_pairs

CONVERSATIONS_OF_ROW, PAIRS_OF_ROW = 4, 2
TEXT = 128  # most tokens of a text of a group
PAIR_ROWS = 8  # rows of a source of pairs, which repeat


class SyntheticDataset(OneSource, Samples):
    """Rows of text. Tokens depend on (seed, index) only.

    Attributes:
        packed: rows are packs of documents; see data.blend.is_packed.
    """

    packed = False

    def __init__(self, config: RunConfig, total: int, seed: int) -> None:
        self.config, self.vocab_size, self.seq_length = config, config.model.vocab_size, config.train.seq_length
        self.total, self.seed = total, seed

    def __len__(self) -> int:
        return self.total

    def tokens(self, index: int, count: int) -> Tensor:
        """Random ids, int64 [count]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return torch.randint(0, self.vocab_size, (count,), generator=generator)

    def __getitem__(self, index: int) -> Row:
        tokens = self.tokens(index, self.seq_length + 1)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(self.seq_length)}

    def documents(self, index: int, lengths: Sequence[int]) -> list[np.ndarray]:
        """Token ids of documents of these lengths."""
        tokens = self.tokens(index, sum(lengths)).numpy()
        return np.split(tokens, np.cumsum(lengths)[:-1])


class SyntheticConversations(SyntheticDataset):
    """Packs of conversations; the second half of each counts."""

    packed = True

    def __getitem__(self, index: int) -> Row:
        places = shares(self.seq_length, min(CONVERSATIONS_OF_ROW, self.seq_length))
        found = self.documents(index, [count + 1 for count in places])  # the last token is only a label
        per = getattr(self.config.objective, "per", "token") == "conversation"
        return pack_row([(ids, counted(ids)) for ids in found], self.seq_length, pad=0, per_conversation=per)


class SyntheticPairs(SyntheticDataset):
    """Packs of pairs. A source of few pairs, of which the reference is asked for; its rows repeat.

    Attributes:
        rows: of all pairs: the dataset itself; see training.answers.Items.
        references: see data.pairs.PairSource.
    """

    packed = True

    def __init__(self, config: RunConfig, total: int, seed: int) -> None:
        super().__init__(config, total, seed)
        pairs = max(1, min(PAIRS_OF_ROW, self.seq_length // 8))
        answers = shares(self.seq_length, 2 * pairs)
        self._answers = list(zip(answers[0::2], answers[1::2], strict=True))  # of the pairs of each row
        self.references: np.ndarray | None = None

    @property
    def rows(self) -> SyntheticPairs:
        return self

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each pair, int64 [pairs]."""
        return np.array([sum(pair) for pair in self._answers] * PAIR_ROWS)

    def row(self, pairs: Sequence[int]) -> Row:
        """The row of these pairs."""
        answers = [
            (ids, counted(ids))
            for pair in pairs
            for ids in self.documents(pair, self._answers[pair % len(self._answers)])
        ]
        values = np.tile(np.array([[0.0, 1.0]], dtype=np.float32), (len(pairs), 1))
        return pack_pairs(answers, values, self.seq_length, pad=0)

    def __getitem__(self, index: int) -> Row:
        count = len(self._answers)
        pairs = [count * (index % PAIR_ROWS) + number for number in range(count)]
        row = self.row(pairs)
        if self.references is not None:
            row["extras"]["references"] = torch.from_numpy(self.references.reshape(-1, 2)[pairs].reshape(-1))
        return row


class SyntheticGroups(SyntheticDataset):
    """Packs of groups: as many as fit of texts of TEXT tokens, or one group of shorter texts. A teacher scores all alike."""

    packed = True

    def __getitem__(self, index: int) -> Row:
        passages = self.config.required_contrast.passages
        groups = max(1, self.seq_length // (TEXT * (1 + passages)))
        lengths = shares(self.seq_length, groups * (1 + passages), even=True)
        row = pack_texts(self.documents(index, lengths), self.seq_length, pad=0)
        row["extras"]["teacher"] = torch.zeros(groups * passages)
        return row


def shares(length: int, count: int, *, even: bool = False) -> list[int]:
    """Lengths of `count` documents that add up to `length`.

    Args:
        even: they are equal, but for the last, which has what is left; otherwise the first one is half of all.
    """
    if count == 1:
        return [length]
    first = length // count if even else length // 2
    each = (length - first) // (count - 1)
    return [first, *[each] * (count - 2), length - first - each * (count - 2)]


def counted(ids: np.ndarray) -> np.ndarray:
    """Weights of a document's tokens, float32: its second half, and at least its last token, counts."""
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[min(max(1, len(ids) // 2), len(ids) - 1) :] = 1
    return weights


# A kind of rows -> who makes them up.
ROWS: dict[str, type[SyntheticDataset]] = {
    "text": SyntheticDataset,
    "conversations": SyntheticConversations,
    "pairs": SyntheticPairs,
    "groups": SyntheticGroups,
}


def synthetic_dataset(config: RunConfig, total: int, seed: int) -> SyntheticDataset:
    """The rows that a run with data.synthetic reads."""
    kind = config.objective.reads
    if kind == "text" and config.data.synthetic == "conversations":
        kind = "conversations"
    return ROWS[kind](config, total, seed)


def like_the_data(config: RunConfig) -> tuple[bool | str, str]:
    """What data.synthetic stands for a run's data, and what is to be said of it.

    Returns:
        The value of data.synthetic, and a line; the line is empty where nothing is assumed.
    """
    data, objective = config.data, config.objective
    if objective.reads != "text" or data.synthetic:
        return data.synthetic or True, ""
    if data.prepare is not None:
        return "conversations" if data.prepare.chat is not None else True, ""
    if any(conversations_at(source.path) for source in data.sources):
        return "conversations", ""
    if getattr(objective, "per", "token") == "conversation":
        return "conversations", ""
    missing = [source.path for source in data.sources if not Path(f"{source.path}.idx").is_file()]
    if missing:
        return True, (
            f"data source {missing[0]} is not here: its rows are taken to be text; if it holds conversations, give "
            "data.sources=[] data.synthetic=conversations"
        )
    return True, ""
