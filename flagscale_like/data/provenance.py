"""Provenance: finds the samples that a training step read, their documents, and the source file and line of each document.

The order of the samples depends on the configuration and on the number of planned samples. Which samples a step reads depends
on the number of samples consumed before it. RUN_DIR/samples.jsonl records both at each start of the run and at each rewind;
each checkpoint records them, too. At steps that are logged and at steps whose update is skipped, the ranks of the last
pipeline stage write the loss of each sample to RUN_DIR/sample_losses/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from flagscale_like.config import RunConfig
from flagscale_like.data.blend import AnySource, Blend, IndexCache, build_split, index_folder, source_mark
from flagscale_like.data.draws import DrawnOrder, DrawState
from flagscale_like.data.pretrain import each_source
from flagscale_like.data.sampler import MicroBatchSampler
from flagscale_like.data.selection import Mixture
from flagscale_like.data.table import DocumentTable
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError
from flagscale_like.figures import fixed
from flagscale_like.json_files import BAD_VALUES, append_record, read_records
from flagscale_like.run_folder import RunFolder

STATE = "a checkpoint's state.json"
LARGEST = 2**53  # of the numbers in a record: what JSON programs agree on


def _in_one_line(error: Exception) -> str:
    """What is wrong with a record, as one line: of pydantic's list, the first."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"config.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Segment:
    """A part of a run without a restart or a rewind.

    Attributes:
        event: `start`: the run started or resumed at `step`. `rewind`: the run went from a later step back to `step` and
            skipped the samples before `consumed`. `gap`: the next segment does not follow from this one, because a rewind
            between them is not recorded.
        step: steps done when the segment begins.
        consumed: samples consumed when the segment begins.
        train_samples: samples that the run planned; the order of the samples depends on it.
        world_size: number of ranks.
        config: the run's configuration.
        marks: `blend.source_mark` of each source; None if they were not recorded.
    """

    event: str
    step: int
    consumed: int
    train_samples: int
    world_size: int
    config: RunConfig
    marks: list[str] | None = None

    @classmethod
    def read(cls, record: Mapping[str, Any], where: Path | str) -> Segment:
        """The segment that a record of samples.jsonl, or what a checkpoint says, describes.

        Args:
            where: names the record in the error.

        Raises:
            DataError: the record lacks something, or it is not valid.
        """
        try:
            numbers = {name: int(record[name]) for name in ("step", "consumed", "train_samples", "world_size")}
            if min(numbers.values()) < 0 or max(numbers.values()) > LARGEST or numbers["world_size"] < 1:
                raise ValueError(f"numbers out of range: {numbers}")
            config = RunConfig.model_validate(record["config"])
            config.data_parallel_size(numbers["world_size"])
            marks = record.get("marks")
            if not (marks is None or (isinstance(marks, list) and len(marks) == len(config.data.sources))):
                raise ValueError("marks is not a list with an entry for each source")
            return cls(event=str(record["event"]), **numbers, config=config, marks=marks)
        except BAD_VALUES as error:
            raise DataError(f"{where}: does not say which samples were read: {_in_one_line(error)}") from None

    def append_to(self, run_dir: Path) -> None:
        """Append this segment to RUN_DIR/samples.jsonl."""
        append_record(RunFolder(run_dir).samples, vars(self) | {"config": self.config.model_dump(mode="json")})


@dataclass(frozen=True)
class Reading:
    """The samples that a step read: [first, first + count) in the segment's order of samples."""

    step: int
    first: int
    count: int
    segment: Segment


@dataclass(frozen=True)
class Part:
    """The tokens [start, end) of a document, which are part of a sample.

    Attributes:
        source: the name of the data source.
        prefix: the path of the source's .bin/.idx without the suffix.
        document: the number of the document in the source.
        file, line: where the document comes from; None if the source has no document table.
    """

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
        position: the number of the sample in the order of the run.
        dp_rank: the data-parallel rank that read the sample.
        micro_batch: the micro-batch of that rank which contained the sample, from 0.
        loss: the mean loss over the sample's tokens, in nats; None if it was not recorded.
        parts: the parts of documents that the sample consists of, in the order of its tokens.
    """

    position: int
    dp_rank: int
    micro_batch: int
    loss: float | None
    parts: list[Part]


def read_journal(run_dir: Path) -> list[Segment]:
    """Read the segments of a run, in chronological order. A line that a kill truncated is skipped.

    Raises:
        DataError: a record is not a segment.
    """
    path = RunFolder(run_dir).samples
    return [Segment.read(record, f"{path}, record {n}") for n, record in enumerate(read_records(path), 1)]


def segments_of_states(states: Iterable[dict[str, Any]]) -> list[Segment]:
    """Derive the segments of a run from its checkpoints alone, in chronological order.

    A segment for the beginning of the run is added if the first checkpoint's consumed samples agree with a start from 0.

    Args:
        states: the content of each checkpoint's state.json.

    Raises:
        DataError: a state lacks the step, the consumed samples, the planned samples, the layout or the configuration.
    """
    found = [Segment.read(_record_of(state), STATE) for state in states]
    found.sort(key=lambda segment: segment.step)
    if found:
        first = found[0]
        beginning = Segment("start", 0, 0, first.train_samples, first.world_size, first.config)
        found = ([beginning] if _consumed_at(beginning, first.step) == first.consumed else []) + found
    for before, after in zip(found[:-1], found[1:], strict=True):
        if _consumed_at(before, after.step) != after.consumed:
            found[found.index(before)] = replace(before, event="gap")
    return found


def _record_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a segment that begins at a checkpoint, from its state.json."""
    layout = state.get("layout")
    degrees = [layout.get(name, 1) for name in ("tp", "pp", "dp", "cp")] if isinstance(layout, dict) else []
    return {
        "event": "start",
        "step": state.get("step"),
        "consumed": state.get("consumed_samples"),
        "train_samples": state.get("train_samples"),
        "world_size": math.prod(degrees) if degrees and all(isinstance(n, int) for n in degrees) else None,
        "config": state.get("config"),
    }


def _consumed_at(segment: Segment, step: int) -> int:
    """Samples consumed after `step`, if the run continues from the segment without a rewind."""
    return segment.config.train.consumed_after(segment.consumed, max(0, step - segment.step))


def readings_of(segments: Sequence[Segment], step: int) -> list[Reading]:
    """The samples that a step read, one reading for each time that the step ran, in chronological order.

    A step runs again after a rewind. The last reading is the one that the trained model results from.

    Raises:
        DataError: the segments do not say which samples the step read.
    """
    found: list[Reading] = []
    for number, segment in enumerate(segments):
        following = segments[number + 1] if number + 1 < len(segments) else None
        if step <= segment.step:
            continue
        first = _consumed_at(segment, step - 1)
        count = segment.config.train.batch_size_at(first)
        if following is not None and step > following.step:
            # The step ran before the rewind to `following`. Or the run was killed and resumed, and the step ran again on
            # the same samples: then the following segment gives its reading.
            if following.event != "rewind" or first + count > following.consumed:
                continue
        elif segment.event == "gap" and following is not None:
            raise DataError(
                f"between the checkpoints of steps {segment.step} and {following.step} the run rewound: which samples step "
                f"{step} read is known from the run's samples.jsonl only: restore that file"
            )
        reading = Reading(step, first, count, segment)
        if not found or (found[-1].first, found[-1].count) != (first, count):
            found.append(reading)
        else:
            found[-1] = reading
    if not found:
        where = f"the records begin after step {segments[0].step}" if segments else "there are no records"
        raise DataError(f"step {step}: the run's records do not say which samples it read ({where})")
    return found


def draws_of_states(states: Iterable[dict[str, Any]]) -> list[DrawState]:
    """The draw states of dynamic selection that checkpoints hold. Each covers the samples up to the next change of weights.

    Args:
        states: the content of each checkpoint's state.json.

    Raises:
        DataError: a state is not one.
    """
    read = [(Segment.read(_record_of(state), STATE), state) for state in states]
    found = []
    for segment, state in sorted(read, key=lambda pair: pair[0].consumed):
        data, train = segment.config.data, segment.config.train
        if data.selection is None or "selection" not in state:
            continue
        mixture = Mixture(data.selection, [source.weight for source in data.sources])
        try:
            mixture.load(state["selection"])
            found.append(mixture.draw_state(segment.consumed, train))
        except BAD_VALUES as error:
            raise DataError(f"{STATE}: has no state of data.selection: {_in_one_line(error)}") from None
    return found


def open_order(segment: Segment, draws: Sequence[DrawState] = ()) -> AnySource | Blend | DrawnOrder:
    """Open the training samples in a segment's order, from the run's sample index. A missing index is built in memory.

    Args:
        draws: the draw states of a run with dynamic selection.

    Raises:
        DataError: a source or the tokenizer is missing, or a source was changed after the run read it.
    """
    config = segment.config
    if not config.data.sources:
        raise DataError("the run has no data sources: data.synthetic makes its samples from random numbers")
    for number, source in enumerate(config.data.sources):
        for suffix in (".bin", ".idx"):
            if not Path(source.path + suffix).is_file():
                raise DataError(
                    f"data source {source.path}: {source.path}{suffix} is missing: call the command in the folder where the "
                    "run was started"
                )
        if segment.marks is not None and source_mark(source.path) != segment.marks[number]:
            raise DataError(f"data source {source.path}: has changed since the run read it: restore its .bin and .idx")
    if config.data.selection is None:
        return _open_split(config, segment.train_samples)
    parts = [part for one in each_source(config) for part in _open_split(one, segment.train_samples).parts]
    return DrawnOrder(parts, draws)


def _open_split(config: RunConfig, samples: int) -> AnySource | Blend:
    tokenizer = Tokenizer(config.data.required_tokenizer)
    try:
        return build_split(config, tokenizer, "train", samples, IndexCache(index_folder(config), may_build=False))
    except DataError:
        return build_split(config, tokenizer, "train", samples, IndexCache(None, may_build=True))


class Provenance:
    """Looks up the documents of samples.

    Args:
        order: the training dataset of a running job, or what `open_order` returns.
        names: the name of each source in reports.
    """

    def __init__(self, order: AnySource | Blend | DrawnOrder, names: Sequence[str]) -> None:
        self.order, self.names, self._parts = order, names, order.parts
        self.tables = [DocumentTable(part.dataset_path) for part in self._parts]

    def parts(self, position: int) -> list[Part]:
        """Return the parts of documents that a sample consists of.

        Raises:
            DataError: the order has no sample at this position.
        """
        number, index = self.order.place(position)
        source, table = self._parts[number], self.tables[number]
        found = []
        for document, start, stop in source.pieces(index):
            file, line = table.place(document) or (None, None)
            found.append(Part(self.names[number], source.dataset_path, document, start, stop, file, line))
        return found

    def tokens(self, part: Part) -> np.ndarray:
        """Return the token ids of a part."""
        source = next(s for s in self._parts if s.dataset_path == part.prefix)
        return np.array(source.dataset.get(part.document, offset=part.start, length=part.end - part.start))

    def describe(self, position: int, loss: float, *, documents: int = 4) -> str:
        """Describe a sample in one line for the log, with the places of its first `documents` documents."""
        parts = self.parts(position)
        more = f" and {len(parts) - documents} more" if len(parts) > documents else ""
        shown = ", ".join(map(str, parts[:documents]))
        return f"sample {position}, loss {fixed(loss)}, source {parts[0].source}: {shown}{more}"


def positions(reading: Reading) -> Iterator[tuple[int, int, int]]:
    """Yield (position, data-parallel rank, micro-batch of that rank) of each sample of a step, rank by rank."""
    config = reading.segment.config
    dp = config.data_parallel_size(reading.segment.world_size)
    for dp_rank in range(dp):
        total = reading.first + reading.count
        sampler = MicroBatchSampler(total, reading.first, config.train.micro_batch_size, dp_rank, dp)
        for turn, micro_batch in enumerate(sampler):
            yield from ((position, dp_rank, turn) for position in micro_batch)


def dp_rank_of(segment: Segment, rank: int) -> int:
    """The data-parallel rank of a global rank. megatron-core numbers ranks with tp fastest, then cp, dp, pp.

    Raises:
        DataError: the segment had fewer ranks.
    """
    if not 0 <= rank < segment.world_size:
        raise DataError(f"rank {rank}: the run had {segment.world_size} ranks at this step")
    config = segment.config
    return rank // (config.parallel.tp * config.parallel.cp) % config.data_parallel_size(segment.world_size)


def badness(loss: float | None) -> float:
    """A sort key that puts the worst loss first: non-finite losses, then larger ones before smaller ones, then None."""
    return math.inf if loss is None else -loss if math.isfinite(loss) else -math.inf


def write_losses(run_dir: Path, rank: int, reading: tuple[int, ...], losses: Sequence[float]) -> None:
    """Append this rank's losses of one step to RUN_DIR/sample_losses/rank_RANK.jsonl.

    Args:
        reading: step, first sample of the step, data-parallel rank, data-parallel size, micro-batch size.
        losses: the mean loss of each sample that this rank read, in the order of reading.
    """
    folder = RunFolder(run_dir).sample_losses
    folder.mkdir(exist_ok=True)
    record = dict(zip(("step", "first", "dp_rank", "dp", "micro_batch_size"), reading, strict=True))
    append_record(folder / f"rank_{rank:05d}.jsonl", {**record, "losses": [round(loss, 5) for loss in losses]})


def read_losses(run_dir: Path, reading: Reading) -> dict[int, float]:
    """Read the recorded losses of a step's samples, as a mapping from position to loss."""
    of_segment = reading.segment.config.train.micro_batch_size
    found: dict[int, float] = {}
    mark = f'{{"step": {reading.step}, "first": {reading.first}, '
    for path in sorted(RunFolder(run_dir).sample_losses.glob("rank_*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.startswith(mark):
                    continue
                try:
                    record = json.loads(line)
                except ValueError:  # a kill truncated the line
                    continue
                total = reading.first + reading.count
                size = record.get("micro_batch_size", of_segment)  # records of earlier versions lack it
                sampler = MicroBatchSampler(total, reading.first, size, record["dp_rank"], record["dp"])
                read = [position for micro_batch in sampler for position in micro_batch]
                found |= dict(zip(read, record["losses"], strict=False))
    return found


def locate(run_dir: Path, reading: Reading, provenance: Provenance, *, dp_rank: int | None = None) -> list[Sample]:
    """The samples of a step with their documents, sorted by loss, the worst first. Samples without a loss come last.

    Args:
        dp_rank: return only the samples that this data-parallel rank read; None returns all.
    """
    losses = read_losses(run_dir, reading)
    samples = [
        Sample(position, rank, turn, losses.get(position), provenance.parts(position))
        for position, rank, turn in positions(reading)
        if dp_rank is None or rank == dp_rank
    ]
    return sorted(samples, key=lambda sample: (badness(sample.loss), sample.position))
