"""What a run reports: the log line, metrics.jsonl, TensorBoard, the loss plot."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from flagscale_like.checkpoint.store import Saved
from flagscale_like.cluster import find_device
from flagscale_like.config import RunConfig
from flagscale_like.data.blend import SourceUse
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.guard import Event

RECENT_STEPS = 100
EVENTS = "events.jsonl"


class Reporter:
    """Writes the same record to the log, to metrics.jsonl and to TensorBoard; on rank 0 only.

    Args:
        resumed_from: step that the run goes on from; later records of an interrupted run are dropped.
        consumed: samples that it goes on from; events found in later ones are dropped. They do not go by the step: what made
            a run go back to an earlier step has to stay.
    """

    def __init__(self, config: RunConfig, ctx: ParallelContext, resumed_from: int, consumed: int = 0) -> None:
        self.config, self.ctx = config, ctx
        self.run_dir = Path(config.run_dir)
        self._done: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)
        self.console = Console(highlight=False, soft_wrap=True) if ctx.is_main else None
        spec = find_device(ctx.platform.describe())
        self.peak_flops = spec.bf16_flops if spec else None
        self._file = self._events = self._board = None
        if ctx.is_main:
            from torch.utils.tensorboard import SummaryWriter

            path = self.run_dir / "metrics.jsonl"
            _keep_until(path, "step", resumed_from)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
            _keep_until(self.run_dir / EVENTS, "consumed-samples", consumed)
            self._events = open(self.run_dir / EVENTS, "a", encoding="utf-8")  # noqa: SIM115
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=resumed_from + 1)

    def say(self, text: str) -> None:
        """One line of log, from rank 0."""
        if self.console:
            self.console.print(text, markup=False)

    def timed(self, consumed: int) -> None:
        """Note that a step is done and how many samples the run has consumed, for the ETA."""
        self._done.append((time.perf_counter(), consumed))

    def seconds_left(self, step: int) -> float:
        """Wall time that the steps after `step` will take at the pace of the last ones.

        The pace is wall time a sample, so that evaluations and saves between steps count, and a batch ramp-up does not
        mislead. The first step of a start, which builds and compiles, is where the clock begins.
        """
        train = self.config.train
        (since, before), (now, consumed) = self._done[0], self._done[-1]
        if consumed == before:
            return 0.0
        left = train.total_samples() - consumed if train.ramp_up else (train.steps - step) * train.global_batch_size
        return (now - since) / (consumed - before) * max(0, left)

    def step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        batch_size: int,
        seconds: float,
        data_wait_s: float,
        consumed: int,
        skipped: int,
    ) -> None:
        """Report a training step; `seconds` and `data_wait_s` are averages over the steps since the last report."""
        train = self.config.train
        tokens_per_s = batch_size * train.seq_length / seconds
        flops = self.config.model.flops_per_token(train.seq_length) * tokens_per_s / self.ctx.world_size
        memory = self.ctx.platform.peak_memory_bytes()
        eta = self.seconds_left(step) if len(self._done) > 1 else (train.steps - step) * seconds
        record: dict[str, Any] = {
            "step": step,
            "lm loss": loss,
            "grad-norm": grad_norm,
            "learning-rate": learning_rate,
            "batch-size": batch_size,
            "world-size": self.ctx.world_size,
            "consumed-samples": consumed,
            "iteration-time": seconds,
            "tokens-per-second": tokens_per_s,
            "throughput/tflops/device": flops / 1e12,
            "mem-peak-bytes": memory,
            "data-wait-share": data_wait_s / seconds,
            "skipped-steps": skipped,
        }
        if self.peak_flops:
            record["mfu"] = flops / self.peak_flops
        self._write(record)
        parts = [
            f"step {step:>{len(str(train.steps))}}/{train.steps}",
            f"loss {loss:.4f}",
            f"lr {learning_rate:.2e}",
            f"grad norm {grad_norm:.3f}",
            f"{tokens_per_s:,.0f} tokens/s",
            f"{flops / 1e12:.3g} TFLOP/s/device",
            *([f"MFU {record['mfu']:.1%}"] if self.peak_flops else []),
            f"mem {memory / 2**30:.2f} GiB",
            f"data {data_wait_s / seconds:.0%}",
            *([f"skipped {skipped}"] if skipped else []),
            f"eta {datetime.timedelta(seconds=round(eta))}",
        ]
        self.say(" | ".join(parts))

    def evaluation(self, step: int, loss: float, by_source: dict[str, float], *, split: str = "validation") -> None:
        """Report the loss on a split, and those of the sources of a blend."""
        name = f"lm loss {split}"
        self._write({"step": step, name: loss, **{f"{name}/{source}": value for source, value in by_source.items()}})
        parts = "".join(f" | {source} {value:.4f}" for source, value in by_source.items())
        self.say(f"step {step} | {split} loss {loss:.4f}{parts}")

    def epochs(self, step: int, used: Sequence[SourceUse]) -> None:
        """Report how often the training data was read."""
        if used:
            self._write({"step": step, **{f"data/epochs/{use.name}": use.epochs for use in used}})
        for use in used:
            self.say(f"data source {use}")

    def offload(self, step: int, counts: dict[str, float]) -> None:
        """Report rank 0's activation offload since the last report."""
        self._write({"step": step, **{f"offload/{name}": value for name, value in counts.items()}})

    def checkpoint(self, saved: Saved) -> None:
        """Report how a save ended."""
        if saved.error:
            self.say(f"step {saved.step} | not saved: {saved.error}; earlier checkpoints are untouched")
            return
        self._write({"step": saved.step, "checkpoint/stall_s": saved.stall_s, "checkpoint/write_s": saved.write_s})
        self.say(
            f"step {saved.step} | saved {saved.path} (waited {saved.stall_s:.2f} s, written in {saved.write_s:.2f} s)"
        )
        for note in saved.notes:
            self.say(f"step {saved.step} | {note}")

    def resilience(self, step: int, record: dict[str, float]) -> None:
        """Report what an interruption cost, once the run goes on; see training.recovery."""
        if not record:
            return
        self._write({"step": step, **record})
        self.say(
            f"step {step} | restart {record['resilience/restarts']:.0f}: {record['resilience/lost-steps']:.0f} steps lost, "
            f"first new step {record['resilience/recovery_s']:.1f} s after the last sign of life, "
            f"ETTR {record['resilience/ettr']:.1%}"
        )

    def health(self, step: int, readings: dict[str, float], events: Sequence[Event], consumed: int) -> None:
        """Report what the monitors measured, and what they found: to the log, to events.jsonl and to TensorBoard."""
        if readings:
            self._write({"step": step, **readings})
        for event in events:
            self.say(f"step {step} | {event.message}")
            if self._events is not None:
                _append(self._events, {"step": step, "consumed-samples": consumed, **dataclasses.asdict(event)})
                self._board.add_scalar(f"event/{event.kind}", event.value, step)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        record = _append(self._file, record)
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush, and draw loss.png."""
        if self._file is not None:
            self._file.close()
            self._events.close()
            self._board.close()
            plot_losses(self.run_dir)


def _append(file: IO[str], record: dict[str, Any]) -> dict[str, Any]:
    """Write a line with the time; returns the record as it was written: NaN is no JSON, and becomes null."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    file.write(json.dumps({**record, "time": datetime.datetime.now(datetime.UTC).isoformat()}) + "\n")
    file.flush()
    return record


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut short by a kill is left out."""
    return read_records(Path(run_dir) / "metrics.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that can be read."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"{path}: an unreadable line was left out", file=sys.stderr)
    return records


def _keep_until(path: Path, key: str, last: int) -> None:
    """Drop the records whose `key` is after `last`: the run that goes on from there writes them anew."""
    if not path.is_file():
        return
    kept = [record for record in read_records(path) if record[key] <= last]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


def plot_losses(run_dir: Path) -> None:
    """Draw loss.png from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run_dir)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, style in (("lm loss", "-"), ("lm loss validation", "o--")):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats/token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(Path(run_dir) / "loss.png", dpi=120)
    plt.close(figure)
