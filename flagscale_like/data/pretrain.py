"""Pretraining data: prepares and checks the sources, builds the datasets on all ranks, and loads one rank's micro-batches."""

from __future__ import annotations

import functools
import json
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from torch.utils.data import DataLoader

from flagscale_like.config import Chat, Contrastive, Prepare, RunConfig, Source
from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.blend import IndexCache, SplitName, build_split, index_folder
from flagscale_like.data.chat import BadConversationError, parse_record, read_template, read_template_file
from flagscale_like.data.conversations import Conversations, check_conversations, conversations_at
from flagscale_like.data.groups import Groups, GroupTable, check_groups, groups_at
from flagscale_like.data.index_file import check_index, read_lengths
from flagscale_like.data.inputs import ProgressLines, Say, changes_of_inputs, record_inputs, silent, size_of
from flagscale_like.data.order import Samples
from flagscale_like.data.pair_shards import parse_pair
from flagscale_like.data.preprocess import preprocess, preprocess_chat
from flagscale_like.data.readers import find_inputs, read_documents
from flagscale_like.data.sampler import MicroBatchSampler
from flagscale_like.data.selection import Mixture, MixtureSampler, SourcesDataset
from flagscale_like.data.shards import ChatOptions
from flagscale_like.data.synthetic import synthetic_dataset
from flagscale_like.data.tokenizer import CONFIG_FILE, TRAINED_ON_FILE, Tokenizer, is_trained_on, train_bpe
from flagscale_like.errors import DataError, required
from flagscale_like.json_files import BAD_JSON
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import ParallelContext, agree

SOURCE = "dataset_id"  # the key under which megatron-core's BlendedDataset gives the number of a sample's source


def prepare_once(config: RunConfig, workers: int = 1, say: Say = silent) -> RunConfig:
    """Train the tokenizer and write the .bin/.idx of `data.prepare` under RUN_DIR/data, unless they exist already.

    Call it in one process before the other processes read the files.

    Args:
        workers: number of tokenizing processes.
        say: takes the lines about what is done, and about inputs that have changed since.

    Returns:
        The configuration with data.sources and data.tokenizer in place of data.prepare.

    Raises:
        DataError: see `preprocess`.
    """
    prepare = config.data.prepare
    if prepare is None:
        return config
    folder = RunFolder(config.run_dir).data
    prefix, tokenizer = folder / ("chat" if prepare.chat else "text"), config.data.tokenizer
    progress = begin_preparing(config, prefix, say)
    if tokenizer is None:
        tokenizer, size = str(folder / "tokenizer"), required(prepare.tokenizer_vocab_size, "tokenizer_vocab_size")
        if not (folder / "tokenizer" / CONFIG_FILE).is_file():
            say(f"preparing data: training a tokenizer of {size:,} entries")
            train_bpe(_texts(prepare, pairs=config.objective.reads == "pairs"), size, folder / "tokenizer")
        elif (folder / "tokenizer" / TRAINED_ON_FILE).is_file() and not is_trained_on(folder / "tokenizer", size):
            raise DataError(
                f"{tokenizer}: was trained for another number of entries than data.prepare.tokenizer_vocab_size ({size}): "
                "set that number, or choose another run_dir"
            )
    if prepare.chat is not None:
        tokenizer = _prepare_chat(config, prepare.chat, tokenizer, prefix, workers, progress)
    elif not Path(f"{prefix}.idx").is_file():
        made = preprocess(find_inputs(prepare.input), tokenizer, prefix, workers=workers, progress=progress)
        say(f"prepared {made.documents:,} documents, {made.tokens:,} tokens")
    data = config.data.model_copy(
        update={"prepare": None, "tokenizer": tokenizer, "sources": [Source(path=str(prefix))]}
    )
    return config.model_copy(update={"data": data})


def begin_preparing(config: RunConfig, prefix: Path, say: Say) -> ProgressLines:
    """Say what is about to be prepared and record it, or what has changed since it was.

    Returns:
        What says how much is tokenized.
    """
    folder, patterns = prefix.parent, config.data.required_prepare.input
    if say is silent:
        return ProgressLines(0, say)
    if Path(f"{prefix}.idx").is_file():
        try:
            changed = changes_of_inputs(folder, find_inputs(patterns))
        except DataError as error:  # it is not needed any more
            changed = str(error)
        if changed:
            say(
                f"warning: data.prepare.input is not what {folder} was made of: {changed}. The run trains on what was "
                "prepared; another run_dir prepares anew"
            )
        return ProgressLines(0, say)
    files = find_inputs(patterns)
    say(f"preparing data: {len(files):,} files, {size_of(files) / 1e6:,.1f} MB, to {folder}")
    record_inputs(folder, files)
    return ProgressLines(size_of(files), say)


def _texts(prepare: Prepare, *, pairs: bool) -> Iterator[str]:
    """The texts that a tokenizer is trained on; of pairs, the messages of both conversations."""
    if prepare.chat is None:
        yield from (document.text for document in read_documents(find_inputs(prepare.input)))
        return
    for line in read_documents(find_inputs(prepare.input), key=None):
        try:
            pair = parse_pair(line.text) if pairs else None
            found = [pair.chosen, pair.rejected] if pair else [parse_record(line.text)]
            yield from (message["content"] for conversation in found for message in conversation.messages)
        except BadConversationError as error:
            raise DataError(f"{line.source}:{line.line}: {error}") from None


def _prepare_chat(  # many parameters: those of the preparation, and of its report
    config: RunConfig, chat: Chat, tokenizer: str, prefix: Path, workers: int, progress: ProgressLines
) -> str:
    """Write the conversations of data.prepare, unless they are there, and return the tokenizer folder of the run."""
    template = read_template_file(Path(chat.template)) if chat.template else read_template(tokenizer)
    if template is None:
        raise DataError(f"tokenizer {tokenizer}: has no chat template: give its file as data.prepare.chat.template")
    own = tokenizer if template == read_template(tokenizer) else f"{prefix}-tokenizer"
    found = conversations_at(prefix) if Path(f"{prefix}.idx").is_file() else None
    if found is None:
        pairs = config.objective.reads == "pairs"
        options = ChatOptions(template, chat.train, config.train.seq_length, chat.long, chat.skip_empty, pairs)
        files = find_inputs(config.data.required_prepare.input)
        made, _ = preprocess_chat(files, tokenizer, prefix, options, workers=workers, progress=progress)
        progress.say(f"prepared {made.documents:,} conversations, {made.tokens:,} tokens")
    elif (found.template, found.train, found.pairs) != (template, chat.train, config.objective.reads == "pairs"):
        raise DataError(
            f"{prefix}: was written with another data.prepare.chat: remove {prefix.parent}, or choose another run_dir"
        )
    return own


def check_sources(config: RunConfig) -> Tokenizer | None:
    """Check the tokenizer and the sources, before any collective operation depends on them.

    Returns:
        The tokenizer; None for synthetic data.

    Raises:
        DataError: a file is missing, is not a megatron-core index or holds no documents; the tokenizer has more ids than
            model.vocab_size; conversations do not fit the run (see check_conversations); or data.split leaves no tokens for a
            split that the run reads.
    """
    if config.data.synthetic:
        return None
    tokenizer = Tokenizer(config.data.required_tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.folder} has {tokenizer.vocab_size} ids, model.vocab_size is {config.model.vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    scored = 0
    for source in config.data.sources:
        for suffix in (".bin", ".idx"):
            if not Path(source.path + suffix).is_file():
                raise DataError(
                    f"data source {source.path}: {source.path}{suffix} is missing; run `preprocess` first (of "
                    "conversations, `data chat`; of pairs, `data pairs`; of groups, `data groups`)"
                )
        check_index(source.path)
        _check_ids(source.path, config.model.vocab_size)
        found = conversations_at(source.path)
        if found is not None:
            places, vocab_size = config.train.seq_length, config.model.vocab_size
            check_conversations(source.path, found, places=places, tokenizer=tokenizer.folder, vocab_size=vocab_size)
        groups = groups_at(source.path)
        _check_kind(config, source.path, held_by(found, groups))
        if groups is not None:
            check_groups(
                source.path,
                groups,
                passages=config.required_contrast.passages,
                places=config.train.seq_length,
                tokenizer=tokenizer.folder,
                vocab_size=config.model.vocab_size,
            )
            _check_split(config, source.path, GroupTable(source.path).group_lengths())
            scored += groups.scored
            continue
        _check_split(
            config, source.path, read_lengths(source.path).reshape(-1, 2 if found and found.pairs else 1).sum(1)
        )
    if isinstance(config.objective, Contrastive) and config.objective.distill and not scored:
        raise DataError(
            f"objective.distill is {config.objective.distill}, and no group of data.sources has a teacher's scores: write "
            "some with `data score`, or set objective.distill to 0"
        )
    return tokenizer


def held_by(conversations: Conversations | None, groups: Groups | None) -> str:
    """What a prefix holds: text, conversations, pairs or groups."""
    if groups is not None:
        return "groups"
    if conversations is None:
        return "text"
    return "pairs" if conversations.pairs else "conversations"


def _check_kind(config: RunConfig, prefix: str, held: str) -> None:
    """Check that a source holds what the objective reads.

    Args:
        held: see held_by().

    Raises:
        DataError: it holds something else.
    """
    kind, wanted = config.objective.kind, config.objective.reads
    if wanted != "text" and held != wanted:
        what = "pairs of answers" if wanted == "pairs" else "groups of a query and its passages"
        raise DataError(
            f"data source {prefix}: holds {held}, objective.kind {kind} reads {what}: make them with "
            f"`data {wanted} IN --tokenizer {config.data.tokenizer} --out PREFIX`"
        )
    if wanted == "text" and held == "pairs":
        raise DataError(
            f"data source {prefix}: holds pairs, of which objective.kind {kind} would learn the rejected answers too: set "
            "objective.kind to dpo or reward, or make conversations of the chosen answers with `data chat`"
        )
    if wanted == "text" and held == "groups":
        raise DataError(
            f"data source {prefix}: holds groups of a query and its passages, objective.kind {kind} reads text: set "
            "objective.kind to contrastive, or tokenize the passages with `preprocess`"
        )


def _check_ids(prefix: str, vocab_size: int) -> None:
    """Compare the largest token id that `preprocess` has recorded with the model. What it did not record is found later."""
    path = Path(f"{prefix}.report.json")
    try:
        largest = int(json.loads(path.read_text(encoding="utf-8")).get("largest_id", -1)) if path.is_file() else -1
    except (OSError, *BAD_JSON, AttributeError, TypeError):
        return  # of another program, or of an earlier version
    if largest >= vocab_size:
        raise DataError(
            f"data source {prefix}: holds token {largest}, model.vocab_size is {vocab_size}: it was made with another "
            f"tokenizer; make it anew with data.tokenizer, or set model.vocab_size to {largest + 1} or more"
        )


def _check_batch(batch: Mapping[str, Any], vocab_size: int) -> None:
    """Refuse a token that the model has no row for, on any device, before it is there."""
    largest = max(int(batch[name].numpy().max()) for name in ("tokens", "labels"))  # they are on the host
    if largest >= vocab_size:
        raise DataError(
            f"a sample holds token {largest}, model.vocab_size is {vocab_size}: a data source was made with another "
            "tokenizer than data.tokenizer; make it anew, or set a larger model.vocab_size"
        )


def _check_split(config: RunConfig, prefix: str, lengths: np.ndarray) -> None:
    """Check that each split that the run reads has tokens. For a split without tokens, megatron-core's dataset never returns.

    Args:
        lengths: tokens of each document, or of each pair, of the source.
    """
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
) -> tuple[Samples, Samples | None]:
    """Build the training and the validation dataset. All ranks call it; one rank of each node builds the sample index.

    Args:
        train_samples: samples that the whole run reads. The order of the samples depends on this number, so a resumed run
            passes the number that the run started with.
        valid_samples: samples of one evaluation; 0 builds no validation dataset.

    Raises:
        DataError: on every rank, if any rank could not build or read a dataset.
    """
    train = build_dataset(config, ctx, "train", train_samples)
    return train, build_dataset(config, ctx, "valid", valid_samples) if valid_samples else None


def build_dataset(config: RunConfig, ctx: ParallelContext, split: SplitName, samples: int) -> Samples:
    """Build the dataset of one split with `samples` samples. All ranks call it; see `build_datasets`."""
    if config.data.synthetic:
        offset = ("train", "valid", "test").index(split)
        return synthetic_dataset(config, samples, config.train.seed + offset)
    if split == "train" and config.data.selection is not None:
        # Dynamic selection may draw every sample from one source, so each source gets all of them. Evaluation keeps the
        # weights of data.sources.
        return SourcesDataset([_built_once(one, ctx, split, samples) for one in each_source(config)])
    return _built_once(config, ctx, split, samples)


def each_source(config: RunConfig) -> list[RunConfig]:
    """One configuration for each source, which lists only that source. Dynamic selection builds a dataset from each."""
    return [_with_data(config, sources=[source]) for source in config.data.sources]


def build_target(config: RunConfig, ctx: ParallelContext, samples: int) -> Samples:
    """Build a dataset with `samples` samples of the held-out set that `data.selection.target` names. All ranks call it.

    Raises:
        DataError: on every rank, if the set is missing, is not a megatron-core index or holds no documents.
    """
    selection = required(config.data.selection, "data.selection")
    target = required(selection.target, "data.selection.target")
    config = _with_data(config, sources=[Source(path=target)], split="1,0,0")
    config = config.model_copy(update={"train": config.train.model_copy(update={"eval_interval": 0})})
    return _built_once(config, ctx, "train", samples)


def _with_data(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _built_once(config: RunConfig, ctx: ParallelContext, split: SplitName, samples: int) -> Samples:
    """Build a split's dataset on all ranks, so that the sample index is written once for each storage."""
    tokenizer = required(agree(ctx, lambda: check_sources(config)), "data.tokenizer")
    cache = IndexCache(index_folder(config), may_build=ctx.is_node_main)
    build = functools.cache(lambda: build_split(config, tokenizer, split, samples, cache))
    # Rank 0 builds the index. Then the first rank of each node builds it, unless it finds rank 0's files: on shared storage
    # it finds them, on local disks it does not. Then all other ranks read.
    agree(ctx, lambda: build() if ctx.is_main else None)
    agree(ctx, lambda: build() if ctx.is_node_main else None)
    return agree(ctx, build)


def micro_batches(
    dataset: Samples, config: RunConfig, ctx: ParallelContext, *, consumed: int = 0, mixture: Mixture | None = None
) -> Generator[Batch, None, None]:
    """Yield this rank's micro-batches, on its device. Ranks of one tensor-parallel group get the same micro-batches.

    Args:
        dataset: a dataset of `build_dataset`.
        consumed: samples that training has read already, over all ranks; the first micro-batch follows them.
        mixture: chooses the samples of a SourcesDataset. None reads the dataset in its order.

    Raises:
        DataError: all samples of the dataset are read.
    """
    size = config.train.micro_batch_size
    # Any: torch's annotation wants lists of a sampler.
    sampler: Any = (
        MicroBatchSampler(len(dataset), consumed, size, ctx.dp_rank, ctx.dp)
        if mixture is None
        else MixtureSampler(mixture, size, ctx.dp_rank, ctx.dp)
    )
    workers = config.data.num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=ctx.platform.pins_batches,
        persistent_workers=workers > 0,
        # Without a generator, each new loader draws from torch's default one, and a resumed run's random numbers differ.
        generator=torch.Generator(),
    )
    for batch in loader:
        _check_batch(batch, config.model.vocab_size)
        yield Batch.of(batch, ctx.platform.device, batch[SOURCE].long() if SOURCE in batch else None)
    raise DataError(
        f"the data is used up: all {len(dataset):,} samples that the run planned are read: set a larger train.steps to plan "
        "more"
    )


def micro_batch_count(config: RunConfig, ctx: ParallelContext, samples: int) -> int:
    """The number of micro-batches for each data-parallel rank that together hold `samples` or slightly more samples.

    The interleaved pipeline schedule needs a multiple of the number of pipeline stages.
    """
    round_ = config.parallel.pp if config.parallel.vpp > 1 else 1
    count = -(-samples // (config.train.micro_batch_size * ctx.dp))
    return -(-count // round_) * round_
