"""Rehearsals as text, JSON and a plot."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flagscale_like.cluster import GIB
from flagscale_like.json_files import write_json
from flagscale_like.planner.memory import CONTEXT_BYTES
from flagscale_like.planner.report import table
from flagscale_like.rehearsal.allocator import EXPANDABLE
from flagscale_like.rehearsal.components import COMPONENTS
from flagscale_like.rehearsal.rehearse import Rehearsed
from flagscale_like.rehearsal.snapshot import write_snapshot

# The planner's components -> the rehearsal's.
PLANNED = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "offload_buffers": "activations",
    "logits": "logits",
    "working": "temporaries",
    "overhead": "overhead",
}
CAUSES = {"synchronize": "waits for all work", "read a number": "reads a number"}


def rehearsed_row(found: Rehearsed) -> dict[str, float]:
    """Bytes at the peak by component. Fragmentation and the device's context are overhead; context is assumed.

    What the allocator keeps in whole segments that nothing uses is left out: it gives them back where the device is full.
    """
    row: dict[str, float] = {name: found.memory.peak.bytes.get(name, 0) for name in COMPONENTS}
    row["temporaries"] += row.pop("buffers")
    # Needed and not in use at its fullest, and what rounding adds.
    row["overhead"] = found.placed.needed - found.memory.peak.total
    if found.limit is not None:
        row["overhead"] += CONTEXT_BYTES
    else:
        row["overhead"] = 0.0
    return row


def planned_row(found: Rehearsed) -> dict[str, float]:
    """The planner's bytes under the same names."""
    row: dict[str, float] = defaultdict(float)
    for name, ours in PLANNED.items():
        row[ours] += getattr(found.planned, name)
    return dict(row)


def describe(found: Rehearsed, *, lines: int = 8) -> str:
    """What a person wants to know of a rank's rehearsal."""
    ours, theirs = rehearsed_row(found), planned_row(found)
    names = [name for name in ours if ours[name] or theirs.get(name)]
    unit, word = (GIB, "GiB") if found.memory.peak.total > GIB else (1 << 20, "MiB")
    rows = [(word, *names, "total")]
    for label, row in (("rehearsed", ours), ("planned", theirs)):
        rows.append((label, *(f"{row.get(n, 0) / unit:.2f}" for n in names), f"{sum(row.values()) / unit:.2f}"))
    record, peak = found.record, found.memory.peak
    events = Counter(event.kind for event in record.step(-1))
    waits = found.waits()
    text = [
        f"rank {record.rank} of {record.world_size}, stage {found.stage}: {len(record.step_starts)} steps in "
        f"{found.seconds:.0f} s here; of the last one {events['compute']:,} kernels, {events['collective']:,} collectives, "
        f"{events['send'] + events['receive']:,} sends and receives",
        table(rows, right=range(1, len(names) + 2)),
        f"at the peak {peak.total / unit:.2f} {word} are in use; the allocator needs {found.placed.needed / unit:.2f} "
        f"({found.placed.fragmentation:.1%} of it never in use at once), and keeps {found.placed.reserved / unit:.2f} if it "
        f"can; with {EXPANDABLE} it needs {found.placed.expandable / unit:.2f}. The largest at the peak:",
        *(f"  {nbytes / unit:8.2f} {word}  {count:4} x {words}" for nbytes, count, words in found.memory.alive[:lines]),
        f"the host waits for the device {sum(waits.values())} times a step{':' if waits else ''}",
        *(f"  {count:4} x {where}: {CAUSES.get(op, op)}" for (where, op), count in waits.most_common()),
    ]
    return "\n".join(text)


def as_json(found: Rehearsed) -> dict[str, Any]:
    """All of it, JSON-able."""
    return {
        "rank": found.record.rank,
        "world_size": found.record.world_size,
        "stage": found.stage,
        "fits": found.fits,
        "seconds": found.seconds,
        "process_bytes": found.process_bytes,
        "peak": {"bytes": found.memory.peak.bytes, "total": found.memory.peak.total},
        "after": found.memory.after,
        "planned": asdict(found.planned),
        "reserved": found.placed.reserved,
        "needed": found.placed.needed,
        "needed_expandable": found.placed.expandable,
        "allocated": found.placed.allocated,
        "activations_by_layer": found.memory.by_layer,
        "alive_at_peak": [{"bytes": b, "count": n, "what": words} for b, n, words in found.memory.alive],
        "host_waits": [{"where": where, "for": op, "count": n} for (where, op), n in found.waits().most_common()],
        "timeline": [{"tick": moment.tick, **moment.bytes} for moment in found.memory.timeline],
    }


def write(found: Rehearsed, folder: Path) -> list[Path]:
    """Write a rank's rehearsal into a folder: memory and waits, the record of events, the snapshot, the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank_{found.record.rank}"
    paths = [folder / f"{name}{ending}" for ending in (".json", ".events.json", ".snapshot.pickle", ".memory.png")]
    write_json(paths[0], as_json(found))
    found.record.write(paths[1])
    write_snapshot(found.overflow or found.placed, paths[2])
    plot([found], paths[3])
    return paths


def plot(all_found: Sequence[Rehearsed], path: Path) -> None:
    """The memory of the last step by component, and the device's limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(all_found), 1, figsize=(9, 3.2 * len(all_found)), layout="constrained", squeeze=False
    )
    for found, ax in zip(all_found, axes[:, 0], strict=True):
        moments = found.memory.timeline
        ticks = [moment.tick for moment in moments]
        values = [[moment.bytes.get(name, 0) / GIB for moment in moments] for name in COMPONENTS]
        ax.stackplot(ticks, values, labels=COMPONENTS, step="post")
        if found.limit is not None:
            ax.axhline(found.limit / GIB, color="tab:red", linestyle="--", label="the device's limit")
        ax.set_title(f"rank {found.record.rank}, stage {found.stage}", fontsize=9)
        ax.set_ylabel("GiB")
        ax.set_xlabel("allocations and freeings of the last step")
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
