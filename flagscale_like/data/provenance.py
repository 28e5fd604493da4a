"""From a training step to the samples it read, their documents, and the file and line of each.

The order of samples is a function of the configuration and of the number of samples planned; which of them a step reads, of
the samples consumed before it. Both are written to RUN_DIR/samples.jsonl whenever they change in another way than by one
step after the other: at each start, and when the run goes back and leaves samples out. Each checkpoint holds them, too.
Ranks of the last pipeline stage note the loss of each sample in RUN_DIR/sample_losses/, at the steps that are logged and at
those whose update was not made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_like.config import RunConfig
from flagscale_like.data.blend import Blend, IndexCache, SourceDataset, build_split, index_folder, source_mark
from flagscale_like.data.draws import DrawnOrder, DrawState
from flagscale_like.data.pretrain import each_source
from flagscale_like.data.sampler import MicroBatchSampler
from flagscale_like.data.selection import Mixture
from flagscale_like.data.table import DocumentTable
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError
from flagscale_like.json_files import append_record, read_records
from flagscale_like.run_folder import RunFolder


@dataclass(frozen=True)
class Segment:
    """A stretch of training: after `step` steps and `consumed` samples it goes on in the order of `train_samples`.

    Attributes:
        event: `start`, or `rewind`: from a later step back to `step`, the samples up to `consumed` being read or left out.
        config: the run's, as a mapping.
        marks: of each source, as `blend.source_mark` gives them; None where they were not noted.
    """

    event: str
    step: int
    consumed: int
    train_samples: int
    world_size: int
    config: dict[str, Any]
    marks: list[str] | None = None

    def append_to(self, run_dir: Path) -> None:
        """Note it in the run's journal."""
        append_record(RunFolder(run_dir).samples, vars(self))


@dataclass(frozen=True)
class Reading:
    """What a step read: samples [first, first + count) in the order of the segment."""

    step: int
    first: int
    count: int
    segment: Segment


@dataclass(frozen=True)
class Part:
    """Tokens [start, end) of a document, in a sample. File and line are None where the source has no table."""

    source: str
    prefix: str
    document: int
    start: int
    end: int
    file: str | None
    line: int | None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else f"{self.prefix} document {self.document}"


@dataclass(frozen=True)
class Sample:
    """One sample of a step.

    Attributes:
        position: in the order of the run.
        dp_rank, micro_batch: which data-parallel rank read it, and in which of its micro-batches, from 0.
        loss: mean over its tokens, in nats; None where it was not noted.
        parts: in the order of its tokens. A document longer than the sample is one part.
    """

    position: int
    dp_rank: int
    micro_batch: int
    loss: float | None
    parts: list[Part]


def read_journal(run_dir: Path) -> list[Segment]:
    """The run's segments, in the order of time; a line cut short by a kill is left out."""
    segments = []
    for record in read_records(RunFolder(run_dir).samples):
        try:
            segments.append(Segment(**record))
        except TypeError:
            continue
    return segments


def segments_of_states(states: Iterable[dict[str, Any]]) -> list[Segment]:
    """Segments from the state.json of checkpoints alone, oldest first, preceded by the run's beginning if it is certain.

    Raises:
        DataError: a state does not say where the run stood.
    """
    found = []
    for state in sorted(states, key=lambda state: int(state.get("step", 0))):
        try:
            layout = state["layout"]
            world = math.prod(int(layout.get(name, 1)) for name in ("tp", "pp", "dp", "cp"))
            place = (int(state["step"]), int(state["consumed_samples"]), int(state["train_samples"]))
            found.append(Segment("start", *place, world, state["config"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"a checkpoint's state does not say what was read ({type(error).__name__}: {error})"
            ) from None
    if found:
        first = found[0]
        beginning = Segment("start", 0, 0, first.train_samples, first.world_size, first.config)
        found = ([beginning] if _consumed_at(beginning, first.step) == first.consumed else []) + found
    for before, after in zip(found[:-1], found[1:], strict=True):
        if _consumed_at(before, after.step) != after.consumed:
            found[found.index(before)] = Segment(**{**vars(before), "event": "gap"})
    return found


def _consumed_at(segment: Segment, step: int) -> int:
    """Samples consumed after a step, if the run goes on from the segment without an event."""
    train = RunConfig.model_validate(segment.config).train
    consumed = segment.consumed
    for _ in range(segment.step, step):
        consumed += train.batch_size_at(consumed)
    return consumed


def readings_of(segments: Sequence[Segment], step: int) -> list[Reading]:
    """What a step read each time it was made, in the order of time: the last one counts, the others were given up.

    Raises:
        DataError: the segments do not reach to this step, or do not say what it read.
    """
    found: list[Reading] = []
    for number, segment in enumerate(segments):
        following = segments[number + 1] if number + 1 < len(segments) else None
        if step <= segment.step:
            continue
        first = _consumed_at(segment, step - 1)
        count = RunConfig.model_validate(segment.config).train.batch_size_at(first)
        if following is not None and step > following.step:
            # Made before the run went back; or, where it was killed, made again from the same samples.
            if following.event != "rewind" or first + count > following.consumed:
                continue
        elif segment.event == "gap":
            raise DataError(
                f"between the checkpoints of steps {segment.step} and {following.step} the run went back: which samples "
                f"step {step} read is known from samples.jsonl only"
            )
        reading = Reading(step, first, count, segment)
        if not found or (found[-1].first, found[-1].count) != (first, count):
            found.append(reading)
        else:
            found[-1] = reading
    if not found:
        where = f"they begin after step {segments[0].step}" if segments else "there are none"
        raise DataError(f"step {step}: the run's records do not say what it read ({where})")
    return found


def draws_of_states(states: Iterable[dict[str, Any]]) -> list[DrawState]:
    """What the state.json of checkpoints say of dynamic selection: each holds until the weights changed next."""
    found = []
    for state in sorted(states, key=lambda state: int(state.get("consumed_samples", 0))):
        config = RunConfig.model_validate(state["config"])
        if config.data.selection is not None and "selection" in state:
            mixture = Mixture(config.data.selection, [source.weight for source in config.data.sources])
            mixture.load(state["selection"])
            found.append(mixture.draw_state(int(state["consumed_samples"]), config.train))
    return found


def open_order(segment: Segment, draws: Sequence[DrawState] = ()) -> SourceDataset | Blend | DrawnOrder:
    """The training samples in a segment's order: from the run's index, or, where that is gone, made again in memory.

    Args:
        draws: of a run with dynamic selection, what it drew by.

    Raises:
        DataError: the sources or the tokenizer are gone, or changed.
    """
    config = RunConfig.model_validate(segment.config)
    if not config.data.sources:
        raise DataError("the run has no sources: synthetic samples come from no document")
    for number, source in enumerate(config.data.sources):
        for suffix in (".bin", ".idx"):
            if not Path(source.path + suffix).is_file():
                raise DataError(
                    f"data source {source.path}: {source.path}{suffix} is missing; look from the run's folder"
                )
        if segment.marks is not None and source_mark(source.path) != segment.marks[number]:
            raise DataError(f"data source {source.path}: was made anew since the run read it; put back what it was")
    if config.data.selection is None:
        return _open_split(config, segment.train_samples)
    parts = [part for one in each_source(config) for part in _open_split(one, segment.train_samples).parts]
    return DrawnOrder(parts, draws)


def _open_split(config: RunConfig, samples: int) -> SourceDataset | Blend:
    tokenizer = Tokenizer(config.data.tokenizer)
    try:
        return build_split(config, tokenizer, "train", samples, IndexCache(index_folder(config), may_build=False))
    except DataError:
        return build_split(config, tokenizer, "train", samples, IndexCache(None, may_build=True))


class Provenance:
    """Looks up samples of an order; live, on the one at hand, or on one that `open_order` made.

    Args:
        names: what reports call the sources.
    """

    def __init__(self, order: SourceDataset | Blend | DrawnOrder, names: Sequence[str]) -> None:
        self.order, self.names, self._parts = order, names, order.parts
        self._tables = [DocumentTable(part.dataset_path) for part in self._parts]

    def parts(self, position: int) -> list[Part]:
        """The documents of a sample.

        Raises:
            DataError: the order has no such sample.
        """
        number, index = self.order.place(position)
        source, table = self._parts[number], self._tables[number]
        row = source.shuffle_index[index]
        (begin, begin_offset), (end, end_offset) = source.sample_index[row], source.sample_index[row + 1]
        found = []
        for place in range(int(begin), int(end) + 1):
            document = int(source.document_index[place])
            start = int(begin_offset) if place == begin else 0
            # The sample's last token is a label only, and the first one of the next sample.
            stop = int(end_offset) + 1 if place == end else int(source.dataset.sequence_lengths[document])
            if stop > start:
                file, line = table.place(document) or (None, None)
                found.append(Part(self.names[number], source.dataset_path, document, start, stop, file, line))
        return found

    def tokens(self, part: Part) -> np.ndarray:
        """Token ids of a part."""
        source = next(s for s in self._parts if s.dataset_path == part.prefix)
        return np.array(source.dataset.get(part.document, offset=part.start, length=part.end - part.start))

    def describe(self, position: int, loss: float, *, documents: int = 4) -> str:
        """A sample in one line of log."""
        parts = self.parts(position)
        more = f" and {len(parts) - documents} more" if len(parts) > documents else ""
        return f"sample {position}, loss {loss:.4f}, source {parts[0].source}: {', '.join(map(str, parts[:documents]))}{more}"


def positions(reading: Reading) -> Iterator[tuple[int, int, int]]:
    """(position, dp rank, micro-batch of that rank) of each sample of a step, rank by rank."""
    config = RunConfig.model_validate(reading.segment.config)
    dp = config.data_parallel_size(reading.segment.world_size)
    for dp_rank in range(dp):
        total = reading.first + reading.count
        sampler = MicroBatchSampler(total, reading.first, config.train.micro_batch_size, dp_rank, dp)
        for turn, micro_batch in enumerate(sampler):
            yield from ((position, dp_rank, turn) for position in micro_batch)


def dp_rank_of(segment: Segment, rank: int) -> int:
    """The data-parallel rank of a global rank; ranks are laid out tp fastest, then cp, dp, pp.

    Raises:
        DataError: the segment ran on fewer ranks.
    """
    if not 0 <= rank < segment.world_size:
        raise DataError(f"rank {rank}: the run had {segment.world_size} ranks at this step")
    config = RunConfig.model_validate(segment.config)
    return rank // (config.parallel.tp * config.parallel.cp) % config.data_parallel_size(segment.world_size)


def badness(loss: float | None) -> float:
    """Sorts losses, the worst first: what is not finite, then the largest, then what is unknown."""
    return math.inf if loss is None else -loss if math.isfinite(loss) else -math.inf


def write_losses(run_dir: Path, rank: int, reading: tuple[int, ...], losses: Sequence[float]) -> None:
    """Note this rank's losses of a step.

    Args:
        reading: step, first sample, data-parallel rank and size, micro-batch size.
        losses: one a sample, in the order of reading.
    """
    folder = RunFolder(run_dir).sample_losses
    folder.mkdir(exist_ok=True)
    record = dict(zip(("step", "first", "dp_rank", "dp", "micro_batch_size"), reading, strict=True))
    append_record(folder / f"rank_{rank:05d}.jsonl", {**record, "losses": [round(loss, 5) for loss in losses]})


def read_losses(run_dir: Path, reading: Reading) -> dict[int, float]:
    """Loss of each sample of a step, by position, as far as they were noted."""
    of_segment = RunConfig.model_validate(reading.segment.config).train.micro_batch_size
    found: dict[int, float] = {}
    mark = f'{{"step": {reading.step}, "first": {reading.first}, '
    for path in sorted(RunFolder(run_dir).sample_losses.glob("rank_*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.startswith(mark):
                    continue
                try:
                    record = json.loads(line)
                except ValueError:  # the run was killed here
                    continue
                total = reading.first + reading.count
                size = record.get("micro_batch_size", of_segment)  # older records do not say
                sampler = MicroBatchSampler(total, reading.first, size, record["dp_rank"], record["dp"])
                read = [position for micro_batch in sampler for position in micro_batch]
                found |= dict(zip(read, record["losses"], strict=False))
    return found


def locate(run_dir: Path, reading: Reading, provenance: Provenance, *, dp_rank: int | None = None) -> list[Sample]:
    """The samples of a step, the worst loss first where losses were noted, else in the order of reading.

    Args:
        dp_rank: only those that this data-parallel rank read.
    """
    losses = read_losses(run_dir, reading)
    samples = [
        Sample(position, rank, turn, losses.get(position), provenance.parts(position))
        for position, rank, turn in positions(reading)
        if dp_rank is None or rank == dp_rank
    ]
    return sorted(samples, key=lambda sample: (badness(sample.loss), sample.position))
