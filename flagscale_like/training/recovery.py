"""What interruptions cost a run: restarts, steps lost, recovery time, ETTR.

RUN_DIR/resilience.jsonl holds a line for each start and each orderly stop. A start that follows a start is a restart: the
run was killed in between, and its time since the last step on record is lost. Steps made and kept are in metrics.jsonl.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flagscale_like.errors import DivergedError
from flagscale_like.json_files import append_record, read_records, records_backwards
from flagscale_like.run_folder import RunFolder
from flagscale_like.training.metrics import KEPT, read_metrics
from flagscale_like.training.parts import Part, Report, Step


@dataclass(frozen=True)
class Interruption:
    """What the last interruption cost; of a run that goes on after an orderly stop, nothing.

    Attributes:
        lost_steps: steps on record that have to be made again.
        down_since: Unix time of the last sign of life before it.
    """

    restarts: int
    lost_steps: int
    down_since: float


class Ledger(Part):
    """The record of a run's starts and stops, on rank 0. Made before the metrics are cut back to the step resumed from.

    A stop that the run itself decided on is orderly: it is done, was asked to stop, or its guard stopped it. What follows any
    other end is a restart.

    Args:
        step: step that the run goes on from.
        now: the clock, Unix time.
    """

    def __init__(self, run_dir: Path, step: int, *, now: Callable[[], float] = time.time) -> None:
        self.path, self.run_dir, self._now = RunFolder(run_dir).resilience, Path(run_dir), now
        self._step = step
        self.events = read_ledger(run_dir)
        self.interruption: Interruption | None = None
        if self.events and self.events[-1]["event"] != "stop":
            last = last_step(self.run_dir)
            alive = max(self.events[-1]["time"], _unix(last["time"]) if last else 0.0)
            self.interruption = Interruption(
                self.restarts() + 1, max(0, last["step"] - step) if last else 0, down_since=alive
            )
        lost = self.interruption.lost_steps if self.interruption else 0
        self._append("start", step, lost_steps=lost)

    def restarts(self) -> int:
        """Starts that followed no orderly stop."""
        names = [event["event"] for event in self.events]
        return sum(a == b == "start" for a, b in itertools.pairwise(names))

    def recovered(self) -> dict[str, float]:
        """The record of an interruption, to be asked for when the first new step is done; empty where there was none."""
        found = self.interruption
        if found is None:
            return {}
        self.interruption = None
        return {
            "resilience/restarts": found.restarts,
            "resilience/lost-steps": found.lost_steps,
            "resilience/recovery_s": self._now() - found.down_since,
            "resilience/ettr": effective_time_ratio(_counted(self.run_dir), read_ledger(self.run_dir), self._now()),
        }

    def after(self, step: Step, report: Report) -> None:
        """Report what an interruption cost, once the first new step is done."""
        self._step = step.plan.step
        record = self.recovered()
        if record:
            report.numbers(step.plan.step, record)
            report.say(
                f"step {step.plan.step} | restart {record['resilience/restarts']:.0f}: "
                f"{record['resilience/lost-steps']:.0f} steps lost, first new step {record['resilience/recovery_s']:.1f} s "
                f"after the last sign of life, ETTR {record['resilience/ettr']:.1%}"
            )

    def close(self, error: BaseException | None) -> None:
        """Note an orderly end."""
        if error is None or isinstance(error, DivergedError):
            self._append("stop", self._step)

    def _append(self, name: str, step: int, **more: int) -> None:
        event: dict[str, Any] = {"event": name, "time": self._now(), "step": step, **more}
        self.events.append(event)
        append_record(self.path, event)


def last_step(run_dir: Path) -> dict[str, Any] | None:
    """The last record of a step in metrics.jsonl, which is read from its end."""
    records = (record for _, record in records_backwards(RunFolder(run_dir).metrics))
    return next((record for record in records if "iteration-time" in record), None)


def _counted(run_dir: Path) -> list[dict[str, Any]]:
    """The record that says how long all kept steps took; all records of a run that an earlier version began."""
    last = last_step(run_dir)
    return [last] if last is not None and KEPT in last else read_metrics(run_dir)


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The starts and stops of a run that are on record: event, time, step."""
    return [r for r in read_records(RunFolder(run_dir).resilience) if {"event", "time", "step"} <= r.keys()]


def effective_time_ratio(
    records: Iterable[Mapping[str, Any]], ledger: Iterable[Mapping[str, Any]], now: float
) -> float:
    """Effective training time ratio (ETTR): time of the steps that were kept, over the time since the run was started.

    Time after an orderly stop is not counted; saving, evaluating, starting, and steps made twice are lost time.

    Args:
        records: of metrics.jsonl; where the last one says how long all kept steps took, it is enough.
        ledger: see read_ledger().
        now: Unix time, where the run has not stopped yet.
    """
    told, kept_s = False, 0.0
    kept: list[tuple[int, float]] = []  # (step, time of it and of those since the record before)
    for record in records:
        if "iteration-time" in record:
            told = KEPT in record
            kept_s = record.get(KEPT, 0.0)
            while kept and kept[-1][0] >= record["step"]:  # the run went back: these were given up
                kept.pop()
            steps = record["step"] - (kept[-1][0] if kept else 0)
            kept.append((record["step"], steps * record["iteration-time"]))
    wall, started = 0.0, None
    for event in ledger:
        if event["event"] == "stop" and started is not None:
            wall += event["time"] - started
            started = None
        elif started is None:
            started = event["time"]
    wall += now - started if started is not None else 0.0
    kept_s = kept_s if told else sum(seconds for _, seconds in kept)
    return min(1.0, kept_s / wall) if wall > 0 else 1.0


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
