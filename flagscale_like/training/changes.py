"""What differs between the configuration that a run was saved under and the one that it resumes with, and what follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from pydantic import ValidationError

from flagscale_like.config import RunConfig
from flagscale_like.data.index_file import read_lengths
from flagscale_like.errors import CheckpointError, DataError
from flagscale_like.training.learning_rate import build_scheduler

# What the order of the samples follows from, beside the number of planned samples.
ORDER = (
    "train.seq_length",
    "train.seed",
    "data.split",
    "data.sources",
    "data.synthetic",
    "data.selection",
    "objective",
)
# Nothing follows from these for what the run learns.
SILENT = ("data.accept_changes",)


def describe_changes(saved: Mapping[str, Any], config: RunConfig, *, consumed: int, rate_steps: int) -> list[str]:
    """Name every key that differs, with its old and its new value, and what follows for the data and the learning rate.

    Args:
        saved: the configuration in the checkpoint's state.json.
        consumed: samples that the run has read.
        rate_steps: steps that the learning-rate schedule has made.
    """
    before, now = _read(saved), config.model_dump(mode="json")
    if before is None:  # an earlier version's: what it does not say is not compared
        now = {key: value for key, value in now.items() if key in saved}
    found = list(_differences(before.model_dump(mode="json") if before else saved, now))
    found = [change for change in found if change[0] not in SILENT]
    notes = [f"changed since the checkpoint: {key}: {_short(old)} -> {_short(new)}" for key, old, new in found]
    keys = [key for key, _, _ in found]
    own = ("train.global_batch_size",) if config.one_source_batches else ()
    if any(key == name or key.startswith(f"{name}.") for key in keys for name in (*ORDER, *own)):
        notes.append(
            f"the order of the samples is another one from here on: it goes on after {consumed:,} samples of the new order, "
            "so some samples are read again and some are not read"
        )
    if own and consumed % config.train.global_batch_size:
        notes.append(
            f"{consumed:,} samples are no multiple of train.global_batch_size ({config.train.global_batch_size}): from here "
            "on a batch may have two sources, though objective.same_source is true"
        )
    if "train.global_batch_size" in keys and not own:
        notes.append("the samples go on in their order, in steps of the new batch size")
    if before is not None:
        old, new = learning_rate_at(before, rate_steps), learning_rate_at(config, rate_steps)
        if abs(old - new) > 1e-6 * max(old, new):
            notes.append(f"the learning rate at this step is {new:.2e} by the new schedule, {old:.2e} by the saved one")
    return notes


def learning_rate_at(config: RunConfig, steps: int) -> float:
    """The learning rate after `steps` steps of the schedule."""
    scheduler = build_scheduler(SimpleNamespace(param_groups=[]), config)
    scheduler.num_steps = steps
    return scheduler.get_lr({})


def source_record(config: RunConfig) -> dict[str, int]:
    """The number of documents of each data source, by its path: what a later start compares."""
    return {source.path: len(read_lengths(source.path)) for source in config.data.sources}


def check_held_out(saved: Mapping[str, Any], documents: Mapping[str, int] | None, config: RunConfig) -> list[str]:
    """Refuse a resume that trains on documents which were held out, or holds out documents which may have been trained on.

    Args:
        saved: the configuration in the checkpoint's state.json.
        documents: `source_record` of the run that saved it; None in checkpoints of earlier versions.

    Returns:
        What to tell the user: sources that have grown or shrunk, and documents that changed sides where that is accepted.

    Raises:
        DataError: a document changes sides, and data.accept_changes is false.
        CheckpointError: `documents` holds no numbers.
    """
    if not isinstance(documents, dict | None) or not all(isinstance(n, int) for n in (documents or {}).values()):
        raise CheckpointError(
            f"the checkpoint's state.json has {str(documents)[:60]!r} as documents, which must be a number for each "
            "source: go on from another checkpoint, or begin anew with checkpoint.load"
        )
    before = _read(saved)
    if before is None or not config.data.sources or not before.data.sources:
        return []
    notes = []
    counts, old_paths = source_record(config), {source.path for source in before.data.sources}
    for path, count in counts.items():
        earlier = (documents or {}).get(path)
        if path not in old_paths or (earlier is None and before.data.split == config.data.split):
            continue
        if earlier is not None and earlier != count:
            notes.append(
                f"data source {path} has {count:,} documents; it had {earlier:,} when the checkpoint was saved"
            )
        old, new = _split(before.data.split, earlier or count), _split(config.data.split, count)
        crossed = _overlap(old["held out"], new["training"]), _overlap(old["training"], new["held out"])
        if not any(crossed):
            continue
        text = (
            f"data source {path}: {crossed[0]:,} documents that were held out are now trained on, and {crossed[1]:,} "
            "training documents are now held out"
        )
        if not config.data.accept_changes:
            raise DataError(
                f"{text} (data.split {before.data.split}, now {config.data.split}): evaluation would count what training has "
                "read. Keep the split and the files, or set data.accept_changes to true"
            )
        notes.append(f"{text}: the validation loss is no longer of unseen text")
    return notes


def _read(saved: Mapping[str, Any]) -> RunConfig | None:
    """The saved configuration with today's defaults; None where an earlier version's does not read."""
    try:
        return RunConfig.model_validate(saved)
    except ValidationError:
        return None


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of everything that differs. A key that is nowhere is None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*new, *(name for name in old if name not in new)]:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _split(shares: str, count: int) -> dict[str, tuple[int, int]]:
    """The documents [first, end) that are trained on, and those that are held out, as megatron-core rounds them."""
    edges = convert_split_vector_to_split_matrix(parse_and_normalize_split(shares))
    end = round((edges[0] or (0.0, 0.0))[1] * count)
    return {"training": (0, end), "held out": (end, round(max(e[1] for e in edges if e) * count))}


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
