"""A weighted blend of sources as megatron-core's datasets, with an index that one rank a node builds and all map.

megatron-core decides the order. Its builder, though, writes the index on global rank 0 alone, so that nodes without shared
storage find none, and leaves the other ranks in a barrier where rank 0 fails; a kill in the middle of a write leaves a file
that counts as whole. Here the index is built by whoever is told to, written at once or not at all, and only then read.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from flagscale_like.config import RunConfig
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError
from flagscale_like.run_folder import RunFolder

SplitName = Literal["train", "valid", "test"]
SURPLUS = 0.005  # samples built for each source beyond its share, which the blend's rounding may take

# They warn of every index that is kept in memory; we write it ourselves.
for module in (gpt_dataset, blended_dataset):
    module.logger.setLevel(logging.ERROR)


class IndexCache:
    """Index arrays in a folder; in memory only, where there is no folder.

    Args:
        may_build: whether what is missing is built (and written), or an error.
    """

    def __init__(self, folder: Path | None, *, may_build: bool) -> None:
        self.folder, self.may_build = folder, may_build

    def fetch(
        self, key: str, names: Sequence[str], build: Callable[[], Sequence[np.ndarray]]
    ) -> tuple[np.ndarray, ...]:
        """The arrays of a key, mapped from their files.

        Raises:
            DataError: they are not there and must not be built, or a file is no array.
            OSError: they cannot be written.
        """
        paths = [self.folder / f"{key}-{name}.npy" for name in names] if self.folder else []
        if not all(path.is_file() for path in paths) or not paths:
            if not self.may_build:
                raise DataError(
                    f"{self.folder}: the sample index {key} is missing, though the node's first rank has it"
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
            raise DataError(f"{paths[0]}: is no sample index ({error}): remove it, it will be built again") from None


@dataclass
class _Config(GPTDatasetConfig):
    """megatron-core's, and where the index is."""

    index_cache: IndexCache | None = None
    source_marks: dict[str, str] | None = None


class SourceDataset(GPTDataset):
    """One source's samples of one split."""

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        mark = self.config.source_marks[self.dataset_path]
        key = f"{self.unique_description_hash}-{mark}-{self.index_split.name}"
        build = super()._build_document_sample_shuffle_indices
        return self.config.index_cache.fetch(key, ("document", "sample", "shuffle"), build)

    @property
    def parts(self) -> list[SourceDataset]:
        """The sources' own datasets."""
        return [self]

    def place(self, position: int) -> tuple[int, int]:
        """(source, index in the source) of a sample.

        Raises:
            DataError: there is no such sample.
        """
        return 0, _within(position, self)


class Blend(BlendedDataset):
    """Samples of several sources, in a fixed order in which each has its share at any point."""

    def _build_indices(self) -> tuple[np.ndarray, ...]:
        marks = xxhash.xxh64_hexdigest("".join(self.config.source_marks.values()).encode())
        key = f"{self.unique_description_hash}-{marks}-blend-{self.split.name}"
        return self.config.index_cache.fetch(key, ("source", "sample"), super()._build_indices)

    @property
    def parts(self) -> list[SourceDataset]:
        """The sources' own datasets."""
        return self.datasets

    def place(self, position: int) -> tuple[int, int]:
        """(source, index in the source) of a sample.

        Raises:
            DataError: there is no such sample.
        """
        _within(position, self)
        return int(self.dataset_index[position]), int(self.dataset_sample_index[position])


def _within(position: int, dataset: SourceDataset | Blend) -> int:
    if not 0 <= position < len(dataset):
        raise DataError(f"sample {position}: the order has {len(dataset)} samples")
    return position


def index_folder(config: RunConfig) -> Path:
    """Where a run keeps its sample index."""
    return Path(config.data.cache_dir or RunFolder(config.run_dir).index)


def build_split(
    config: RunConfig, tokenizer: Tokenizer, split: SplitName, samples: int, cache: IndexCache
) -> SourceDataset | Blend:
    """The samples of one split, in the order in which they are read; a function of the configuration and of `samples`.

    Raises:
        DataError: the index cannot be built, written or read, whatever the reason.
    """
    sources, number = config.data.sources, ("train", "valid", "test").index(split)
    total = sum(source.weight for source in sources)
    weights = [source.weight / total for source in sources]
    options = _Config(
        random_seed=config.train.seed,
        sequence_length=config.train.seq_length,
        blend=([s.path for s in sources], weights if len(sources) > 1 else None),
        split=config.data.split,
        path_to_cache="",  # megatron-core keeps none of its own
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=SURPLUS,
        index_cache=cache,
        source_marks={source.path: source_mark(source.path) for source in sources},
    )
    shares = [math.ceil(samples * weight) for weight in weights]
    try:
        parts = []
        for source, share in zip(sources, shares, strict=True):
            documents = SourceDataset.build_low_level_dataset(source.path, options)
            first, last = (round(edge * len(documents)) for edge in options.split_matrix[number])
            wanted = math.ceil(share * (1 + SURPLUS)) if len(sources) > 1 else samples
            indices = np.arange(first, last, dtype=np.int32)
            parts.append(SourceDataset(documents, source.path, indices, wanted, Split(number), options))
        return Blend(parts, weights, sum(shares), options) if len(sources) > 1 else parts[0]
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"the sample index cannot be written to {error.filename or cache.folder}: {error.strerror or error}; set "
            "data.cache_dir to a folder that can be written"
        ) from None
    except Exception as error:  # whatever goes wrong on one rank has to reach the others
        reason = str(error).splitlines()[0] if str(error) else ""
        raise DataError(f"the sample index cannot be built: {type(error).__name__}: {reason}") from error


def source_mark(prefix: str) -> str:
    """Changes with the source's documents, which megatron-core's own key does not: another corpus under an old name."""
    index, tokens = Path(prefix + ".idx"), Path(prefix + ".bin")
    with open(index, "rb") as file:
        head = file.read(1 << 20)
    return xxhash.xxh64_hexdigest(head + f"{index.stat().st_size} {tokens.stat().st_size}".encode())[:8]


@dataclass(frozen=True)
class SourceUse:
    """How much of a source a stretch of training reads.

    Attributes:
        samples: read of this source.
        tokens: read.
        epoch_tokens: tokens of the source in this split.
    """

    name: str
    samples: int
    tokens: int
    epoch_tokens: int

    @property
    def epochs(self) -> float:
        return self.tokens / self.epoch_tokens

    def __str__(self) -> str:
        return f"{self.name}: {self.tokens:,} of {self.epoch_tokens:,} tokens, read {self.epochs:.2f} times"


def counts_of(dataset: SourceDataset | Blend, samples: int) -> list[int]:
    """How many of the first `samples` samples are of each source."""
    if isinstance(dataset, Blend):
        return np.bincount(dataset.dataset_index[:samples], minlength=len(dataset.parts)).tolist()
    return [samples]


def source_use(parts: Sequence[SourceDataset], names: Sequence[str], counts: Sequence[int]) -> list[SourceUse]:
    """How much of each source is read in `counts` samples of them."""
    length = parts[0].config.sequence_length
    epochs = [int(part.dataset.sequence_lengths[part.indices].sum(dtype=np.int64)) for part in parts]
    return [
        SourceUse(name, count, count * length, tokens)
        for name, count, tokens in zip(names, counts, epochs, strict=True)
    ]
