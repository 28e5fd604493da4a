"""The training loop: train_step, observe, evaluate, save, until done or asked to stop."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export_on_ranks
from flagscale_like.config import RunConfig
from flagscale_like.data.pretrain import build_dataset, build_datasets, micro_batches
from flagscale_like.errors import CheckpointError, DivergedError
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.watchdog import Watchdog
from flagscale_like.training.guard import Guard
from flagscale_like.training.metrics import Reporter
from flagscale_like.training.monitors import StepMonitors
from flagscale_like.training.profile import StepProfiler
from flagscale_like.training.recovery import Ledger
from flagscale_like.training.run import Progress, Run, start
from flagscale_like.training.source_selection import SourceSelection
from flagscale_like.training.step import Batches, StepResult, Verdict, evaluate, train_step
from flagscale_like.training.trail import DataTrail


def train(config: RunConfig, ctx: ParallelContext) -> Progress:
    """Run to the last step, to exit_at_step, or until SIGTERM / SIGINT; save, and return where the run stands.

    Raises:
        DivergedError: the guard (training.guard) stopped the run.
        CheckpointError: a save failed, and checkpoint.on_error says stop, or it was the last one.
        DataError, CheckpointError: see the functions that load.
    """
    run, notes = start(config, ctx)
    progress, options, store = run.progress, config.train, run.store
    ledger = Ledger(Path(config.run_dir), progress.step) if ctx.is_main else None
    reporter = Reporter(config, ctx, progress.step, progress.consumed)
    _announce(reporter, run, notes)
    last = min(options.steps, options.exit_at_step or options.steps)
    valid_samples = options.eval_steps * options.global_batch_size if options.eval_interval else 0
    train_data, valid_data = build_datasets(
        config, ctx, train_samples=progress.train_samples, valid_samples=valid_samples
    )
    selection = SourceSelection(run, train_data)
    trail = DataTrail(run, train_data, selection.mixture, reporter)
    trail.begin()
    batches = TimedBatches(
        micro_batches(train_data, config, ctx, consumed=progress.consumed, mixture=selection.mixture)
    )
    monitors = StepMonitors(run.models, run.optimizer, config, ctx)
    guard = Guard(config.monitors, rewinds=progress.rewinds, judges=[monitors.judge])
    run.keep("monitors", monitors, goes_back=True)
    run.keep("guard", guard, goes_back=False)
    first, since, steps_since, stop = True, time.perf_counter(), 0, False
    with _watchdog(config, ctx) as watchdog, StepProfiler(config, ctx) as profiler:
        while progress.step < last and not stop:
            profiler.begin(progress.step + 1)
            batch_size = options.batch_size_at(progress.consumed)
            watchdog.beat(progress.step, "training step", slow=first)
            monitors.begin(progress.step + 1)
            selection.begin(batch_size)
            result = train_step(
                run.chunks,
                run.optimizer,
                config,
                ctx,
                batches,
                batch_size // (options.micro_batch_size * ctx.dp),
                decide=guard,
                watch=selection.watch,
                flags=lambda: [float(watchdog.asked_to_stop), *store.pulse(), *selection.flags()],
                before_update=store.before_update,
            )
            progress.step += 1
            readings, events = monitors.end(updated=result.updated)
            readings |= selection.end(result.flags[3:])
            profiler.end(progress.step)
            progress.consumed += batch_size
            progress.skipped += not result.updated
            learning_rate = run.optimizer.param_groups[0]["lr"]
            run.scheduler.step(increment=1)
            steps_since += 1
            reporter.timed(progress.consumed)
            logged = progress.step % options.log_interval == 0 or first or progress.step == last
            trail.record(progress.consumed - batch_size, result, logged=logged)
            if logged:
                reporter.step(
                    progress.step,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    learning_rate=learning_rate,
                    batch_size=batch_size,
                    seconds=(time.perf_counter() - since) / steps_since,
                    data_wait_s=batches.pop_wait() / steps_since,
                    consumed=progress.consumed,
                    skipped=progress.skipped,
                )
                if run.offload is not None:
                    reporter.offload(progress.step, run.offload.report())
                since, steps_since = time.perf_counter(), 0
            reporter.health(progress.step, readings, guard.take_events() + events, progress.consumed)
            if first and ledger:
                reporter.resilience(progress.step, ledger.recovered())
            first, stop = False, result.flags[0] > 0
            store.advance(*result.flags[1:3])
            _report_saves(run, reporter)
            if result.verdict in (Verdict.REWIND, Verdict.STOP):
                watchdog.beat(progress.step, "going back", slow=True)
                _go_back(run, reporter, result, guard.reason)
                trail.went_back()
                since, steps_since = time.perf_counter(), 0
                continue
            if (
                valid_data
                and options.eval_interval
                and (progress.step % options.eval_interval == 0 or progress.step == last)
            ):
                _evaluate(run, reporter, watchdog, valid_data, "validation")
                since = time.perf_counter()
            final = stop or progress.step == last
            if config.checkpoint.interval and (final or progress.step % config.checkpoint.interval == 0):
                watchdog.beat(progress.step, "saving", slow=True)
                _save(run, reporter, final=final)
                since = time.perf_counter()
        if progress.step == options.steps and valid_data and config.data.tests:
            _evaluate(run, reporter, watchdog, build_dataset(config, ctx, "test", valid_samples), "test")
    trail.end()
    if progress.step < last:
        reporter.say(f"stopped at step {progress.step}; the same command goes on from the newest checkpoint")
    elif config.checkpoint.export_hf:
        reporter.say(f"exported {export_run(run)}: {options.precision} weights of step {progress.step}")
    if ledger:
        ledger.stop(progress.step)
    reporter.close()
    return progress


def export_run(run: Run) -> Path:
    """Write RUN_DIR/hf from the checkpoint of the last step; the ranks share the files. All ranks call it.

    Raises:
        ConversionError: on every rank, where any rank could not write.
    """
    data, out = run.config.data, Path(run.config.run_dir) / "hf"
    reader = CheckpointReader(run.store.root / f"step_{run.progress.step:08d}")
    tokenizer = Path(data.tokenizer) if data.tokenizer else None
    export_on_ranks(reader, out, run.ctx, dtype=run.config.train.precision, tokenizer=tokenizer)
    return out


def _evaluate(run: Run, reporter: Reporter, watchdog: Watchdog, dataset: Dataset, split: str) -> None:
    config, step = run.config, run.progress.step
    beat = functools.partial(watchdog.beat, step, "evaluation")
    fresh = micro_batches(dataset, config, run.ctx)
    loss, by_source = evaluate(run.chunks, config, run.ctx, fresh, config.train.eval_steps, on_step=beat)
    reporter.evaluation(step, loss, by_source, split=split)


def _save(run: Run, reporter: Reporter, *, final: bool) -> None:
    """Begin a save; a final one is waited for."""
    if run.store.busy and run.config.checkpoint.when_busy == "skip" and not final:
        reporter.say(f"step {run.progress.step} | save skipped: one is still under way (checkpoint.when_busy is skip)")
        return
    if run.store.busy:
        reporter.say(f"step {run.progress.step} | the save waits for the one under way")
    run.save()
    if final:
        run.store.finish()
    _report_saves(run, reporter, final=final)


def _report_saves(run: Run, reporter: Reporter, *, final: bool = False) -> None:
    for saved in run.store.take_outcomes():
        reporter.checkpoint(saved)
        last_chance = final and saved.step == run.progress.step
        if saved.error and (last_chance or run.config.checkpoint.on_error == "stop"):
            raise CheckpointError(f"{saved.path}: could not be saved: {saved.error}; earlier checkpoints are untouched")


def _go_back(run: Run, reporter: Reporter, result: StepResult, reason: str) -> None:
    """Rewind, or stop; every rank does, so that a save under way can be finished first."""
    run.store.finish()
    _report_saves(run, reporter)
    reason = f"loss {result.loss}, gradient norm {result.grad_norm}: {reason}"
    if result.verdict is Verdict.STOP:
        raise DivergedError(f"step {run.progress.step}: {reason}; the update was not made")
    reporter.say(f"step {run.progress.step} | {reason}")
    reporter.say(run.rewind(run.config.monitors.rewind_steps))
    _report_saves(run, reporter)


def _watchdog(config: RunConfig, ctx: ParallelContext) -> Watchdog:
    limits = config.resilience
    return Watchdog(
        Path(config.run_dir) / "hang",
        ctx.rank,
        ctx.world_size,
        first_timeout_s=limits.first_step_timeout_s,
        timeout_s=limits.step_timeout_s,
        grace_s=limits.grace_s,
    )


class TimedBatches:
    """An iterator that adds up how long its consumer waited for it."""

    def __init__(self, batches: Batches) -> None:
        self._batches, self._wait_s = batches, 0.0

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        began = time.perf_counter()
        batch = next(self._batches)
        self._wait_s += time.perf_counter() - began
        return batch

    def pop_wait(self) -> float:
        """Seconds waited since the last call."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited


def _announce(reporter: Reporter, run: Run, notes: list[str]) -> None:
    config, ctx = run.config, run.ctx
    par = config.parallel
    if ctx.is_main:
        (Path(config.run_dir) / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    reporter.say(
        f"{config.model.parameter_count():,} parameters | tp {par.tp} pp {par.pp} vpp {par.vpp} dp {ctx.dp}"
        f"{' sp' if par.sp else ''} on {ctx.world_size} x {ctx.platform.describe()} | {config.train.precision}"
    )
    for note in notes:
        reporter.say(note)
