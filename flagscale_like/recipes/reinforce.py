"""Reinforcement learning: models, prompts, generation engine, reward and parts put together, from a run's configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from flagscale_like.checkpoint.format import value_heads_of
from flagscale_like.checkpoint.opened import open_adapted
from flagscale_like.config import JudgeReward, RunConfig
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError, required
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import GenerationEngine
from flagscale_like.model.spec import ModelSpec, Precision, layout_beside
from flagscale_like.objectives.policy import PolicyLoss, PolicyOptions
from flagscale_like.recipes.pretrain import MakeParts, announce, export_run, make_watchdog, monitors_of, what_remains
from flagscale_like.rl.answers import RewardSource
from flagscale_like.rl.apart import draw_for_others
from flagscale_like.rl.generators import build_generator, check_generator, generator_notes, load_weights
from flagscale_like.rl.guarding import build_guarding
from flagscale_like.rl.held_out import HeldOut
from flagscale_like.rl.iteration_log import IterationLog
from flagscale_like.rl.loop import RlRun
from flagscale_like.rl.models import build_models
from flagscale_like.rl.prompts import Prompts, Row, Words, read_prompts
from flagscale_like.rl.rewards import Surroundings, build_reward
from flagscale_like.rl.state import RlState
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import ParallelContext, agree
from flagscale_like.training.clock import Clock
from flagscale_like.training.guard import Guard, suspects
from flagscale_like.training.live import LiveLine
from flagscale_like.training.metrics import Reporter
from flagscale_like.training.parts import Parts
from flagscale_like.training.plan import Progress, last_step
from flagscale_like.training.profile import StepProfiler
from flagscale_like.training.recovery import Ledger
from flagscale_like.training.run import Run, Start, start
from flagscale_like.training.standard_parts import GarbageCollection, Saves, StopSignal
from flagscale_like.training.trackers import check_trackers

# The policy's engine -> what draws rollouts with its weights; and what scores them.
MakeGenerator = Callable[[RunConfig, Engine, Words], GenerationEngine]
MakeReward = Callable[[RunConfig, ParallelContext, Words], RewardSource]
# The tokenizer, and the prompts.
ReadPrompts = Callable[[RunConfig, ParallelContext], tuple[Words, list[Row]]]


def words_and_prompts(config: RunConfig, ctx: ParallelContext) -> tuple[Words, list[Row]]:
    """What data.tokenizer and data.prompts hold."""
    words = agree(ctx, lambda: Words(config))
    return words, agree(ctx, lambda: read_prompts(config, words))


def reward_of(config: RunConfig, ctx: ParallelContext, words: Words) -> RewardSource:
    """What scores rollouts, by rl.reward."""
    return build_reward(config.required_rl.reward, surroundings(config, ctx, words))


def surroundings(config: RunConfig, ctx: ParallelContext, words: Words) -> Surroundings:
    """What the rewards and judges of a run are built in."""

    def open_engine(options: JudgeReward) -> tuple[OwnEngine, Path]:
        return open_generator(Path(options.path or ""), ctx, precision=config.train.precision)

    return Surroundings(
        ctx,
        seq_length=config.train.seq_length,
        tokenizer=Path(required(words.folder, "data.tokenizer")),
        open_engine=open_engine,
        say=lambda line: print(line, flush=True) if ctx.is_main else None,
    )


def open_generator(path: Path, ctx: ParallelContext, *, precision: Precision) -> tuple[OwnEngine, Path]:
    """A generation engine on a model's own weights, on the layout of the run, and the folder of its tokenizer.

    Raises:
        CheckpointError: it is no language model, or has no tokenizer.
    """
    opened = open_adapted(path, adapter=None)
    if opened.tokenizer is None:
        raise CheckpointError(f"{path}: has no tokenizer, and a judge reads and writes text")
    if value_heads_of(opened.source):
        raise CheckpointError(f"{path}: is a reward model, and a judge has to write: give a language model")
    spec = ModelSpec(
        arch=opened.source.arch,
        parallel=layout_beside(opened.source.arch, ctx.layout),
        precision=precision,
        lora=getattr(opened.source, "lora", None),
    )
    engine = Engine.build(spec, ctx, source=opened.source)
    return OwnEngine(engine, decode=Tokenizer(opened.tokenizer).decode), opened.tokenizer


def draw(config: RunConfig, ctx: ParallelContext) -> None:
    """What the ranks of rl.rollout.apart do: draw rollouts for those that learn, until these are done.

    Raises:
        PlatformError: vLLM is asked for, and is not installed.
        PeerLostError: the ranks that learn have ended without a word.
    """
    check_generator(config)
    words, engine = Words(config), Engine.build(ModelSpec.of(config), ctx)
    assert ctx.bridge is not None
    generator = build_generator(config, engine, words)
    draw_for_others(generator, engine, ctx.bridge, lambda version: load_weights(generator, engine, version))


def reinforce(
    config: RunConfig,
    ctx: ParallelContext,
    *,
    make_generator: MakeGenerator = build_generator,
    make_reward: MakeReward = reward_of,
    read: ReadPrompts = words_and_prompts,
    parts: MakeParts | None = None,
) -> Progress:
    """Run to the last iteration, to exit_at_step, or until SIGTERM / SIGINT; save, and return where the run stands.

    Args:
        make_generator, make_reward, read: in the place of what the configuration names.
        parts: more parts for the run; assemble() has their place in the order.

    Raises:
        DivergedError: the guard (training.guard) stopped the run, or the critic diverged.
        CheckpointError: a save failed, and checkpoint.on_error says stop, or it was the last one; or see build_models().
        DataError, ConfigError: prompts or tokenizer cannot be used; the reward failed on a rollout.
        PlatformError: vLLM is asked for, and is not installed.
    """
    check_generator(config)
    words, rows = read(config, ctx)
    check_trackers(config.logging)
    begun = start(config, ctx)
    with ExitStack() as closing:
        iterations = assemble(config, begun, closing, Prompts(rows, config.train.seed), words, parts)(
            make_generator(config, begun.engine, words), make_reward(config, ctx, words)
        )
        run = iterations.run
        if config.train.eval_interval:
            run.evaluate = held_out(
                iterations, agree(ctx, lambda: read_prompts(config, words, config.data.eval_prompts))
            )
        if config.checkpoint.interval:
            run.store.reserve(run.fragments)
        announce(run, [*begun.notes, f"{len(rows)} prompts", *generator_notes(config)])
        run.parts.begin(run.reporter)
        iterations.iterate()
        iterations.close()
        run.parts.finish(run.reporter)
        if run.progress.step < last_step(config):
            run.reporter.say(f"stopped at step {run.progress.step}; {what_remains(config)}")
            return run.progress
        if config.checkpoint.export_hf:
            run.watchdog.beat(run.progress.step, "exporting", slow=True)
            run.reporter.say(
                f"exported {export_run(run)}: {config.train.precision} weights of step {run.progress.step}"
            )
        run.reporter.say(f"done: step {run.progress.step}; everything is in {config.run_dir}")
    return run.progress


def held_out(iterations: RlRun, rows: Sequence[Row]) -> HeldOut:
    """What a run measures on held-out prompts."""
    run = iterations.run
    return HeldOut(
        run.config,
        iterations.models.policy,
        iterations.words,
        lambda answers: iterations.reward.scores(answers),
        rows,
        asleep=iterations.asleep,
        beat=lambda: run.watchdog.beat(run.progress.step, "evaluation"),
    )


def assemble(  # what a run is put together of
    config: RunConfig,
    begun: Start,
    closing: ExitStack,
    prompts: Prompts,
    words: Words,
    make_parts: MakeParts | None = None,
) -> Callable[[GenerationEngine, RewardSource], RlRun]:
    """The run around a started policy: its models, parts and log; what draws and what scores is given to what is returned."""
    engine, progress, ctx, folder = begun.engine, begun.progress, begun.engine.ctx, RunFolder(config.run_dir)
    models = build_models(config, begun)
    ledger = [Ledger(folder.root, progress.step)] if ctx.is_main else []
    reporter = closing.enter_context(Reporter(folder, progress, is_main=ctx.is_main))
    watchdog = closing.enter_context(make_watchdog(config, begun))
    clock, state = Clock(), RlState(config.required_rl.kl.coefficient)
    log = IterationLog(config, ctx, clock)
    guard = Guard(config.monitors, rewinds=progress.rewinds, suspects=suspects(config), expects_gradient=False)
    saves = Saves(begun.store, config.checkpoint, watchdog)
    guarding = build_guarding(config, ctx, progress, begun.notes)
    parts = [
        StopSignal(watchdog),
        *([StepProfiler(config.train.profile, folder, ctx)] if config.train.profile else []),
        *monitors_of(config, engine),
        log,
        LiveLine(config, reporter.console),
        state,  # it may have rollouts drawn, which take prompts
        prompts,
        *([guarding] if guarding else []),
        *(make_parts(engine, *(one.engine for one in models.beside)) if make_parts else ()),
        guard,
        *ledger,
        saves,
        GarbageCollection(config.train.gc_interval),
    ]
    run = Run(
        config=config,
        engine=engine,
        objective=PolicyLoss(PolicyOptions(config.required_rl.clip)),
        scheduler=begun.scheduler,
        store=begun.store,
        progress=progress,
        parts=closing.enter_context(Parts(parts)),
        guard=guard,
        saves=saves,
        reporter=reporter,
        watchdog=watchdog,
        beside=models.beside,
        clock=clock,
        origin=begun.origin,
    )
    run.state()  # so that two that save under one name are found now, and not at the first save
    run.parts.load(begun.saved)
    return lambda generator, reward: RlRun(
        run, models, generator, reward, prompts=prompts, words=words, state=state, numbers=log.note, guarding=guarding
    )
