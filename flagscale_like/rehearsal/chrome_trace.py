"""A timeline as a Chrome trace for ui.perfetto.dev or chrome://tracing: a process for each stage, a row for each stream."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flagscale_like.errors import ConfigError
from flagscale_like.rehearsal.replay import Slice, Timeline

GAP_S = 1e-9  # slices that lie closer are one after the other


def trace_events(timeline: Timeline, stages: Mapping[int, int], *, kernels: bool = False) -> Iterator[dict[str, Any]]:
    """The events of a trace, times in microseconds.

    Args:
        stages: rank -> its pipeline stage.
        kernels: a slice for each kernel; otherwise kernels of one part of the step that follow one another are one slice.
    """
    rows: dict[tuple[int, str], list[Slice]] = {}
    for one in timeline.slices:
        rows.setdefault((one.rank, one.row), []).append(one)
    numbers = {
        row: i for i, row in enumerate(sorted({row for _, row in rows}, key=lambda row: (row != "compute", row)))
    }
    for rank in sorted({rank for rank, _ in rows}, key=lambda rank: (stages.get(rank, 0), rank)):
        name = f"stage {stages.get(rank, 0)} (rank {rank})"
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": stages.get(rank, 0)}}
    for (rank, row), own in sorted(rows.items()):
        yield {"ph": "M", "pid": rank, "tid": numbers[row], "name": "thread_name", "args": {"name": row}}
        own.sort(key=lambda one: one.start)
        for one in own if kernels else _merged(own):
            yield {
                "ph": "X",
                "pid": rank,
                "tid": numbers[row],
                "name": one.name,
                "ts": one.start * 1e6,
                "dur": (one.end - one.start) * 1e6,
                "args": {"where": one.where},
            }


def _merged(slices: list[Slice]) -> Iterator[Slice]:
    """Slices of one part of the step that follow one another, as one."""
    held: Slice | None = None
    for one in slices:
        part, kernel, _ = one.name.partition(": ")
        own = Slice(one.rank, one.row, part, one.start, one.end, one.where)
        if held is not None and kernel and held.name == part and own.start - held.end < GAP_S:
            held = Slice(held.rank, held.row, part, held.start, own.end, held.where)
            continue
        if held is not None:
            yield held
        held = own
    if held is not None:
        yield held


def write_trace(path: Path, timeline: Timeline, stages: Mapping[int, int], *, kernels: bool = False) -> int:
    """Write a trace, compressed where the name ends in .gz; returns how many slices it has.

    Raises:
        ConfigError: it cannot be written.
    """
    events = list(trace_events(timeline, stages, kernels=kernels))
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    data = text.encode()
    try:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    return sum(event["ph"] == "X" for event in events)
