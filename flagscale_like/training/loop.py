"""The training loop: restore, then train_step, observe, evaluate, save, until done or asked to stop."""

from __future__ import annotations

import math
import platform as host
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from flagscale_like.checkpoint.format import CheckpointReader, find_checkpoint
from flagscale_like.checkpoint.hf import export_on_ranks
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.store import (
    CheckpointStore,
    layout_record,
    load_optimizer,
    load_rng,
    load_weights,
)
from flagscale_like.config import Checkpoint, RunConfig
from flagscale_like.data.pretrain import build_datasets, check_sources, micro_batches
from flagscale_like.errors import CheckpointError, DataError, DivergedError
from flagscale_like.model.build import LanguageModel, build_chunks, initialize_weights, wrap_chunks
from flagscale_like.model.offload import ActivationOffload, attach_offload
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.metrics import Reporter
from flagscale_like.training.optimizer import build_optimizer, build_scheduler
from flagscale_like.training.profile import StepProfiler
from flagscale_like.training.step import Batches, StepResult, evaluate, train_step


@dataclass
class Progress:
    """Where a run stands. `train_samples` fixes the data's order, so it stays what the run began with."""

    step: int = 0
    consumed: int = 0
    skipped: int = 0
    train_samples: int = 0


@dataclass
class Run:
    """The parts of a run on this rank."""

    config: RunConfig
    ctx: ParallelContext
    models: list[LanguageModel]
    chunks: list[MegatronModule]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    store: CheckpointStore
    progress: Progress
    offload: ActivationOffload | None = None

    def save(self) -> Path:
        """Write a checkpoint of everything that the run needs to go on."""
        config, progress = self.config, self.progress
        state = {
            "step": progress.step,
            "consumed_samples": progress.consumed,
            "skipped_steps": progress.skipped,
            "train_samples": progress.train_samples,
            "learning_rate_steps": self.scheduler.num_steps,
            "layout": layout_record(self.ctx),
            "model": config.model.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "versions": versions(),
        }
        return self.store.save(progress.step, self.models, self.optimizer, state)


def start(config: RunConfig, ctx: ParallelContext) -> tuple[Run, list[str]]:
    """Build model, optimizer and store; restore the newest good checkpoint, or begin anew.

    Returns:
        The run, and what to tell the user about where it starts.
    """
    agree(ctx, lambda: check_sources(config))
    models = build_chunks(config, ctx)
    initialize_weights(models, config, ctx)
    chunks = wrap_chunks(models, config, ctx)
    offload = attach_offload(models, config, ctx)
    store = CheckpointStore(Path(config.run_dir) / "checkpoints", ctx, keep=config.checkpoint.keep)
    newest, rejected = store.newest_good()
    notes = [f"rejected checkpoint {reason}" for reason in rejected]
    reader = None
    if newest is not None:
        reader = CheckpointReader(newest)
        check_model(config, reader)
        load_weights(reader, models, ctx)
    elif config.checkpoint.load or config.checkpoint.init_from_hf:
        source = open_weights(config.checkpoint)
        check_model(config, source)
        load_weights(source, models, ctx)
        notes.append(f"starting from the weights of {source.folder}")
    # The optimizer takes its fp32 master weights from the model, so it is built after the weights are there.
    optimizer = build_optimizer(chunks, config)
    scheduler = build_scheduler(optimizer, config)
    progress = Progress(train_samples=config.train.total_samples())
    if reader is not None:
        load_optimizer(reader, models, optimizer, ctx)
        same_layout = load_rng(reader, ctx)
        notes += _restore_progress(reader, progress, scheduler, same_layout)
    elif not (config.checkpoint.load or config.checkpoint.init_from_hf):
        notes.append("starting from new weights")
    return Run(config, ctx, models, chunks, optimizer, scheduler, store, progress, offload), notes


def _restore_progress(
    reader: CheckpointReader, progress: Progress, scheduler: OptimizerParamScheduler, same_layout: bool
) -> list[str]:
    state = reader.state
    needed = progress.train_samples
    progress.step, progress.consumed = state["step"], state["consumed_samples"]
    progress.skipped, progress.train_samples = state["skipped_steps"], state["train_samples"]
    scheduler.num_steps = 0
    scheduler.step(increment=state["learning_rate_steps"])
    saved = " ".join(f"{name}{size}" for name, size in state["layout"].items())
    notes = [
        f"resuming from step {progress.step}: {reader.folder} is the newest whole checkpoint "
        f"(saved on {saved}{', the same layout' if same_layout else ', another layout'})"
    ]
    if needed > progress.train_samples:
        notes.append(
            f"the data order changes: this run needs {needed} samples, it began with {progress.train_samples} planned"
        )
        progress.train_samples = needed
    return notes


def open_weights(options: Checkpoint) -> CheckpointReader | HfFolder:
    """What a run's first weights come from: `load`'s checkpoint or `init_from_hf`'s folder.

    Raises:
        CheckpointError, ConversionError: it is not there, or cannot be read.
    """
    if options.init_from_hf:
        return HfFolder(Path(options.init_from_hf))
    return CheckpointReader(find_checkpoint(Path(options.load)))


def check_model(config: RunConfig, reader: CheckpointReader | HfFolder) -> None:
    """Refuse a checkpoint of another architecture, naming what differs.

    Raises:
        CheckpointError: a field of the model differs.
    """
    free = {"family", "init_std", "output_init_std", "norm_init", "max_position_embeddings"}
    saved, wanted = reader.arch.model_dump(mode="json"), config.model.model_dump(mode="json")
    different = [
        f"model.{key}: {saved.get(key)!r} saved, {value!r} configured"
        for key, value in wanted.items()
        if key not in free and saved.get(key) != value
    ]
    if different:
        raise CheckpointError(f"{reader.folder}: is of another model: {'; '.join(different)}")


def train(config: RunConfig, ctx: ParallelContext) -> Progress:
    """Run to the last step, to exit_at_step, or until SIGTERM / SIGINT; save, and return where the run stands.

    Raises:
        DivergedError: loss or gradients are not finite, and monitors.non_finite says stop, or too many skips in a row.
        DataError, CheckpointError: see the functions that load.
    """
    run, notes = start(config, ctx)
    progress, options = run.progress, config.train
    reporter = Reporter(config, ctx, progress.step)
    _announce(reporter, run, notes)
    last = min(options.steps, options.exit_at_step or options.steps)
    valid_samples = options.eval_steps * options.global_batch_size if options.eval_interval else 0
    train_data, valid_data = build_datasets(
        config, ctx, train_samples=progress.train_samples, valid_samples=valid_samples
    )
    batches = TimedBatches(micro_batches(train_data, config, ctx, consumed=progress.consumed))
    first, saved_at, skips, since, steps_since = progress.step + 1, progress.step, 0, time.perf_counter(), 0
    with stop_signals() as signals, StepProfiler(config, ctx) as profiler:
        while progress.step < last:
            profiler.begin(progress.step + 1)
            began = time.perf_counter()
            batch_size = options.batch_size_at(progress.consumed)
            result = train_step(
                run.chunks,
                run.optimizer,
                config,
                ctx,
                batches,
                batch_size // (options.micro_batch_size * ctx.dp),
                stop=bool(signals),
            )
            progress.step += 1
            profiler.end(progress.step)
            progress.consumed += batch_size
            skips = _count_skips(run, result, skips)
            learning_rate = run.optimizer.param_groups[0]["lr"]
            run.scheduler.step(increment=1)
            reporter.timed(time.perf_counter() - began)
            steps_since += 1
            if progress.step % options.log_interval == 0 or progress.step in (first, last):
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
            if (
                options.eval_interval
                and valid_data
                and (progress.step % options.eval_interval == 0 or progress.step == last)
            ):
                fresh = micro_batches(valid_data, config, ctx)
                reporter.evaluation(progress.step, evaluate(run.chunks, config, ctx, fresh, options.eval_steps))
                since = time.perf_counter()
            interval = config.checkpoint.interval
            if interval and (progress.step % interval == 0 or progress.step == last or result.stop):
                saved_at = _save(run, reporter)
                since = time.perf_counter()
            if result.stop:
                break
    if progress.step < last:
        reporter.say(f"stopped at step {progress.step}, saved at step {saved_at}; the same command goes on from there")
    elif config.checkpoint.export_hf:
        reporter.say(f"exported {export_run(run, saved_at)}: {options.precision} weights of step {saved_at}")
    reporter.close()
    return progress


def export_run(run: Run, step: int) -> Path:
    """Write RUN_DIR/hf from the checkpoint of `step`; the ranks share the files. All ranks call it.

    Raises:
        ConversionError: on every rank, where any rank could not write.
    """
    data, out = run.config.data, Path(run.config.run_dir) / "hf"
    reader = CheckpointReader(run.store.root / f"step_{step:08d}")
    tokenizer = Path(data.tokenizer) if data.tokenizer else None
    export_on_ranks(reader, out, run.ctx, dtype=run.config.train.precision, tokenizer=tokenizer)
    return out


def _save(run: Run, reporter: Reporter) -> int:
    began = time.perf_counter()
    path = run.save()
    reporter.checkpoint(run.progress.step, time.perf_counter() - began, path)
    return run.progress.step


def _count_skips(run: Run, result: StepResult, skips: int) -> int:
    """Skipped steps in a row, after this one; the decision rests on reduced values, so that all ranks agree."""
    if result.updated:
        return 0
    run.progress.skipped += 1
    if result.overflow and math.isfinite(result.loss):
        return skips
    monitors, step = run.config.monitors, run.progress.step
    what = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}"
    if monitors.non_finite == "stop":
        raise DivergedError(f"{what}: not finite; monitors.non_finite is stop, the update was not made")
    if skips + 1 > monitors.max_consecutive_skips:
        raise DivergedError(f"{what}: {skips + 1} steps skipped in a row (monitors.max_consecutive_skips)")
    return skips + 1


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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list, so that the loop ends after the step at hand."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agree(ctx: ParallelContext, check: Callable[[], object]) -> None:
    """Run a check on every rank; if one fails, all raise its error, and none is left waiting in a collective.

    Raises:
        DataError: on every rank, where the check raised it, or an OSError, on any.
    """
    problem = None
    try:
        check()
    except (DataError, OSError) as error:
        problem = str(error)
    found = [p for p in ctx.gather(problem) if p]
    if found:
        raise DataError(found[0])


def versions() -> dict[str, str]:
    """Versions that a checkpoint records, and the git commit where there is one."""
    found = {"python": host.python_version()}
    for name in ("flagscale_like", "torch", "megatron-core", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, cwd=Path(__file__).parent
        )
        if commit.returncode == 0:
            found["git commit"] = commit.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    return found


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
