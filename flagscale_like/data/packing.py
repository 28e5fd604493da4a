"""Packs: conversations of different lengths that fill rows of one length, and the dataset of such rows.

Each conversation is a document of its row, so that none sees another. A conversation of n tokens takes n - 1 places, because
its last token is only a label. What is left of a row is one more document, whose tokens do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from flagscale_like.data.batch import CONVERSATIONS, Batch, collate
from flagscale_like.data.best_fit import best_fit_decreasing
from flagscale_like.data.conversations import mask_of
from flagscale_like.data.index_file import read_lengths
from flagscale_like.data.order import OneSource, Row
from flagscale_like.errors import DataError
from flagscale_like.runtime.parallel import ParallelContext


def pack_epochs(
    places: Callable[[int], np.ndarray], room: int, *, rows: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pack items for as many epochs as `rows` rows need. Every epoch has each item once.

    Which of equally long items share a row, and the order of the rows, are drawn anew for each epoch from (seed, epoch)
    alone.

    Args:
        places: [n], of each item in an epoch, given the epoch's number.
        room: places of a row.

    Returns:
        int32, the numbers of the items in the order of the rows; and int64 [rows + 1], where each row begins in it.
    """
    items, counts, epoch, made = [], [], 0, 0
    while made < rows:
        sizes = places(epoch)
        draw = np.random.RandomState(np.array([seed, epoch], dtype=np.uint32))  # its numbers never change with numpy
        shuffled = draw.permutation(len(sizes))
        bins = best_fit_decreasing(sizes[shuffled], room)
        order = draw.permutation(len(bins)).tolist()
        items += [shuffled[bins[number]] for number in order]
        counts += [len(bins[number]) for number in order]
        epoch, made = epoch + 1, made + len(bins)
    starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    return np.concatenate(items).astype(np.int32), starts


class PackedSource(OneSource, MegatronDataset):
    """The rows of one source in one split. A row is a pack of items: conversations, pairs or groups.

    Attributes:
        members: int32, numbers of the items in the order of the rows, over whole epochs.
        starts: int64 [rows + 1], where each row begins in `members`.
    """

    packed = True
    members: np.ndarray
    starts: np.ndarray

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        return IndexedDataset(dataset_path, mmap=config.mmap_bin_files)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members_of(self, row: int) -> list[int]:
        """The numbers of a row's items, in order."""
        return self.members[self.starts[row] : self.starts[row + 1]].tolist()


class ConversationSource(PackedSource):
    """The rows of one source of conversations in one split; see data.conversations. A row is a pack."""

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
        self.weights = IndexedDataset(mask_of(dataset_path))
        self._tokenizer_pad = config.tokenizer.pad
        key = f"{self.unique_description_hash}-{config.source_marks[dataset_path]}-{index_split.name}"
        self.members, self.starts = config.index_cache.fetch(key, ("conversation", "row"), self._pack)

    @staticmethod
    def units(prefix: str, dataset: IndexedDataset) -> int:
        """How many parts a split can take of the source: conversations."""
        return len(dataset)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each conversation of the source, [n]."""
        return self.dataset.sequence_lengths

    @property
    def places(self) -> np.ndarray:
        """Places of a row that each conversation of the source takes, [n]."""
        return self.sizes - 1

    def _pack(self) -> tuple[np.ndarray, np.ndarray]:
        config, places = self.config, self.places[self.indices]
        members, starts = pack_epochs(
            lambda epoch: places, config.sequence_length, rows=self.num_samples, seed=config.random_seed
        )
        return self.indices[members], starts

    def __getitem__(self, index: int) -> Row:
        pairs = [(self.dataset.get(number), self.weights.get(number)) for number in self.members_of(index)]
        return pack_row(
            pairs,
            self.config.sequence_length,
            pad=self._tokenizer_pad,
            per_conversation=self.config.per_conversation,
        )

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """What the row at `index` consists of: (conversation, first token, end) in the order of its tokens."""
        return [(number, 0, int(self.sizes[number])) for number in self.members_of(index)]

    @property
    def epoch_tokens(self) -> int:
        """Tokens of the source in this split."""
        return int(self.sizes[self.indices].sum(dtype=np.int64))

    def tokens_of(self, rows: int) -> int:
        """Tokens of the first `rows` rows; they start again after the last."""
        turns, rest = divmod(rows, len(self))
        read = [self.members] * turns + [self.members[: self.starts[rest]]]
        return sum(int(self.sizes[part].sum(dtype=np.int64)) for part in read)


def pack_row(
    conversations: Sequence[tuple[np.ndarray, np.ndarray]], length: int, *, pad: int, per_conversation: bool = False
) -> Row:
    """Put conversations into one row.

    Args:
        conversations: token ids [n] and their weights [n], of each.
        length: places of the row.
        pad: the id at places that no conversation takes.
        per_conversation: divide the weights by their sum in the conversation.

    Returns:
        tokens and labels int64 [length]; loss_mask float32 [length], the weight of each label; documents int32 [n + 1], see
        Batch.documents. With per_conversation, `extras` has conversations, float32 [1, length]: 1 at the first label of each
        that counts.
    """
    tokens = np.full(length, pad, dtype=np.int64)
    labels, mask, bounds = tokens.copy(), np.zeros(length, dtype=np.float32), [0]
    firsts = np.zeros(length, dtype=np.float32)
    for ids, weights in conversations:
        start, stop = bounds[-1], bounds[-1] + len(ids) - 1
        tokens[start:stop], labels[start:stop], mask[start:stop] = ids[:-1], ids[1:], weights[1:]
        if per_conversation and (counted := np.flatnonzero(weights[1:])).size:
            mask[start:stop] /= weights[1:].sum(dtype=np.float64)
            firsts[start + counted[0]] = 1
        bounds.append(stop)
    bounds += [length] if bounds[-1] < length else []
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(mask),
        "documents": torch.tensor(bounds, dtype=torch.int32),
        **({"extras": {CONVERSATIONS: torch.from_numpy(firsts)[None]}} if per_conversation else {}),
    }


def conversation_batches(
    prefix: str, ctx: ParallelContext, *, places: int, micro_batch_size: int, vocab_size: int
) -> tuple[Iterator[Batch], int]:
    """Every conversation of a prefix once, packed, as this data-parallel rank's micro-batches on its device.

    Args:
        places: of a row.
        vocab_size: the model's.

    Returns:
        The micro-batches, and how many there are; the same number on every rank. Rows without a conversation fill the last.

    Raises:
        DataError: a conversation does not fit a row, or has an id that the model lacks; or see `read_lengths`.
    """
    lengths = read_lengths(prefix)
    longest = int(lengths.max()) - 1
    if longest > places:
        raise DataError(f"{prefix}: a conversation takes {longest:,} places of a row of {places:,}: give a longer row")
    tokens, weights = IndexedDataset(prefix), IndexedDataset(mask_of(prefix))
    largest = int(np.memmap(f"{prefix}.bin", dtype=tokens.index.dtype, mode="r").max())
    if largest >= vocab_size:
        raise DataError(f"{prefix}: holds token {largest}, the model's vocabulary has {vocab_size}: use its tokenizer")
    bins = best_fit_decreasing(lengths - 1, places)
    span = micro_batch_size * ctx.dp
    bins += [[]] * (-len(bins) % span)

    def batches() -> Iterator[Batch]:
        for turn in range(ctx.dp_rank * micro_batch_size, len(bins), span):
            rows = [
                pack_row([(tokens.get(number), weights.get(number)) for number in members], places, pad=0)
                for members in bins[turn : turn + micro_batch_size]
            ]
            yield Batch.of(collate(rows), ctx.platform.device)

    return batches(), len(bins) // span
