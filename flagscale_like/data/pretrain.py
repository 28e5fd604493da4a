"""Pretraining data: megatron-core's GPT dataset over a weighted blend, and the loader of one rank."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flagscale_like.config import RunConfig, Source
from flagscale_like.data.preprocess import find_inputs, preprocess, read_documents
from flagscale_like.data.sampler import MicroBatchSampler
from flagscale_like.data.selection import Mixture, MixtureSampler, SourcesDataset
from flagscale_like.data.tokenizer import Tokenizer, train_bpe
from flagscale_like.errors import DataError
from flagscale_like.runtime.parallel import ParallelContext

FIELDS = ("tokens", "labels", "loss_mask", "source")  # source: with dynamic selection only


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
    folder = Path(config.run_dir) / "data"
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
    wanted = {"training": True, "validation": config.train.eval_interval > 0}
    for (name, needed), share in zip(wanted.items(), shares, strict=False):
        if not needed:
            continue
        first, last = (round(edge * len(lengths)) for edge in share or (0.0, 0.0))
        if lengths[first:last].sum() == 0:
            raise DataError(
                f"data source {prefix}: data.split {config.data.split} leaves {last - first} of its {len(lengths)} "
                f"documents for {name}: give it a larger share"
                + (", or set train.eval_interval to 0" if name == "validation" else "")
            )


def read_lengths(prefix: str) -> np.ndarray:
    """Tokens of each document of an index, after comparing the sizes of .idx and .bin with what its header says.

    Raises:
        DataError: another file, a cut one, or no documents.
    """
    index = Path(prefix + ".idx").read_bytes()
    header = _INDEX_HEADER + struct.pack("<Q", 1)
    fixed = len(header) + struct.calcsize("<BQQ")
    if len(index) < fixed or not index.startswith(header):
        raise DataError(f"data source {prefix}: {prefix}.idx is not a megatron index")
    code, sequences, documents = struct.unpack_from("<BQQ", index, len(header))
    wanted = fixed + sequences * (4 + 8) + documents * 8  # lengths, pointers, documents
    if len(index) != wanted:
        raise DataError(f"data source {prefix}: .idx has {len(index)} bytes, its header describes {wanted}: cut short?")
    lengths = np.frombuffer(index, dtype=np.int32, count=sequences, offset=fixed)
    tokens = int(lengths.sum(dtype=np.int64))
    if documents < 2 or tokens == 0:
        raise DataError(f"data source {prefix}: holds no documents")
    size, wanted = Path(prefix + ".bin").stat().st_size, tokens * DType.size(code)
    if size != wanted:
        raise DataError(f"data source {prefix}: .bin has {size} bytes, its .idx describes {wanted}: cut short?")
    return lengths


def build_datasets(
    config: RunConfig, ctx: ParallelContext, *, train_samples: int, valid_samples: int
) -> tuple[Dataset, Dataset | None]:
    """Training and validation data. All ranks call it; the sample index is built by one and read by all.

    Args:
        train_samples: samples that the whole run needs. The order depends on it: resume with the number it began with.
        valid_samples: samples of one evaluation; 0 for none.
    """
    train = config.train
    if config.data.synthetic:
        vocab = config.model.vocab_size
        valid = SyntheticDataset(vocab, train.seq_length, valid_samples, train.seed + 1) if valid_samples else None
        return SyntheticDataset(vocab, train.seq_length, train_samples, train.seed), valid
    tokenizer = check_sources(config)
    sources = config.data.sources
    if config.data.selection is None:
        return _build_split(config, sources, tokenizer, train_samples, valid_samples)
    # Any source may be asked for all samples. Evaluation stays on the given weights.
    train_data = [_build_split(config, [source], tokenizer, train_samples, 0)[0] for source in sources]
    _, valid = _build_split(config, sources, tokenizer, 1, valid_samples) if valid_samples else (None, None)
    return SourcesDataset(train_data), valid


def build_target(config: RunConfig, samples: int) -> Dataset:
    """`samples` samples of the held-out set that `data.selection.target` names. All ranks call it.

    Raises:
        DataError: it is missing, foreign or empty.
    """
    prefix = config.data.selection.target
    read_lengths(prefix)
    data = config.data.model_copy(update={"split": "1,0,0"})
    config = config.model_copy(update={"data": data})
    return _build_split(config, [Source(path=prefix)], check_sources(config), samples, 0)[0]


def _build_split(
    config: RunConfig, sources: list[Source], tokenizer: Tokenizer | None, train_samples: int, valid_samples: int
) -> tuple[Dataset, Dataset | None]:
    dataset_config = GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=config.train.seq_length,
        blend=([s.path for s in sources], [s.weight for s in sources] if len(sources) > 1 else None),
        split=config.data.split,
        path_to_cache=config.data.cache_dir or str(Path(config.run_dir) / "data" / "index"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    datasets = BlendedMegatronDatasetBuilder(
        GPTDataset, [train_samples, valid_samples, 0], lambda: True, dataset_config
    ).build()
    return datasets[0], datasets[1] if valid_samples else None


def micro_batches(
    dataset: Dataset, config: RunConfig, ctx: ParallelContext, *, consumed: int = 0, mixture: Mixture | None = None
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches from `consumed` samples on: tokens, labels [b, s] int64 and loss_mask [b, s], on the device.

    Only the first and the last pipeline stage read; the ranks of one tensor-parallel group read the same.

    Args:
        mixture: chooses the samples of a SourcesDataset, in place of their order.
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
        pin_memory=ctx.platform.is_cuda,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else each new loader draws from the default stream, and a resumed run's differs
    )
    for batch in loader:
        yield {name: batch[name].to(ctx.platform.device, non_blocking=True) for name in FIELDS if name in batch}
