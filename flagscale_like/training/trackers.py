"""Experiment trackers: every number of a run goes to Weights & Biases or MLflow, through their own clients.

A thread loads the client and sends, so that training waits for no network. A tracker that fails is told once and left out
for a while; metrics.jsonl has every number. RUN_DIR/trackers.json has the trackers' names of the run, by which a resumed
run goes on in them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import queue
import re
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flagscale_like.config import Logging, Mlflow, RunConfig, Wandb
from flagscale_like.errors import PlatformError
from flagscale_like.json_files import BAD_JSON, dispensable, write_json
from flagscale_like.run_folder import RunFolder

Say = Callable[[str], None]
Record = tuple[int, dict[str, float], int]  # step, numbers, Unix time in milliseconds

PAUSE_S = 300.0  # after a failure, before the next try
CLOSE_S = 30.0  # that the end of a run waits for what is still to be sent
MOST_WAITING = 10_000  # records; more are lost
MOST_PARAMS = 100  # of one call to MLflow
LONGEST_PARAM = 500


def check_trackers(logging: Logging) -> None:
    """Check that the clients of the trackers are installed.

    Raises:
        PlatformError: one is not.
    """
    for name in ("wandb", "mlflow"):
        if getattr(logging, name) is not None and importlib.util.find_spec(name) is None:
            raise PlatformError(
                f"logging.{name}: the package {name} is not installed: pip install 'flagscale_like[{name}]', or leave "
                "the group out"
            )


def make_trackers(config: RunConfig, say: Say) -> list[Sender]:
    """The trackers that the configuration names, each with its thread. Rank 0 calls it.

    Args:
        say: takes a line of log.
    """
    logging, found = config.logging, []
    if logging.wandb is not None:
        found.append(Sender(WandbTracker(logging.wandb, config), say))
    if logging.mlflow is not None:
        found.append(Sender(MlflowTracker(logging.mlflow, config), say))
    return found


class Tracker(ABC):
    """One tracker's client. Its thread alone calls it."""

    name: str

    def __init__(self, config: RunConfig) -> None:
        self.config, self._path = config, RunFolder(config.run_dir).trackers

    @abstractmethod
    def open(self) -> str:
        """Begin the tracker's run, or go on in it; returns where it is."""

    @abstractmethod
    def send(self, record: Record) -> None:
        """Add the numbers of a step."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """End the run."""

    def known_run(self) -> str | None:
        """What the tracker calls the run that an earlier start began; None if there is none."""
        return self._names().get(self.name)

    def remember(self, run: str) -> None:
        """Record what the tracker calls the run."""
        with dispensable(self._path):
            write_json(self._path, self._names() | {self.name: run})

    def _names(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, *BAD_JSON):
            return {}
        return found if isinstance(found, dict) else {}


class WandbTracker(Tracker):
    """Weights & Biases. Steps are a number like the others, so that a run that goes back can log a step again."""

    name = "wandb"

    def __init__(self, options: Wandb, config: RunConfig) -> None:
        super().__init__(config)
        self.options = options
        self._run: Any = None  # wandb's own, from open() on

    def open(self) -> str:
        wandb, options = importlib.import_module("wandb"), self.options
        run_id = self.known_run() or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            project=options.project,
            entity=options.entity,
            name=options.name or Path(self.config.run_dir).name,
            group=options.group,
            tags=options.tags,
            mode=options.mode,
            dir=self.config.run_dir,
            config=self.config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.remember(run_id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.url) if options.mode == "online" else f"{self._run.dir} (offline)"

    def send(self, record: Record) -> None:
        step, values, _ = record
        self._run.log({"step": step, **values})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowTracker(Tracker):
    """MLflow. The configuration's keys are the run's parameters."""

    name = "mlflow"

    def __init__(self, options: Mlflow, config: RunConfig) -> None:
        super().__init__(config)
        self.options, self._run = options, ""
        self._mlflow: Any = None  # the package, from open() on

    def open(self) -> str:
        self._mlflow, options = importlib.import_module("mlflow"), self.options
        self._client = self._mlflow.MlflowClient(tracking_uri=options.tracking_uri)
        known = self.known_run()
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._run = known
        else:
            found = self._client.get_experiment_by_name(options.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(options.experiment)
            name = options.name or Path(self.config.run_dir).name
            self._run = self._client.create_run(experiment, run_name=name).info.run_id
            self.remember(self._run)
            self._log_parameters()
        where = options.tracking_uri or self._mlflow.get_tracking_uri()
        return f"run {self._run} of experiment {options.experiment} at {where}"

    def send(self, record: Record) -> None:
        step, values, time_ms = record
        metric = self._mlflow.entities.Metric
        metrics = [metric(_mlflow_name(name), value, time_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")

    def _log_parameters(self) -> None:
        parameter = self._mlflow.entities.Param
        flat = [(_mlflow_name(key), str(value)) for key, value in _flat(self.config.model_dump(mode="json"))]
        params = [parameter(key, value[:LONGEST_PARAM]) for key, value in flat]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + MOST_PARAMS])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _mlflow_name(name: str) -> str:
    """A name as MLflow takes it: letters, digits, and _ - . : and blanks.

    It takes / as well, but its store of files makes folders of it, and then `loss` and `loss/mean` exclude each other.
    """
    return re.sub(r"[^\w\-. :]", "_", name.replace("/", "."))


class Sender:
    """Sends numbers to a tracker from a thread of its own."""

    def __init__(self, tracker: Tracker, say: Say) -> None:
        self._tracker, self._say = tracker, say
        self._waiting: queue.Queue[Record | None] = queue.Queue(MOST_WAITING)
        self._failed, self._told, self._next_try, self._is_open = False, False, 0.0, False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        """Have the finite numbers of a step sent; returns at once."""
        finite = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        try:
            self._waiting.put_nowait((step, finite, int(time.time() * 1000)))
        except queue.Full:
            self._tell("it takes numbers more slowly than they come")

    def close(self, error: BaseException | None) -> None:
        """Send what waits, and end the tracker's run, within CLOSE_S seconds.

        Args:
            error: what ended the training run; None where it ended by itself.
        """
        self._failed = error is not None
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(timeout=CLOSE_S)
        if self._thread.is_alive():
            self._tell(f"it is not done {CLOSE_S:.0f} s after the end of the run")

    def _work(self) -> None:
        self._try(self._open)
        while (record := self._waiting.get()) is not None:
            if not self._is_open:
                self._try(self._open)
            if self._is_open:
                self._try(lambda record=record: self._tracker.send(record))
        if self._is_open:
            self._next_try = 0.0
            self._try(lambda: self._tracker.close(failed=self._failed))

    def _open(self) -> None:
        where = self._tracker.open()
        self._is_open = True
        self._say(f"logging.{self._tracker.name}: {where}")

    def _try(self, work: Callable[[], None]) -> None:
        """Do something with the tracker, unless it has just failed."""
        if time.monotonic() < self._next_try:
            return
        try:
            work()
        except Exception as problem:  # a client may raise anything, and the run does not depend on it
            self._next_try = time.monotonic() + PAUSE_S
            self._tell(f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}")

    def _tell(self, cause: str) -> None:
        if not self._told:
            self._told = True
            self._say(
                f"warning: logging.{self._tracker.name}: {cause}. Training goes on; metrics.jsonl has every number, and the "
                "tracker lacks some"
            )
