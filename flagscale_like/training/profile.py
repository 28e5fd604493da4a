"""A torch profiler trace of some steps, written where Perfetto and chrome://tracing can open it."""

from __future__ import annotations

from typing import Any

import torch

from flagscale_like.config import Profile
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.parts import Part, Report, Step
from flagscale_like.training.plan import StepPlan


class StepProfiler(Part):
    """Records the steps of `train.profile` (first and last, both recorded) to RUN_DIR/profile/rank_00000.json.gz.

    Every rank writes its own file. A run that ends inside the range writes what it has.
    """

    def __init__(self, options: Profile, folder: RunFolder, ctx: ParallelContext) -> None:
        self.first, self.last = options.steps
        self._path = folder.profile / f"rank_{ctx.rank:05d}.json.gz"
        self._device_activity = ctx.platform.profiler_activity
        self._profiler: Any = None

    def before(self, plan: StepPlan) -> None:
        if self._profiler is not None or not self.first <= plan.step <= self.last:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device_activity is not None:
            activities.append(self._device_activity)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.__enter__()

    def after(self, step: Step, report: Report) -> None:
        if step.plan.step >= self.last:
            self.close(None)

    def close(self, error: BaseException | None) -> None:
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
