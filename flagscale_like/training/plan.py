"""Where a run stands, and what its next step is to do: pure functions of the configuration and the progress."""

from __future__ import annotations

from dataclasses import dataclass

from flagscale_like.config import RunConfig


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps made, the skipped ones among them.
        consumed: samples read.
        skipped: steps whose update was not made.
        rewinds: how often the run went back to an earlier checkpoint.
        train_samples: samples that the run was planned with. They fix the data's order, so the number stays what it was when
            the run began.
        stopping: whether a rank was asked to stop.
    """

    step: int = 0
    consumed: int = 0
    skipped: int = 0
    rewinds: int = 0
    train_samples: int = 0
    stopping: bool = False


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    Attributes:
        step: its number, counted from 1.
        first: whether it is the first since the program started: it builds, compiles and allocates.
        first_sample: position of its first sample in the order of the run.
        batch_size: samples of the global batch.
        micro_batches: that each data-parallel rank runs.
        log, evaluate, save: what follows the step.
        last: whether the run ends after it.
    """

    step: int
    first: bool
    first_sample: int
    batch_size: int
    micro_batches: int
    log: bool
    evaluate: bool
    save: bool
    last: bool


def last_step(config: RunConfig) -> int:
    """The step after which this start of the run ends by itself."""
    return min(config.train.steps, config.train.exit_at_step or config.train.steps)


def next_step(
    config: RunConfig, dp: int, progress: Progress, *, first: bool, until: int | None = None
) -> StepPlan | None:
    """The plan of the next step; None where the run is at its last one or is stopping.

    Args:
        dp: data-parallel ranks.
        first: see StepPlan.
        until: no step after this one is planned; without it, none after the run's last one.
    """
    train, last = config.train, last_step(config)
    if progress.step >= (last if until is None else min(last, until)) or progress.stopping:
        return None
    step, size = progress.step + 1, train.batch_size_at(progress.consumed)
    return StepPlan(
        step=step,
        first=first,
        first_sample=progress.consumed,
        batch_size=size,
        micro_batches=size // (train.micro_batch_size * dp),
        log=first or step == last or step % train.log_interval == 0,
        evaluate=_due(step, train.eval_interval, last),
        save=_due(step, config.checkpoint.interval, last),
        last=step == last,
    )


def _due(step: int, interval: int, last: int) -> bool:
    return bool(interval) and (step % interval == 0 or step == last)
