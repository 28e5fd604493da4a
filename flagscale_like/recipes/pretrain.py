"""Pretraining: engine, data, objective and parts put together, from a run's configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch.utils.data import Dataset

from flagscale_like.checkpoint.adapters import AdaptedWeights, MergedWeights, open_base
from flagscale_like.checkpoint.companions import companions_at
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export_on_ranks
from flagscale_like.checkpoint.manifest import step_name
from flagscale_like.config import Contrastive, RunConfig
from flagscale_like.data.blend import is_packed
from flagscale_like.data.feed import Feed
from flagscale_like.data.groups import notes_on_groups
from flagscale_like.data.order import Samples
from flagscale_like.data.pretrain import build_dataset, build_datasets, check_sources, micro_batches
from flagscale_like.data.selection import SourcesDataset
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import required
from flagscale_like.families import find_family
from flagscale_like.model.offload import attach_offload
from flagscale_like.objectives.choice import objective_of
from flagscale_like.recipes.reward_validation import KeptValidation
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import ParallelContext, agree
from flagscale_like.runtime.watchdog import Watchdog
from flagscale_like.training.changes import source_record
from flagscale_like.training.clock import Clock
from flagscale_like.training.evaluation import Measured, evaluate
from flagscale_like.training.expert_loads import ExpertMonitor
from flagscale_like.training.guard import Guard, suspects
from flagscale_like.training.live import LiveLine
from flagscale_like.training.loop import evaluate as report_evaluation
from flagscale_like.training.loop import run_steps
from flagscale_like.training.metrics import Reporter
from flagscale_like.training.monitors import StepMonitors
from flagscale_like.training.parts import Part, Parts
from flagscale_like.training.plan import Progress, last_step
from flagscale_like.training.profile import StepProfiler
from flagscale_like.training.recovery import Ledger
from flagscale_like.training.reference import Reference, Unstored, pair_sources, reference_of
from flagscale_like.training.run import Run, Start, start
from flagscale_like.training.salience import calibrate
from flagscale_like.training.source_selection import SourceSelection
from flagscale_like.training.standard_parts import GarbageCollection, OffloadReport, Saves, StopSignal
from flagscale_like.training.step_log import StepLog
from flagscale_like.training.trackers import check_trackers, make_trackers
from flagscale_like.training.trail import DataTrail

# The engine of a run, and those beside it -> parts for it, the same on every rank.
MakeParts = Callable[..., Sequence[Part]]


def pretrain(config: RunConfig, ctx: ParallelContext, *, parts: MakeParts | None = None) -> Progress:
    """Run to the last step, to exit_at_step, or until SIGTERM / SIGINT; save, and return where the run stands.

    Args:
        parts: more parts for the run; assemble() has their place in the order.

    Raises:
        DivergedError: the guard (training.guard) stopped the run.
        CheckpointError: a save failed, and checkpoint.on_error says stop, or it was the last one.
        DataError, CheckpointError, ConfigError: see the functions that load and build.
    """
    agree(ctx, lambda: check_sources(config))
    check_trackers(config.logging)
    if config.checkpoint.export_hf:  # refuse now what could not be written after the last step
        find_family(config.model.family).config_with_head(config.model, getattr(config.objective, "heads", 0))
    begun = start(config, ctx)
    with ExitStack() as closing:
        run = assemble(config, begun, closing, parts)
        if config.checkpoint.interval:
            run.store.reserve(run.fragments)
        announce(run, begun.notes)
        run.parts.begin(run.reporter)
        run_steps(run)
        if run.progress.step == config.train.steps and run.evaluate and config.data.tests:
            report_evaluation(run, "test")
        run.parts.finish(run.reporter)
        if run.progress.step < last_step(config):
            run.reporter.say(f"stopped at step {run.progress.step}; {what_remains(config)}")
            return run.progress
        if config.checkpoint.export_hf:
            run.watchdog.beat(run.progress.step, "exporting", slow=True)
            out = export_run(run)
            run.reporter.say(f"exported {out}: {config.train.precision} weights of step {run.progress.step}")
        step, steps = run.progress.step, config.train.steps
        run.reporter.say(
            f"done: step {step}{f' of {steps}' if step <= steps else ''}; everything is in {config.run_dir}"
        )
    return run.progress


def assemble(config: RunConfig, begun: Start, closing: ExitStack, make_parts: MakeParts | None = None) -> Run:
    """The run's data and parts around a started engine. What must be closed however the run ends goes on `closing`."""
    engine, progress, ctx, folder = begun.engine, begun.progress, begun.engine.ctx, RunFolder(config.run_dir)
    if begun.new and config.init.salience:
        begun.notes.append(calibrate(config, engine, progress.train_samples))
    offload = attach_offload(engine.models, config, ctx)
    ledger = [Ledger(folder.root, progress.step)] if ctx.is_main else []
    reporter = closing.enter_context(Reporter(folder, progress, is_main=ctx.is_main))
    watchdog = closing.enter_context(make_watchdog(config, begun))
    data, valid_data = build_datasets(
        config, ctx, train_samples=progress.train_samples, valid_samples=evaluation_samples(config)
    )
    reference = make_reference(config, begun, [data, valid_data], watchdog)
    selection = SourceSelection(config, engine, data, begun.saved) if isinstance(data, SourcesDataset) else None
    mixture = selection.mixture if selection else None
    feed = Feed(micro_batches(data, config, ctx, consumed=progress.consumed, mixture=mixture))
    closing.callback(feed.close)
    objective, clock = objective_of(config, packed=is_packed(data)), Clock()
    guard = Guard(config.monitors, rewinds=progress.rewinds, suspects=suspects(config))
    saves = Saves(begun.store, config.checkpoint, watchdog)
    # The order in which the parts are asked and told. What a later one reads, an earlier one has made: parts from outside
    # come after all that measure a step, and before the guard, which reports their events, and the saves.
    parts: list[Part | None] = [
        StopSignal(watchdog),
        StepProfiler(config.train.profile, folder, ctx) if config.train.profile else None,
        *monitors_of(config, engine),
        selection,
        DataTrail(config, ctx, progress, data, mixture) if config.data.sources else None,
        StepLog(config, ctx, clock, feed, objective),
        LiveLine(config, reporter.console),
        reference,
        OffloadReport(offload) if offload else None,
        *(make_parts(engine) if make_parts else ()),
        guard,
        *ledger,
        saves,
        keep_validation(config, begun, valid_data),
        GarbageCollection(config.train.gc_interval),
    ]
    run = Run(
        config=config,
        engine=engine,
        objective=objective,
        scheduler=begun.scheduler,
        store=begun.store,
        progress=progress,
        parts=closing.enter_context(Parts([part for part in parts if part is not None])),
        guard=guard,
        saves=saves,
        feed=feed,
        reporter=reporter,
        watchdog=watchdog,
        clock=clock,
        documents=source_record(config),
        origin=begun.origin,
    )
    run.state()  # so that two that save under one name are found now, and not at the first save
    run.parts.load(begun.saved)
    run.evaluate = evaluator(run, valid_data, reference) if valid_data is not None else None
    return run


def monitors_of(config: RunConfig, engine: Engine) -> list[Part]:
    """What watches a run's steps."""
    experts = (
        [ExpertMonitor(config.monitors.experts, engine)] if config.model.experts and config.monitors.experts else []
    )
    return [StepMonitors(config.monitors, engine), *experts]


def make_reference(
    config: RunConfig, begun: Start, splits: Sequence[Samples | None], watchdog: Watchdog
) -> Reference | Unstored | None:
    """The log-probabilities of the reference, where the objective needs them; the splits' datasets get them."""
    if getattr(config.objective, "reference", "none") == "none":
        return None
    step = begun.progress.step
    beat = functools.partial(watchdog.beat, step, "reference", slow=True)
    reference = reference_of(
        config, begun.engine, required(splits[0], "training data"), step=step, weights=begun.weights, beat=beat
    )
    begun.notes.append(reference.note)
    for split in splits:
        if split is not None:
            reference.attach(split)
    return reference


def keep_validation(config: RunConfig, begun: Start, valid_data: Dataset | None) -> Part | None:
    """What writes, beside a trained reward model, what it was validated on, where the run has a validation split."""
    if config.objective.kind != "reward" or valid_data is None or not config.checkpoint.interval:
        return None
    return KeptValidation(begun, pair_sources(valid_data), config.train.steps)


def what_remains(config: RunConfig) -> str:
    """What a run that was asked to stop has saved, in words."""
    if config.checkpoint.interval:
        return "the same command goes on from the newest checkpoint"
    return "nothing was saved, because checkpoint.interval is 0"


def evaluation_samples(config: RunConfig) -> int:
    """Samples of one evaluation; 0 where the run makes none."""
    return config.train.eval_steps * config.train.global_batch_size if config.train.eval_interval else 0


def evaluator(
    run: Run, valid_data: Samples, reference: Reference | Unstored | None = None
) -> Callable[[str], Measured]:
    """The loss on a split, by its name: always on the same samples of it."""
    config, ctx, train = run.config, run.ctx, run.config.train

    def evaluate_split(split: str) -> Measured:
        data = valid_data if split == "validation" else build_dataset(config, ctx, "test", evaluation_samples(config))
        if reference is not None:
            reference.attach(data)
        found = evaluate(
            run.engine,
            run.objective,
            micro_batches(data, config, ctx),
            steps=train.eval_steps,
            micro_batches=train.global_batch_size // (train.micro_batch_size * ctx.dp),
            sources=config.data.source_names,
            on_step=functools.partial(run.watchdog.beat, run.progress.step, "evaluation"),
        )
        return found.measured(run.objective, split)

    return evaluate_split


def make_watchdog(config: RunConfig, begun: Start) -> Watchdog:
    """The watchdog of this rank, with the limits of `resilience`."""
    limits, ctx = config.resilience, begun.engine.ctx
    watchdog = Watchdog(
        RunFolder(config.run_dir).hang,
        ctx.rank,
        ctx.world_size,
        first_timeout_s=limits.first_step_timeout_s,
        timeout_s=limits.step_timeout_s,
        grace_s=limits.grace_s,
    )
    if begun.saved:
        watchdog.kept = f"The newest checkpoint is {step_name(begun.progress.step)}"
    return watchdog


def announce(run: Run, notes: list[str]) -> None:
    """Write config.yaml, begin the trackers' runs, and say what is trained, where, and from what it starts."""
    config, ctx, par = run.config, run.ctx, run.config.parallel
    if ctx.is_main:
        RunFolder(config.run_dir).config.write_text(config.to_yaml(), encoding="utf-8")
        run.reporter.trackers = make_trackers(config, run.reporter.say)
    run.reporter.say(
        f"{config.describe_parameters()} | tp {par.tp} pp {par.pp} vpp {par.vpp} dp {ctx.dp}"
        f"{f' ep {par.ep}' if config.model.experts else ''}"
        f"{f' cp {par.cp} {par.cp_kind}' if par.cp > 1 else ''}{' sp' if par.sp else ''}"
        f" on {ctx.world_size} x {ctx.platform.describe()} | {config.train.precision}"
    )
    if isinstance(config.objective, Contrastive) and ctx.is_main:
        notes = [*notes, *notes_on_groups([source.path for source in config.data.sources], config.objective.passages)]
    for note in notes:
        run.reporter.say(note)


def export_source(config: RunConfig, step: int) -> tuple[CheckpointReader, CheckpointReader | MergedWeights]:
    """The checkpoint of a step, and the weights that are exported of it: LoRA adapters are merged into their base."""
    reader = CheckpointReader(RunFolder(config.run_dir).checkpoints / step_name(step))
    if config.lora is None:
        return reader, reader
    base = open_base(reader, None, way_out="export the run with `convert export --base FOLDER`")
    return reader, MergedWeights(AdaptedWeights(base, reader))


def export_run(run: Run) -> Path:
    """Write RUN_DIR/hf from the checkpoint of the last step; the ranks share the files. All ranks call it.

    Raises:
        ConversionError: on every rank, where any rank could not write.
    """
    data, out = run.config.data, RunFolder(run.config.run_dir).hf
    reader, source = export_source(run.config, run.progress.step)
    tokenizer = companions_at(reader.folder) or (Path(data.tokenizer) if data.tokenizer else None)
    export_on_ranks(source, out, run.ctx, dtype=run.config.train.precision, tokenizer=tokenizer)
    return out
