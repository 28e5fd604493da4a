"""What a run writes down: the log, metrics.jsonl, events.jsonl, TensorBoard, the loss plot."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from flagscale_like.json_files import dispensable, keep_records, open_records, read_records, records, write_record
from flagscale_like.run_folder import RunFolder
from flagscale_like.training.charts import thinned
from flagscale_like.training.parts import Event, close_all
from flagscale_like.training.plan import Progress
from flagscale_like.training.trackers import Sender

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclasses.dataclass(frozen=True)
class _Files:
    """What rank 0 writes to: metrics.jsonl, events.jsonl and TensorBoard."""

    metrics: IO[bytes]
    events: IO[bytes]
    board: SummaryWriter


class Reporter:
    """Writes the same record to the log, to metrics.jsonl, to TensorBoard and to the trackers; on rank 0 only.

    Use it in a `with` block: its files are closed and the plot is drawn however the run ends.

    Attributes:
        trackers: they get every number, too.

    Args:
        progress: where the run goes on from. Records of later steps, of an interrupted run, are dropped, and events that were
            found in later samples. They do not go by the step: what made a run go back to an earlier step has to stay.
        is_main: whether this is rank 0; the others' reporters do nothing.
    """

    def __init__(self, folder: RunFolder, progress: Progress, *, is_main: bool) -> None:
        self.folder = folder
        self.console = Console(highlight=False, soft_wrap=True) if is_main else None
        self._files: _Files | None = None
        self.trackers: Sequence[Sender] = ()
        if is_main:
            from torch.utils.tensorboard import SummaryWriter

            keep_records(folder.metrics, "step", progress.step, in_order="iteration-time")
            keep_records(folder.events, "consumed-samples", progress.consumed)
            metrics, events = open_records(folder.metrics), open_records(folder.events)
            self._files = _Files(metrics, events, SummaryWriter(str(folder.tensorboard), purge_step=progress.step + 1))

    def say(self, text: str) -> None:
        """One line of log, from rank 0."""
        if self.console:
            self.console.print(text, markup=False)

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        """One record of a step."""
        files = self._files
        if files is None or not values:
            return
        with dispensable(self.folder.metrics):
            write_record(files.metrics, {"step": step, **values, "time": _now()})
        with dispensable(self.folder.tensorboard):
            for name, value in values.items():
                if isinstance(value, int | float):
                    files.board.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.numbers(step, values)

    def event(self, step: int, consumed: int, event: Event) -> None:
        """What a monitor found, to the log, to events.jsonl and to TensorBoard."""
        self.say(f"step {step} | {event.message}")
        if (files := self._files) is not None:
            found = dataclasses.asdict(event)
            with dispensable(self.folder.events):
                write_record(files.events, {"step": step, "consumed-samples": consumed, **found, "time": _now()})
            with dispensable(self.folder.tensorboard):
                files.board.add_scalar(f"event/{event.kind}", event.value, step)
            for tracker in self.trackers:
                tracker.numbers(step, {f"event/{event.kind}": event.value})

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if (files := self._files) is not None:
            folder, plot = self.folder, functools.partial(plot_losses, self.folder.root)
            closings = {
                folder.metrics: files.metrics.close,
                folder.events: files.events.close,
                folder.tensorboard: files.board.close,
                folder.loss_plot: plot,
            }
            closers = [functools.partial(_close, path, close) for path, close in closings.items()]
            close_all([*closers, *(functools.partial(tracker.close, error) for tracker in self.trackers)], error)


def _close(path: Path, close: Callable[[], object]) -> None:
    with dispensable(path):
        close()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut short by a kill is left out."""
    return read_records(RunFolder(run_dir).metrics)


def loss_name(records: Iterable[Mapping[str, Any]]) -> str:
    """What a run's records call the loss that it trains on: the first number of a step's record."""
    for record in records:
        if "iteration-time" in record:
            return next(name for name in record if name != "step")
    return "lm loss"


MOST_SOURCES = 6  # more lines in one plot tell nothing
KEPT = "kept-time"  # seconds of all steps until here, without those that a rewind or a restart gave up
MEAN = "/mean"  # what the name of a loss has where it is the mean over the steps since the last record


class LossCurve:
    """(step, loss) of the records that come: the mean since the record before.

    The first step of a resumed run is recorded out of turn and has no mean: it is left out. Runs of a version that recorded
    no mean have the single step's loss, and show that.
    """

    def __init__(self, name: str) -> None:
        self.name, self.points = name, list[tuple[float, float]]()
        self._has_means = False

    def add(self, record: Mapping[str, Any]) -> None:
        """One record of metrics.jsonl, in the file's order."""
        self._has_means |= self.name + MEAN in record
        value = record.get(self.name + MEAN if self._has_means else self.name)
        if value is not None and math.isfinite(value):
            self.points.append((record["step"], value))


def loss_curve(records: Iterable[Mapping[str, Any]], name: str = "lm loss") -> list[tuple[float, float]]:
    """The points of a LossCurve of these records."""
    curve = LossCurve(name)
    for record in records:
        curve.add(record)
    return curve.points


def plot_losses(run_dir: Path) -> None:
    """Draw loss.png from metrics.jsonl: the training loss as the mean between two records, and the validation loss.

    With several sources the validation loss of each is a thin line. Dotted vertical lines are where the run resumed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = RunFolder(run_dir).metrics
    loss = loss_name(records(path))
    validation = f"{loss} validation"
    curves = {loss: LossCurve(loss), validation: LossCurve(validation)}
    for record in records(path):  # of a long run the curves alone are kept
        for name in record:
            if name in curves or name.startswith(f"{validation}/"):
                curves.setdefault(name, LossCurve(name)).add(record)
    sources = sorted(curves.keys() - {loss, validation})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    lines = [(loss, "-", 1.5), (validation, "o--", 1.5)]
    lines += [(name, ".:", 0.8) for name in sources if len(sources) <= MOST_SOURCES]
    for name, style, width in lines:
        if points := thinned(curves[name].points):
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=width)
    starts = [
        r["step"] for r in read_records(RunFolder(run_dir).resilience) if r.get("event") == "start" and "step" in r
    ]
    for number, step in enumerate(sorted({step for step in starts if step > 0})):
        axes.axvline(step, color="gray", linestyle=":", linewidth=0.8, label=None if number else "resumed")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats/token)" if loss == "lm loss" else loss)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(RunFolder(run_dir).loss_plot, dpi=120)
    plt.close(figure)
