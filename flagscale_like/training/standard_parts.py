"""Small parts that every run has: the stop signal, the saves under way, garbage collection, the offload's counts."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping

from flagscale_like.checkpoint.store import CheckpointStore
from flagscale_like.config import Checkpoint
from flagscale_like.engine.engine import Outputs
from flagscale_like.errors import CheckpointError
from flagscale_like.model.offload import ActivationOffload
from flagscale_like.runtime.watchdog import Watchdog
from flagscale_like.training.parts import Part, Report, Step
from flagscale_like.training.plan import StepPlan


class StopSignal(Part):
    """Tells the watchdog that a step begins, and all ranks that one was asked to stop (`stop` in the facts' sums).

    A run whose steps are longer than the time that it has to stop says so once.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self._began, self._warned = 0.0, False

    def before(self, plan: StepPlan) -> None:
        self.watchdog.beat(plan.step - 1, "training step", slow=plan.first)
        self._began = time.monotonic()

    def after(self, step: Step, report: Report) -> None:
        took, grace_s = time.monotonic() - self._began, self.watchdog.grace_s
        if took <= grace_s or step.plan.first or self._warned:
            return
        self._warned = True
        report.say(
            f"warning: a step takes {took:.0f} s, longer than resilience.grace_s ({grace_s:g} s): a run that is asked to "
            "stop would end in the middle of a step and save nothing. Raise it, and the launcher's limit (torchrun: 30 s)"
        )

    def contribute(self, outputs: Outputs) -> Mapping[str, float]:
        return {"stop": float(self.watchdog.asked_to_stop)}


class Saves(Part):
    """Moves the save under way to its next phase, at the same step on every rank, and reports the saves that ended.

    Attributes:
        must_succeed: the step of the save that the run cannot do without; a failure of it is an error in any case.
    """

    def __init__(self, store: CheckpointStore, options: Checkpoint, watchdog: Watchdog) -> None:
        self.store, self.options, self.watchdog = store, options, watchdog
        self.must_succeed: int | None = None

    def contribute(self, outputs: Outputs) -> Mapping[str, float]:
        working, failed = self.store.pulse()
        return {"save/working": working, "save/failed": failed}

    def before_update(self) -> None:
        self.store.before_update()

    def after(self, step: Step, report: Report) -> None:
        self.store.advance(step.facts.sums["save/working"], step.facts.sums["save/failed"])
        self.report(report)

    def report(self, report: Report) -> None:
        """Report the saves that ended.

        Raises:
            CheckpointError: one failed, and checkpoint.on_error says stop, or it is the one that must succeed.
        """
        for saved in self.store.take_outcomes():
            if saved.error:
                report.say(f"step {saved.step} | not saved: {saved.error}; earlier checkpoints are untouched")
                if saved.step == self.must_succeed or self.options.on_error == "stop":
                    raise CheckpointError(
                        f"{saved.path}: could not be saved: {saved.error}; earlier checkpoints are untouched"
                    )
                continue
            times = {"checkpoint/stall_s": saved.stall_s, "checkpoint/write_s": saved.write_s}
            report.numbers(saved.step, times)
            words = f"training waited {saved.stall_s:.2f} s, the files took {saved.write_s:.2f} s"
            report.say(f"step {saved.step} | saved {saved.path} ({words})")
            self.watchdog.kept = f"The newest checkpoint is {saved.path.name}"
            for note in saved.notes:
                report.say(f"step {saved.step} | {note}")


class GarbageCollection(Part):
    """Collects garbage at the same step on every rank. A collection that one rank begins by itself makes all others wait.

    What is alive after the first step (modules, configuration, megatron-core's caches) stays: it is never looked at again,
    until the run ends. A process that trains several times may freeze what it has loaded before: that stays frozen.

    Args:
        interval: steps between collections; 0 leaves them to Python.
    """

    def __init__(self, interval: int) -> None:
        self.interval, self.has_frozen = interval, False

    def after(self, step: Step, report: Report) -> None:
        if not self.interval:
            return
        if step.plan.first:
            gc.collect()
            if not gc.get_freeze_count():
                gc.freeze()
                self.has_frozen = True
            gc.disable()
        elif step.plan.step % self.interval == 0:
            gc.collect()

    def close(self, error: BaseException | None) -> None:
        if self.interval:
            gc.enable()
            if self.has_frozen:
                gc.unfreeze()


class OffloadReport(Part):
    """Reports the activation offload of rank 0 at the steps that are logged."""

    def __init__(self, offload: ActivationOffload) -> None:
        self.offload = offload

    def after(self, step: Step, report: Report) -> None:
        if step.plan.log:
            counts = self.offload.report()
            report.numbers(step.plan.step, {f"offload/{name}": value for name, value in counts.items()})
