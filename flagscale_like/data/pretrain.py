"""Pretraining data: megatron-core's GPT dataset over a weighted blend, and the loader of one rank."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flagscale_like.config import RunConfig, Source
from flagscale_like.data.batch import Batch
from flagscale_like.data.blend import IndexCache, SplitName, build_split, index_folder
from flagscale_like.data.index_file import read_lengths
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.readers import find_inputs, read_documents
from flagscale_like.data.sampler import MicroBatchSampler
from flagscale_like.data.selection import Mixture, MixtureSampler, SourcesDataset
from flagscale_like.data.tokenizer import Tokenizer, train_bpe
from flagscale_like.errors import DataError
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import ParallelContext, agree

SOURCE = "dataset_id"  # megatron-core's name for a sample's source in the blend


class SyntheticDataset(Dataset):
    """Random tokens, a function of (seed, index): for benchmarks, and for tests that need no text."""

    def __init__(self, vocab_size: int, seq_length: int, total: int, seed: int) -> None:
        self.vocab_size, self.seq_length, self.total, self.seed = vocab_size, seq_length, total, seed

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        tokens = torch.randint(0, self.vocab_size, (self.seq_length + 1,), generator=generator)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(self.seq_length)}


def prepare_once(config: RunConfig, workers: int = 1) -> RunConfig:
    """Turn `data.prepare` into tokenizer and .bin/.idx under RUN_DIR/data, where they are not there yet.

    Call it in one process before the others read.

    Returns:
        The configuration with data.sources and data.tokenizer in place of data.prepare.
    """
    prepare = config.data.prepare
    if prepare is None:
        return config
    folder = RunFolder(config.run_dir).data
    prefix, tokenizer = folder / "text", config.data.tokenizer
    if tokenizer is None:
        tokenizer = str(folder / "tokenizer")
        if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
            texts = (document.text for document in read_documents(find_inputs(prepare.input)))
            train_bpe(texts, prepare.tokenizer_vocab_size, folder / "tokenizer")
    if not Path(f"{prefix}.idx").is_file():
        preprocess(find_inputs(prepare.input), tokenizer, prefix, workers=workers)
    data = config.data.model_copy(
        update={"prepare": None, "tokenizer": tokenizer, "sources": [Source(path=str(prefix))]}
    )
    return config.model_copy(update={"data": data})


def check_sources(config: RunConfig) -> Tokenizer | None:
    """Look at tokenizer and sources before anything collective depends on them.

    Raises:
        DataError: a file is missing, foreign, empty, or the tokenizer knows more ids than the model.
    """
    if config.data.synthetic:
        return None
    tokenizer = Tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.folder} has {tokenizer.vocab_size} ids, model.vocab_size is {config.model.vocab_size}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    for source in config.data.sources:
        for suffix in (".bin", ".idx"):
            if not Path(source.path + suffix).is_file():
                raise DataError(f"data source {source.path}: {source.path}{suffix} is missing; run `preprocess` first")
        _check_split(config, source.path, read_lengths(source.path))
    return tokenizer


def _check_split(config: RunConfig, prefix: str, lengths: np.ndarray) -> None:
    """megatron-core looks for a split's first sample for ever where the split has no token."""
    shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(config.data.split))
    evaluates = config.train.eval_interval > 0
    wanted = {"training": True, "validation": evaluates, "test": evaluates and config.data.tests}
    for (name, needed), share in zip(wanted.items(), shares, strict=False):
        if not needed:
            continue
        first, last = (round(edge * len(lengths)) for edge in share or (0.0, 0.0))
        if lengths[first:last].sum() == 0:
            raise DataError(
                f"data source {prefix}: data.split {config.data.split} leaves {last - first} of its {len(lengths)} "
                f"documents for {name}: give it a larger share"
                + (", or set train.eval_interval to 0" if name != "training" else "")
            )


def build_datasets(
    config: RunConfig, ctx: ParallelContext, *, train_samples: int, valid_samples: int
) -> tuple[Dataset, Dataset | None]:
    """Training and validation data. All ranks call it; the sample index is built by one a node and read by all.

    Args:
        train_samples: samples that the whole run needs. The order depends on it: resume with the number it began with.
        valid_samples: samples of one evaluation; 0 for none.

    Raises:
        DataError: on every rank, where any could not build or read.
    """
    train = build_dataset(config, ctx, "train", train_samples)
    return train, build_dataset(config, ctx, "valid", valid_samples) if valid_samples else None


def build_dataset(config: RunConfig, ctx: ParallelContext, split: SplitName, samples: int) -> Dataset:
    """`samples` samples of one split; see `build_datasets`."""
    if config.data.synthetic:
        offset = ("train", "valid", "test").index(split)
        return SyntheticDataset(config.model.vocab_size, config.train.seq_length, samples, config.train.seed + offset)
    if split == "train" and config.data.selection is not None:
        # Any source may be asked for all samples. Evaluation stays on the given weights.
        return SourcesDataset([_built_once(one, ctx, split, samples) for one in each_source(config)])
    return _built_once(config, ctx, split, samples)


def each_source(config: RunConfig) -> list[RunConfig]:
    """The configuration with one source at a time, as dynamic selection reads them."""
    return [_with_data(config, sources=[source]) for source in config.data.sources]


def build_target(config: RunConfig, ctx: ParallelContext, samples: int) -> Dataset:
    """`samples` samples of the held-out set that `data.selection.target` names. All ranks call it.

    Raises:
        DataError: on every rank; it is missing, foreign or empty.
    """
    config = _with_data(config, sources=[Source(path=config.data.selection.target)], split="1,0,0")
    config = config.model_copy(update={"train": config.train.model_copy(update={"eval_interval": 0})})
    return _built_once(config, ctx, "train", samples)


def _with_data(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _built_once(config: RunConfig, ctx: ParallelContext, split: SplitName, samples: int) -> Dataset:
    tokenizer = agree(ctx, lambda: check_sources(config))
    cache = IndexCache(index_folder(config), may_build=ctx.is_node_main)
    build = functools.cache(lambda: build_split(config, tokenizer, split, samples, cache))
    # One rank builds. Then the first of each node, which has nothing to do where it sees what the one wrote: that is how
    # shared storage is told from the other kind. Then all the others read.
    agree(ctx, lambda: build() if ctx.is_main else None)
    agree(ctx, lambda: build() if ctx.is_node_main else None)
    return agree(ctx, build)


def micro_batches(
    dataset: Dataset, config: RunConfig, ctx: ParallelContext, *, consumed: int = 0, mixture: Mixture | None = None
) -> Iterator[Batch]:
    """This rank's micro-batches from `consumed` samples on.

    Only the first and the last pipeline stage read; the ranks of one tensor-parallel group read the same.

    Args:
        mixture: chooses the samples of a SourcesDataset, in place of their order.

    Raises:
        DataError: the samples are used up.
    """
    size = config.train.micro_batch_size
    if mixture is not None:
        sampler = MixtureSampler(mixture, size, ctx.dp_rank, ctx.dp)
    else:
        sampler = MicroBatchSampler(len(dataset), consumed, size, ctx.dp_rank, ctx.dp)
    workers = config.data.num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=ctx.platform.pins_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else each new loader draws from the default stream, and a resumed run's differs
    )
    for batch in loader:
        yield Batch.of(batch, ctx.platform.device, batch[SOURCE].long() if SOURCE in batch else None)
    raise DataError(
        f"the data is used up: all {len(dataset):,} samples that were planned are read; a larger train.steps plans more"
    )


def micro_batch_count(config: RunConfig, ctx: ParallelContext, samples: int) -> int:
    """Micro-batches a data-parallel rank that hold `samples` or a few more; the interleaved schedule wants whole rounds."""
    round_ = config.parallel.pp if config.parallel.vpp > 1 else 1
    count = -(-samples // (config.train.micro_batch_size * ctx.dp))
    return -(-count // round_) * round_
