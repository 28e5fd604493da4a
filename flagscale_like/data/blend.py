"""A weighted blend of data sources, built on megatron-core's GPTDataset and BlendedDataset.

megatron-core computes the order of the samples. This module replaces only the way it stores that order, the sample index.
megatron-core writes the index on global rank 0: nodes without shared storage do not find it, the other ranks wait in a
barrier if rank 0 fails, and a kill during the write leaves a partial file that is later read as a complete one. Here
`IndexCache.may_build` says which ranks write. A writer writes each array to a temporary file and renames it, so that a
reader sees a complete file or none.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from flagscale_like.config import Contrastive, RunConfig
from flagscale_like.data.batch import CONVERSATIONS
from flagscale_like.data.conversations import conversations_at, mask_of, pair_values
from flagscale_like.data.draws import draw
from flagscale_like.data.group_source import GroupSource
from flagscale_like.data.groups import groups_at
from flagscale_like.data.order import OneSource, Row, Samples, checked_position
from flagscale_like.data.packing import ConversationSource, PackedSource
from flagscale_like.data.pairs import PairSource
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError
from flagscale_like.run_folder import RunFolder

SplitName = Literal["train", "valid", "test"]
MOST_EPOCHS = 1_000_000
SURPLUS = 0.005  # extra share of samples built for each source, because the blend rounds each source's count up

# These modules log a warning whenever megatron-core does not write the index itself. IndexCache writes it.
for module in (gpt_dataset, blended_dataset):
    module.logger.setLevel(logging.ERROR)


class IndexCache:
    """The arrays of sample indices, stored as .npy files.

    Args:
        folder: where the files are. None keeps the arrays in memory.
        may_build: True builds and writes a missing array; False makes a missing array an error.
    """

    def __init__(self, folder: Path | None, *, may_build: bool) -> None:
        self.folder, self.may_build = folder, may_build

    def fetch(
        self, key: str, names: Sequence[str], build: Callable[[], Sequence[np.ndarray]]
    ) -> tuple[np.ndarray, ...]:
        """Return the arrays of one index, memory-mapped from their files.

        Args:
            key: identifies the index; the files are KEY-NAME.npy.
            names: one name for each array.
            build: computes the arrays, in the order of `names`, if a file is missing.

        Raises:
            DataError: a file is missing and `may_build` is False, or a file is not a .npy array.
            OSError: a file cannot be written.
        """
        paths = [self.folder / f"{key}-{name}.npy" for name in names] if self.folder else []
        if not all(path.is_file() for path in paths) or not paths:
            if not self.may_build:
                raise DataError(
                    f"{self.folder}: the sample index {key} is missing on this rank, but the first rank of the node has it: "
                    "set data.cache_dir to a folder that all ranks of the node see"
                )
            arrays = tuple(build())
            for path, array in zip(paths, arrays, strict=bool(paths)):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
                with open(temporary, "wb") as file:
                    np.save(file, array)
                os.replace(temporary, path)
            if not paths:
                return arrays
        try:
            return tuple(np.load(path, mmap_mode="r") for path in paths)
        except ValueError as error:
            raise DataError(
                f"{paths[0]}: is not a sample index ({error}): remove the file, the next run builds it again"
            ) from None


@dataclass
class _Config(GPTDatasetConfig):
    """megatron-core's configuration, extended by the cache of the sample index, by each source's `source_mark`, by whether
    each document has the same weight in the loss, by the passages of a group, and by how many samples in a row are of one
    source.
    """

    index_cache: IndexCache | None = None
    source_marks: dict[str, str] | None = None
    per_conversation: bool = False
    passages: int = 1
    run_length: int = 1


class SourceDataset(OneSource, GPTDataset):
    """The samples of one source of text in one split. `packing.ConversationSource` is its counterpart for conversations."""

    packed = False  # a sample is one row of text, whatever documents it is cut from

    @staticmethod
    def units(prefix: str, dataset: IndexedDataset) -> int:
        """How many parts a split can take of the source: documents."""
        return len(dataset)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        mark = self.config.source_marks[self.dataset_path]
        key = f"{self.unique_description_hash}-{mark}-{self.index_split.name}"
        build = super()._build_document_sample_shuffle_indices
        return self.config.index_cache.fetch(key, ("document", "sample", "shuffle"), build)

    def __getitem__(self, idx: int | None) -> Row:
        sample = super().__getitem__(idx)
        del sample["position_ids"]  # a model counts them itself, and rows of conversations have none
        if self.config.per_conversation:
            mask = sample["loss_mask"]
            sample["loss_mask"] = mask / mask.sum().clamp(min=1)
            firsts = (mask.cumsum(0) == 1) & (mask != 0)
            sample["extras"] = {CONVERSATIONS: firsts.float()[None]}
        return sample

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """What the sample at `index` consists of: (document, first token, end) in the order of its tokens."""
        row = self.shuffle_index[index]
        (begin, begin_offset), (end, end_offset) = self.sample_index[row], self.sample_index[row + 1]
        found = []
        for place in range(int(begin), int(end) + 1):
            document = int(self.document_index[place])
            start = int(begin_offset) if place == begin else 0
            # Samples overlap by one token: the last token of a sample is only a label, and is the next one's first token.
            stop = int(end_offset) + 1 if place == end else int(self.dataset.sequence_lengths[document])
            if stop > start:
                found.append((document, start, stop))
        return found

    @property
    def epoch_tokens(self) -> int:
        """Tokens of the source in this split."""
        return int(self.dataset.sequence_lengths[self.indices].sum(dtype=np.int64))

    def tokens_of(self, rows: int) -> int:
        """Tokens of `rows` samples."""
        return rows * self.config.sequence_length


AnySource = SourceDataset | PackedSource


def source_class(prefix: str) -> type[AnySource]:
    """The class of the dataset that reads a prefix."""
    if groups_at(prefix) is not None:
        return GroupSource
    found = conversations_at(prefix)
    if found is None:
        return SourceDataset
    return PairSource if found.pairs else ConversationSource


class _Rows(Samples):
    """A source's samples under one class: megatron-core blends datasets of one class only."""

    def __init__(self, source: AnySource) -> None:
        self.source, self.index_split, self.unique_identifiers = source, source.index_split, source.unique_identifiers

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        return self.source[index]


class Blend(BlendedDataset):
    """Samples of several sources in a fixed order. In each prefix of that order, each source has its share of the samples."""

    def _build_indices(self) -> tuple[np.ndarray, ...]:
        marks = xxhash.xxh64_hexdigest("".join(self.config.source_marks.values()).encode())
        key = f"{self.unique_description_hash}-{marks}-blend-{self.split.name}"
        return self.config.index_cache.fetch(key, ("source", "sample"), super()._build_indices)

    @property
    def parts(self) -> list[AnySource]:
        """The dataset of each source, in the order of data.sources."""
        return [getattr(dataset, "source", dataset) for dataset in self.datasets]

    def place(self, position: int) -> tuple[int, int]:
        """Return (number of the source, index in the source's dataset) of the sample at `position`.

        Raises:
            DataError: `position` is outside the dataset.
        """
        checked_position(position, len(self))
        return int(self.dataset_index[position]), int(self.dataset_sample_index[position])


class OneSourceBatches(Blend):
    """Samples of several sources, of which each global batch is of one source. Over many batches each has its share."""

    def _build_indices(self) -> tuple[np.ndarray, ...]:
        length = self.config.run_length
        marks = xxhash.xxh64_hexdigest("".join(self.config.source_marks.values()).encode())
        key = f"{self.unique_description_hash}-{marks}-batches-of-{length}-{self.split.name}"
        return self.config.index_cache.fetch(key, ("source", "sample"), self._batches)

    def _batches(self) -> tuple[np.ndarray, np.ndarray]:
        length = self.config.run_length
        order = draw(self.weights, [0.0] * len(self.weights), [0] * len(self.weights))
        batches = np.array(
            list(itertools.islice(order, -(-self.size // length)))
        )  # [batches, 2], source and its number
        sources = np.repeat(batches[:, 0], length)[: self.size]
        samples = (batches[:, 1:] * length + np.arange(length)).reshape(-1)[: self.size]
        return sources.astype(np.int16), samples


def is_packed(dataset: Dataset) -> bool:
    """Whether the rows of a run's dataset are packs of documents, or some of them are."""
    parts = getattr(dataset, "parts", None) or getattr(dataset, "datasets", [])
    return any(part.packed for part in parts)


def index_folder(config: RunConfig) -> Path:
    """The folder of a run's sample index: data.cache_dir, or a folder in the run folder."""
    return Path(config.data.cache_dir or RunFolder(config.run_dir).index)


def _check_epochs(prefix: str, documents: Any, tokens: int) -> None:
    """Refuse an order that megatron-core would build for hours: it goes through its epochs one by one.

    Args:
        tokens: that the order has in all.

    Raises:
        DataError: it would read the source more than MOST_EPOCHS times.
    """
    own = int(documents.sequence_lengths.sum(dtype=np.int64))
    if tokens > MOST_EPOCHS * own:
        raise DataError(
            f"data source {prefix}: {tokens:,} planned tokens read its {own:,} tokens {tokens // max(own, 1):,} times: set "
            "a smaller train.steps, or give more text"
        )


def build_split(
    config: RunConfig, tokenizer: Tokenizer, split: SplitName, samples: int, cache: IndexCache
) -> AnySource | Blend:
    """Build the dataset of one split. The order of its samples depends on the configuration and on `samples` only.

    Args:
        samples: samples that will be read; documents repeat if a source is too short.

    Raises:
        DataError: the index cannot be built, written or read.
    """
    sources, number = config.data.sources, ("train", "valid", "test").index(split)
    objective = config.objective
    run_length = config.train.global_batch_size if config.one_source_batches else 1
    total = sum(source.weight for source in sources)
    weights = [source.weight / total for source in sources]
    options = _Config(
        **_of_megatron(config, tokenizer, weights),
        index_cache=cache,
        source_marks={source.path: source_mark(source.path) for source in sources},
        per_conversation=objective.kind == "next_token" and objective.per == "conversation",
        passages=objective.passages if isinstance(objective, Contrastive) else 1,
        run_length=run_length,
    )
    shares = [math.ceil(samples * weight) for weight in weights]
    try:
        parts = []
        for source, share in zip(sources, shares, strict=True):
            kind = source_class(source.path)
            documents = kind.build_low_level_dataset(source.path, options)
            count = kind.units(source.path, documents)
            first, last = (round(edge * count) for edge in options.split_matrix[number])
            wanted = math.ceil(share * (1 + SURPLUS)) + run_length if len(sources) > 1 else samples
            _check_epochs(source.path, documents, wanted * config.train.seq_length)
            indices = np.arange(first, last, dtype=np.int32)
            parts.append(kind(documents, source.path, indices, wanted, Split(number), options))
        rows = parts if len({type(part) for part in parts}) == 1 else [_Rows(part) for part in parts]
        blend = OneSourceBatches if run_length > 1 else Blend
        return blend(rows, weights, sum(shares), options) if len(sources) > 1 else parts[0]
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"the sample index cannot be written to {error.filename or cache.folder}: {error.strerror or error}: set "
            "data.cache_dir to a writable folder"
        ) from None
    except Exception as error:  # `agree` passes a DataError of one rank on to the other ranks
        reason = str(error).splitlines()[0] if str(error) else ""
        raise DataError(f"the sample index cannot be built: {type(error).__name__}: {reason}") from error


def _of_megatron(config: RunConfig, tokenizer: Tokenizer, weights: Sequence[float]) -> dict[str, Any]:
    """The fields that _Config has from megatron-core."""
    paths = [source.path for source in config.data.sources]
    return {
        "random_seed": config.train.seed,
        "sequence_length": config.train.seq_length,
        "blend": (paths, weights if len(paths) > 1 else None),
        "split": config.data.split,
        "path_to_cache": "",  # megatron-core writes no index of its own
        "tokenizer": tokenizer,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "mid_level_dataset_surplus": SURPLUS,
    }


def source_mark(prefix: str) -> str:
    """A hash of the first MiB of the .idx and of the sizes of .idx and .bin, 8 hexadecimal digits. Of conversations, also of
    their .chat.json and the size of their weights; of groups, of their .groups.json, counts and scores.

    It is part of the index's key: megatron-core's own key stays the same if another corpus is written to the same prefix.
    """
    index, tokens = Path(prefix + ".idx"), Path(prefix + ".bin")
    with open(index, "rb") as file:
        head = file.read(1 << 20)
    if found := conversations_at(prefix):
        head += Path(f"{prefix}.chat.json").read_bytes() + str(Path(mask_of(prefix) + ".bin").stat().st_size).encode()
        head += pair_values(prefix).tobytes() if found.pairs else b""
    if groups_at(prefix):
        head += b"".join(
            Path(prefix + suffix).read_bytes() for suffix in (".groups.json", ".groups.npy", ".scores.npy")
        )
    return xxhash.xxh64_hexdigest(head + f"{index.stat().st_size} {tokens.stat().st_size}".encode())[:8]


@dataclass(frozen=True)
class SourceUse:
    """How much of one source a number of training samples reads.

    Attributes:
        name: the name of the source.
        samples: samples read from this source.
        tokens: tokens read from this source.
        epoch_tokens: tokens that the source has in this split.
    """

    name: str
    samples: int
    tokens: int
    epoch_tokens: int

    @property
    def epochs(self) -> float:
        """How many times the source is read."""
        return self.tokens / self.epoch_tokens

    def __str__(self) -> str:
        return f"{self.name}: {self.tokens:,} tokens, which is {self.epochs:.2f} times its {self.epoch_tokens:,} tokens"


def counts_of(dataset: AnySource | Blend, samples: int) -> list[int]:
    """Count how many of the first `samples` samples come from each source."""
    if isinstance(dataset, Blend):
        return np.bincount(dataset.dataset_index[:samples], minlength=len(dataset.parts)).tolist()
    return [samples]


def source_use(parts: Sequence[AnySource], names: Sequence[str], counts: Sequence[int]) -> list[SourceUse]:
    """Say how much of each source is read.

    Args:
        parts: the dataset of each source.
        names: the name of each source.
        counts: the samples read from each source.
    """
    return [
        SourceUse(name, count, part.tokens_of(count), part.epoch_tokens)
        for name, count, part in zip(names, counts, parts, strict=True)
    ]
