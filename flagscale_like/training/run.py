"""A run on this rank: its engine, data, parts and store; restored from a checkpoint, saved, taken back."""

from __future__ import annotations

import functools
import itertools
import platform as host
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from flagscale_like.checkpoint.adapters import AdaptedWeights
from flagscale_like.checkpoint.companions import Origin, read_companions
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.shard import Shard
from flagscale_like.checkpoint.store import CheckpointStore, layout_record
from flagscale_like.config import RunConfig
from flagscale_like.data.feed import Feed
from flagscale_like.engine.engine import Engine, engine_states
from flagscale_like.engine.load import base_record, load_random_state
from flagscale_like.engine.objective import BatchObjective, Objective
from flagscale_like.errors import CheckpointError, DivergedError
from flagscale_like.json_files import BAD_VALUES
from flagscale_like.model.spec import ModelSpec
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.watchdog import Watchdog
from flagscale_like.training.changes import check_held_out, describe_changes
from flagscale_like.training.clock import Clock
from flagscale_like.training.evaluation import Measured
from flagscale_like.training.guard import Guard
from flagscale_like.training.learning_rate import build_scheduler
from flagscale_like.training.metrics import Reporter
from flagscale_like.training.parts import Parts
from flagscale_like.training.plan import Progress, last_step
from flagscale_like.training.standard_parts import Saves
from flagscale_like.training.weights import check_model, origin_of, usage_folders, weights_to_load


@dataclass
class Start:
    """A model and its optimizer as the run begins or goes on, and where it stands.

    Attributes:
        reader: the checkpoint that the run goes on from; None where it begins.
        saved: its state.json; empty where the run begins.
        new: whether the weights were drawn.
        weights: what the weights of a new run come from, as checkpoint.adapters records it; None where they were drawn.
        origin: the Hugging Face folder that the weights come from, if they do.
        notes: what to tell the user about it.
    """

    engine: Engine
    scheduler: OptimizerParamScheduler
    store: CheckpointStore
    progress: Progress
    reader: CheckpointReader | None = None
    saved: dict[str, Any] = field(default_factory=dict)
    new: bool = False
    weights: dict[str, Any] | None = None
    origin: Origin = field(default_factory=Origin)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Beside:
    """A further model of a run, which its checkpoints hold under the engine's name.

    Attributes:
        scheduler: of its learning rate, which is counted in the run's steps; None where it is not trained.
    """

    engine: Engine
    scheduler: OptimizerParamScheduler | None = None


@dataclass
class Run:
    """All that the training loop works with, on this rank.

    Attributes:
        feed: the micro-batches; None where the run's steps make their own.
        beside: the models beside the engine's.
        begun: whether this start of the run has made a step.
        evaluate: what is measured on a split of the data, by the split's name; None where the run does not evaluate.
        clock: of the steps since the last log line.
        documents: see changes.source_record.
        origin: see Start.
    """

    config: RunConfig
    engine: Engine
    objective: Objective | BatchObjective
    scheduler: OptimizerParamScheduler
    store: CheckpointStore
    progress: Progress
    parts: Parts
    guard: Guard
    saves: Saves
    reporter: Reporter
    watchdog: Watchdog
    feed: Feed | None = None
    beside: Sequence[Beside] = ()
    begun: bool = False
    evaluate: Callable[[str], Measured] | None = None
    clock: Clock = field(default_factory=Clock)
    documents: dict[str, int] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)

    @property
    def ctx(self) -> ParallelContext:
        return self.engine.ctx

    @property
    def engines(self) -> list[Engine]:
        """All models of the run."""
        return [self.engine, *(one.engine for one in self.beside)]

    @property
    def schedulers(self) -> list[OptimizerParamScheduler]:
        """Of all models that are trained."""
        return [self.scheduler, *(one.scheduler for one in self.beside if one.scheduler is not None)]

    def save(self) -> None:
        """Begin a checkpoint of everything that the run needs to go on; how it ends is in `store.outcomes`."""
        self.store.save(self.progress.step, self.fragments, self.state())

    def fragments(self) -> Iterator[Shard]:
        """What this rank saves of all models."""
        return itertools.chain.from_iterable(engine.fragments() for engine in self.engines)

    def state(self) -> dict[str, Any]:
        """What state.json of a checkpoint holds: where the run stands, and each part's state under the part's name."""
        config, progress, parts = self.config, self.progress, self.parts.state()
        own = {
            "step": progress.step,
            "consumed_samples": progress.consumed,
            "skipped_steps": progress.skipped,
            "rewinds": progress.rewinds,
            "train_samples": progress.train_samples,
            "learning_rate_steps": self.scheduler.num_steps,
            "layout": layout_record(self.ctx),
            "model": config.model.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "documents": self.documents,
            "hugging_face": self.origin.record(),
            "versions": versions(),
            **engine_states(self.engines),
        }
        assert not own.keys() & parts.keys(), f"a part is named as what the run saves: {own.keys() & parts.keys()}"
        return own | parts

    def rewind(self, steps: int) -> str:
        """Go back at least `steps` steps, to a whole checkpoint; the data goes on where it is.

        The place is saved at once, with the samples consumed until now, and later checkpoints are removed: a restart
        neither reads the skipped batches again nor goes on from what was given up.

        Returns:
            What was done, in words.

        Raises:
            DivergedError: there is no whole checkpoint.
        """
        self.store.finish()
        folder, _ = self.store.newest_good(at_most=max(0, self.progress.step - steps))
        if folder is None:
            raise DivergedError(f"step {self.progress.step}: no whole checkpoint to go back to in {self.store.root}")
        reader = CheckpointReader(folder)
        for engine in self.engines:
            if engine.optimizer is not None:
                engine.load(reader)
        left, self.progress.step = self.progress.step, int(reader.state["step"])
        for scheduler in self.schedulers:
            set_steps(scheduler, int(reader.state["learning_rate_steps"]))
        self.parts.load(reader.state, back=True)
        self.progress.rewinds += 1
        self.save()
        self.store.finish()
        self.store.forget_after(self.progress.step)
        skipped = self.progress.consumed - int(reader.state["consumed_samples"])
        return f"step {left}: went back to step {self.progress.step}, skipping {skipped:,} samples in between"


def start(config: RunConfig, ctx: ParallelContext) -> Start:
    """Build model, optimizer and store; go on from the newest whole checkpoint, or begin anew.

    Raises:
        CheckpointError: there are checkpoints, but none is whole, or it is of another model.
        ConfigError: see Engine.build() and weights_to_load().
    """
    store = CheckpointStore(RunFolder(config.run_dir).checkpoints, ctx, config.checkpoint)
    newest, rejected = store.newest_good()
    notes = [f"rejected checkpoint {reason}" for reason in rejected]
    if newest is None and rejected:
        raise CheckpointError(
            f"{store.root}: none of its {len(rejected)} checkpoints is whole ({'; '.join(rejected)}); "
            "mend one, or move them away to begin anew"
        )
    reader = CheckpointReader(newest) if newest is not None else None
    saved_task = reader.state.get("config", {}).get("task", "train") if reader is not None else config.task
    if saved_task != config.task:
        raise CheckpointError(
            f"{newest}: is of a run of task {saved_task}, and the configuration says {config.task}: give another run_dir, "
            "and begin from this checkpoint with checkpoint.load"
        )
    notes += reader.notes if reader is not None else ()
    source = weights_to_load(config, reader, ctx)
    strict = reader is not None or config.checkpoint.load_strict
    if source is not None and strict:
        notes += check_model(config, reader or source, resuming=reader is not None)
    # What LoRA does not train must be there, even where a different architecture is accepted.
    strict = strict or config.lora is not None
    spec = ModelSpec.of(config)
    engine = Engine.build(spec, ctx, optimizer=config.optimizer, source=source, strict=strict, states=reader)
    if engine.base is not None:
        notes.append(f"the base of the adapters is {engine.base['folder']} (hash {engine.base['xxh3']})")
    scheduler = build_scheduler(engine.optimizer, config)
    progress = Progress(train_samples=config.planned_samples())
    begun = Start(engine, scheduler, store, progress, notes=notes)
    if reader is not None:
        begun.reader, begun.saved = reader, reader.state
        notes += _restore(begun, reader, config, saved_on=load_random_state(reader, ctx))
    elif source is not None:
        notes.append(f"starting from the weights of {source.folder}")
        notes += getattr(source.base if isinstance(source, AdaptedWeights) else source, "notes", ())
        begun.weights = base_record(source, ctx)
        notes += [f"not loaded: {reason}" for reason in engine.left]
    else:
        begun.new = True
        notes.append("starting from new weights")
    begun.origin = origin_of(reader or source)
    if ctx.is_main:
        store.companions = read_companions(usage_folders(config, reader, source), begun.origin.auto_map)
    return begun


def _restore(begun: Start, reader: CheckpointReader, config: RunConfig, *, saved_on: str) -> list[str]:
    """Put progress and learning rate where the checkpoint's run stood; returns what to tell the user."""
    state, progress, needed = reader.state, begun.progress, begun.progress.train_samples
    try:
        progress.step, progress.consumed = int(state["step"]), int(state["consumed_samples"])
        progress.skipped, progress.train_samples = int(state["skipped_steps"]), int(state["train_samples"])
        progress.rewinds = int(state.get("rewinds", 0))
        rate_steps = int(state["learning_rate_steps"])
        saved = " ".join(f"{name}{size}" for name, size in state["layout"].items())
        before = dict(state.get("config", {}))
    except BAD_VALUES as error:
        raise CheckpointError(
            f"{reader.folder}: state.json does not say where the run stood ({type(error).__name__}: {error})"
        ) from None
    set_steps(begun.scheduler, rate_steps)
    notes = [
        f"resuming from step {progress.step}: {reader.folder} is the newest whole checkpoint "
        f"(saved on {saved}, {saved_on})"
    ]
    notes += describe_changes(before, config, consumed=progress.consumed, rate_steps=rate_steps)
    notes += check_held_out(before, state.get("documents"), config)
    if progress.step >= last_step(config):
        limit = f"train.steps is {config.train.steps}"
        if config.train.exit_at_step is not None:
            limit += f" and train.exit_at_step {config.train.exit_at_step}"
        notes.append(
            f"complete, nothing is left to train: {limit}, and step {progress.step} is done; raise it to go on"
        )
    if needed > progress.train_samples:
        notes.append(
            f"from here on the order of the samples is another one: the run now reads {needed}, not {progress.train_samples}"
        )
        progress.train_samples = needed
    return notes


def set_steps(scheduler: OptimizerParamScheduler, steps: int) -> None:
    """Put the learning rate where it is after `steps` steps."""
    scheduler.num_steps = 0
    scheduler.step(increment=steps)


@functools.cache
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
