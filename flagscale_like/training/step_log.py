"""The log line of a step: loss, gradient norm, learning rate, throughput, memory, time left."""

from __future__ import annotations

import datetime
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from flagscale_like.config import RunConfig
from flagscale_like.data.feed import Feed
from flagscale_like.figures import fixed, short
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.clock import Clock
from flagscale_like.training.metrics import KEPT, MEAN
from flagscale_like.training.parts import Part, Report, Step
from flagscale_like.training.plan import StepPlan

RECENT_STEPS = 100
SHOWN_SUMS = 2  # of the objective's sums, as many are in the log line; all are in the records


class Named(Protocol):
    """What a log line needs to know of what is learned: what the loss and the further numbers are called."""

    @property
    def metric(self) -> str: ...

    @property
    def sums(self) -> tuple[str, ...]: ...


class StepLog(Part):
    """Logs a step when its plan says so, with means over the steps since the last line.

    The loss of the line is the mean of the steps since the last line, as Megatron-LM logs it; a single step's loss is as
    noisy as its batch. Steps whose loss is not finite are left out of the mean. What is added up is in the checkpoint, so
    that a resumed run logs what the uninterrupted one would have logged. The objective's sums are reported like its loss, as
    means over its count.
    """

    name = "log"
    state_rewinds = True
    shown = SHOWN_SUMS

    def __init__(
        self,
        config: RunConfig,
        ctx: ParallelContext,
        clock: Clock,
        feed: Feed | None,
        objective: Named,
    ) -> None:
        self.config, self.ctx, self.clock, self.feed = config, ctx, clock, feed
        self.metric, self.names = objective.metric, tuple(objective.sums)
        self.pace = Pace(config)
        self._kept_s: float | None = 0.0
        spec = ctx.platform.data_sheet()
        self.peak_flops = spec.bf16_flops if spec else None
        self._begin()

    def _begin(self) -> None:
        """Begin a new mean."""
        self._loss, self._steps = 0.0, 0
        self._sums = dict.fromkeys(self.names, 0.0)
        self._counts = dict.fromkeys(self.names, 0)  # steps that had the number

    def after(self, step: Step, report: Report) -> None:
        self.pace.note(step.consumed)
        if math.isfinite(step.facts.loss):
            self._loss += step.facts.loss
            self._steps += 1
        for name, value in self._means(step).items():
            self._sums[name] += value
            self._counts[name] += 1
        if step.plan.log:
            record = self._record(step)
            report.numbers(step.plan.step, record)
            report.say(self._line(step, record))
        # The first step of a start is logged out of turn, and begins no new mean.
        if step.plan.step % self.config.train.log_interval == 0:
            self._begin()

    def _means(self, step: Step) -> dict[str, float]:
        """The step's numbers beside its loss, by name; none where the loss is not finite."""
        return step.facts.means(self.names) if math.isfinite(step.facts.loss) else {}

    def _speed(self, step: Step, seconds: float) -> dict[str, float]:
        """How fast a step was.

        Args:
            seconds: that it took, as the mean since the last line.
        """
        tokens_per_s = step.plan.batch_size * self.config.train.seq_length / seconds
        flops = self.config.flops_per_token() * tokens_per_s / self.ctx.world_size
        speed = {"tokens-per-second": tokens_per_s, "throughput/tflops/device": flops / 1e12}
        return speed | ({"mfu": flops / self.peak_flops} if self.peak_flops else {})

    def _record(self, step: Step) -> dict[str, Any]:
        world = self.ctx.world_size
        total, count = self.clock.pop()
        seconds = total / count
        if self._kept_s is not None:
            self._kept_s += total
        record = {
            self.metric: step.facts.loss,
            **({self.metric + MEAN: self._mean(self._loss)} if self._is_in_turn(step.plan) else {}),
            **{name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]},
            "grad-norm": step.facts.grad_norm,
            "learning-rate": step.learning_rate,
            "batch-size": step.plan.batch_size,
            "world-size": world,
            "consumed-samples": step.consumed,
            "iteration-time": seconds,
            **({KEPT: self._kept_s} if self._kept_s is not None else {}),
            **self._speed(step, seconds),
            "mem-peak-bytes": self.ctx.platform.peak_memory_bytes(),
            **({"data-wait-share": self.feed.pop_wait() / total} if self.feed is not None else {}),
            "skipped-steps": step.skipped,
        }
        return record

    def _is_in_turn(self, plan: StepPlan) -> bool:
        """Whether a record of this step belongs to the loss curve: the first step of a resumed run is a single noisy step."""
        return plan.step == 1 or plan.last or plan.step % self.config.train.log_interval == 0

    def _mean(self, total: float) -> float:
        return total / self._steps if self._steps else math.nan

    def _line(self, step: Step, record: Mapping[str, Any]) -> str:
        steps, number = self.config.train.steps, step.plan.step
        eta = self.pace.seconds_left(number, record["iteration-time"])
        parts = [
            f"step {number:>{len(str(steps))}}/{steps}",
            *self._loss_of(step),
            *(f"{name} {short(record[name])}" for name in self.names[: self.shown] if name in record),
            f"lr {step.learning_rate:.2e}",
            *([f"grad norm {record['grad-norm']:.3f}"] if "grad-norm" in record else []),
            f"{record['tokens-per-second']:,.0f} tokens/s",
            *self._work(record),
            f"mem {record['mem-peak-bytes'] / 2**30:.2f} GiB",
            *([f"data wait {record['data-wait-share']:.0%}"] if "data-wait-share" in record else []),
            *([f"skipped {step.skipped}"] if step.skipped else []),
            f"eta {datetime.timedelta(seconds=round(eta))}",
        ]
        return " | ".join(parts)

    def _loss_of(self, step: Step) -> list[str]:
        """The part of the line on the loss."""
        mean, last = self._mean(self._loss), step.facts.loss
        other = f" (this step {fixed(last)})" if self._steps > 1 or not math.isfinite(last) else ""
        return [f"loss {fixed(mean)}{other}"]

    def _work(self, record: Mapping[str, Any]) -> list[str]:
        """The parts of the line on how well the device is used."""
        mfu = [f"MFU {record['mfu']:.1%}"] if "mfu" in record else []
        return [f"{record['throughput/tflops/device']:.3g} TFLOP/s/device", *mfu]

    def state(self) -> dict[str, Any]:
        return {
            "loss": self._loss,
            "steps": self._steps,
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "kept_s": None if self._kept_s is None else self._kept_s + self.clock.seconds,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._loss, self._steps = float(state["loss"]), int(state["steps"])
        self._sums |= {name: value for name, value in state.get("sums", {}).items() if name in self.names}
        counts = state.get("counts", dict.fromkeys(self.names, self._steps))  # an earlier version saved none
        self._counts |= {name: int(count) for name, count in counts.items() if name in self.names}
        kept_s = state.get("kept_s")  # an earlier version saved none
        # What the clock has now is of steps that are given up, and is in its next sum.
        self._kept_s = None if kept_s is None else float(kept_s) - self.clock.seconds


class Pace:
    """Wall time that the rest of a run takes at the pace of its last steps.

    The pace is wall time a sample, so that evaluations and saves between steps count, and a batch ramp-up does not mislead.
    The first step of a start, which builds and compiles, is where the clock begins.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._done: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)

    def note(self, consumed: int) -> None:
        """A step is done, and the run has read so many samples."""
        self._done.append((time.perf_counter(), consumed))

    def seconds_left(self, step: int, step_s: float) -> float:
        """Seconds that the steps after `step` take; by `step_s` a step, where no pace is known yet."""
        train = self.config.train
        (since, before), (now, consumed) = self._done[0], self._done[-1]
        if consumed == before:
            return (train.steps - step) * step_s
        left = train.total_samples() - consumed if train.ramp_up else (train.steps - step) * train.global_batch_size
        return (now - since) / (consumed - before) * max(0, left)
