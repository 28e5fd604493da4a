"""A run's parts on this rank: built, restored, saved, taken back."""

from __future__ import annotations

import functools
import platform as host
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.manifest import find_checkpoint
from flagscale_like.checkpoint.store import (
    CheckpointStore,
    WeightSource,
    layout_record,
    load_optimizer,
    load_rng,
    load_weights,
    verify,
)
from flagscale_like.config import Checkpoint, RunConfig
from flagscale_like.data.pretrain import check_sources
from flagscale_like.errors import CheckpointError, DivergedError
from flagscale_like.families import find_family
from flagscale_like.model.build import LanguageModel, build_chunks, wrap_chunks
from flagscale_like.model.initialise import Initialisation, initialize_weights
from flagscale_like.model.offload import ActivationOffload, attach_offload
from flagscale_like.runtime.parallel import ParallelContext, agree
from flagscale_like.training.optimizer import build_optimizer, build_scheduler
from flagscale_like.training.salience import calibrate


@dataclass
class Progress:
    """Where a run stands. `train_samples` fixes the data's order, so it stays what the run began with."""

    step: int = 0
    consumed: int = 0
    skipped: int = 0
    rewinds: int = 0
    train_samples: int = 0


class Stateful(Protocol):
    """What a checkpoint keeps beside model and optimizer: small, JSON-able, the same on every rank.

    `state` returns a copy: it is written while training goes on.
    """

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


@dataclass
class Run:
    """The parts of a run on this rank.

    Attributes:
        saved: state.json of the checkpoint that the run goes on from.
        kept: what else is saved, by its key in state.json; see `keep`.
    """

    config: RunConfig
    ctx: ParallelContext
    models: list[LanguageModel]
    chunks: list[MegatronModule]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    store: CheckpointStore
    progress: Progress
    offload: ActivationOffload | None = None
    saved: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Stateful] = field(default_factory=dict)
    goes_back: set[str] = field(default_factory=set)

    def keep(self, name: str, part: Stateful, *, goes_back: bool) -> None:
        """Save `part` with every checkpoint; put back now what the run's checkpoint has of it.

        Args:
            goes_back: whether it goes back with the weights, or on with the data, when the run is taken back.
        """
        self.kept[name] = part
        if goes_back:
            self.goes_back.add(name)
        if name in self.saved:
            part.load(self.saved[name])

    def save(self) -> None:
        """Begin a checkpoint of everything that the run needs to go on; how it ends is in `store.outcomes`."""
        config, progress = self.config, self.progress
        state = {
            "step": progress.step,
            "consumed_samples": progress.consumed,
            "skipped_steps": progress.skipped,
            "rewinds": progress.rewinds,
            "train_samples": progress.train_samples,
            "learning_rate_steps": self.scheduler.num_steps,
            "layout": layout_record(self.ctx),
            "model": config.model.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "versions": versions(),
            **{name: part.state() for name, part in self.kept.items()},
        }
        self.store.save(progress.step, self.models, self.optimizer, state)

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
        load_weights(reader, self.models, self.ctx)
        load_optimizer(reader, self.models, self.optimizer, self.ctx)
        left, self.progress.step = self.progress.step, int(reader.state["step"])
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=int(reader.state["learning_rate_steps"]))
        for name in self.goes_back & reader.state.keys():
            self.kept[name].load(reader.state[name])
        self.progress.rewinds += 1
        self.save()
        self.store.finish()
        self.store.forget_after(self.progress.step)
        skipped = self.progress.consumed - int(reader.state["consumed_samples"])
        return f"step {left}: went back to step {self.progress.step}, skipping {skipped:,} samples in between"


def start(config: RunConfig, ctx: ParallelContext) -> tuple[Run, list[str]]:
    """Build model, optimizer and store; restore the newest good checkpoint, or begin anew.

    Returns:
        The run, and what to tell the user about where it starts.

    Raises:
        CheckpointError: there are checkpoints, but none is whole, or it is of another model.
    """
    agree(ctx, lambda: check_sources(config))
    if config.checkpoint.export_hf:  # refuse now what could not be written after the last step
        find_family(config.model.family).hf_config(config.model)
    models = build_chunks(config, ctx)
    initialize_weights(models, Initialisation.of(config), ctx)
    chunks = wrap_chunks(models, config, ctx)
    offload = attach_offload(models, config, ctx)
    store = CheckpointStore(Path(config.run_dir) / "checkpoints", ctx, config.checkpoint)
    newest, rejected = store.newest_good()
    notes = [f"rejected checkpoint {reason}" for reason in rejected]
    if newest is None and rejected:
        raise CheckpointError(
            f"{store.root}: none of its {len(rejected)} checkpoints is whole ({'; '.join(rejected)}); "
            "mend one, or move them away to begin anew"
        )
    reader = None
    if newest is not None:
        reader = CheckpointReader(newest)
        check_model(config, reader)
        load_weights(reader, models, ctx)
    elif config.checkpoint.load or config.checkpoint.init_from_hf:
        strict = config.checkpoint.load_strict
        source = open_weights(config.checkpoint)
        if isinstance(source, CheckpointReader) and (problems := verify(source.folder, ctx)):
            raise CheckpointError(f"{source.folder}: is not whole: {problems[0]}")
        if strict:
            check_model(config, source)
        left = load_weights(source, models, ctx, strict=strict, vocab_size=config.model.vocab_size)
        notes.append(f"starting from the weights of {source.folder}")
        notes += [f"not loaded: {reason}" for reason in left]
    # The optimizer takes its fp32 master weights from the model, so it is built after the weights are there.
    optimizer = build_optimizer(chunks, config)
    scheduler = build_scheduler(optimizer, config)
    progress = Progress(train_samples=config.planned_samples())
    if reader is not None:
        load_optimizer(reader, models, optimizer, ctx)
        same_layout = load_rng(reader, ctx)
        notes += _restore_progress(reader, progress, scheduler, same_layout)
    elif not (config.checkpoint.load or config.checkpoint.init_from_hf):
        notes.append("starting from new weights")
        if config.init.salience:
            notes.append(calibrate(models, chunks, optimizer, config, ctx, progress.train_samples))
    if config.checkpoint.interval:
        store.reserve(models, optimizer)
    saved = reader.state if reader is not None else {}
    return Run(config, ctx, models, chunks, optimizer, scheduler, store, progress, offload, saved), notes


def _restore_progress(
    reader: CheckpointReader, progress: Progress, scheduler: OptimizerParamScheduler, same_layout: bool
) -> list[str]:
    state, needed = reader.state, progress.train_samples
    try:
        progress.step, progress.consumed = int(state["step"]), int(state["consumed_samples"])
        progress.skipped, progress.train_samples = int(state["skipped_steps"]), int(state["train_samples"])
        progress.rewinds = int(state.get("rewinds", 0))
        rate_steps = int(state["learning_rate_steps"])
        saved = " ".join(f"{name}{size}" for name, size in state["layout"].items())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{reader.folder}: state.json does not say where the run stood ({type(error).__name__}: {error})"
        ) from None
    scheduler.num_steps = 0
    scheduler.step(increment=rate_steps)
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


def check_model(config: RunConfig, source: WeightSource) -> None:
    """Refuse weights of another architecture, naming what differs.

    Raises:
        CheckpointError: a field of the model differs.
    """
    free = {"family", "init_std", "output_init_std", "norm_init", "max_position_embeddings"}
    saved, wanted = source.arch.model_dump(mode="json"), config.model.model_dump(mode="json")
    different = [
        f"model.{key}: {saved.get(key)!r} saved, {value!r} configured"
        for key, value in wanted.items()
        if key not in free and saved.get(key) != value
    ]
    if different:
        raise CheckpointError(f"{source.folder}: is of another model: {'; '.join(different)}")


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
