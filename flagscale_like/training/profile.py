"""A torch profiler trace of some steps, written where Perfetto and chrome://tracing can open it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from flagscale_like.config import RunConfig
from flagscale_like.runtime.parallel import ParallelContext


class StepProfiler:
    """Records `train.profile.steps` (first and last, both recorded) to RUN_DIR/profile/rank_00000.json.gz on every rank.

    Where nothing is configured, begin() and end() do nothing. A run that ends inside the range writes what it has.
    """

    def __init__(self, config: RunConfig, ctx: ParallelContext) -> None:
        self._range = config.train.profile.steps if config.train.profile else None
        self._path = Path(config.run_dir) / "profile" / f"rank_{ctx.rank:05d}.json.gz"
        self._device_activity = ctx.platform.profiler_activity
        self._profiler: Any = None

    def begin(self, step: int) -> None:
        """Before step `step`, counted from 1."""
        if self._range is None or self._profiler is not None or not self._range[0] <= step <= self._range[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device_activity is not None:
            activities.append(self._device_activity)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.__enter__()

    def end(self, step: int) -> None:
        """After step `step`."""
        if self._profiler is not None and step >= self._range[1]:
            self._write()

    def _write(self) -> None:
        self._profiler.__exit__(None, None, None)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = self._range = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._write()
