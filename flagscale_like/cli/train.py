"""`train`: trains the run that a YAML file describes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flagscale_like.cli.base import ConfigFile, Overrides, app, example, model_of_source, refuse_unread
from flagscale_like.cli.describe import describe
from flagscale_like.errors import ConfigError
from flagscale_like.run_folder import RunFolder

if TYPE_CHECKING:
    from flagscale_like.config import RunConfig
    from flagscale_like.runtime.launched import Launch
    from flagscale_like.runtime.parallel import ParallelContext


@app.command(epilog=example("flagscale-like train examples/aquila2/tiny.yaml train.steps=50 parallel.pp=2"))
def train(
    config_file: ConfigFile,
    overrides: Overrides = None,
    nproc_per_node: Annotated[
        int | None,
        typer.Option(help="Ranks to start on this machine. Default: one for each GPU; on a CPU, tp*pp*cp.", min=1),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            help="How often all ranks are restarted after a failure. They resume from the last checkpoint.", min=0
        ),
    ] = 0,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and exit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration and the data, print the plan, and exit.")
    ] = False,
    world_size: Annotated[int | None, typer.Option(help="With --dry-run: number of ranks to plan for.", min=1)] = None,
    cluster: Annotated[
        str | None, typer.Option(help="With --dry-run: cluster to plan for, for example 64x8xH100.")
    ] = None,
) -> None:
    """Start or resume the run that a YAML file describes. Starts the ranks, or runs as a rank of torchrun."""
    from flagscale_like.config import load_config
    from flagscale_like.runtime.launched import current_launch

    if not dry_run:
        refuse_unread("--dry-run", world_size=world_size, cluster=cluster)
    config = load_config(config_file, overrides or (), model_of_source)
    if print_config:  # loads no torch
        typer.echo(config.to_yaml(), nl=False)
        return
    if not dry_run and current_launch() is None:
        typer.echo(f"{config_file} is read; loading torch and megatron-core")
    from flagscale_like.runtime.launch import default_processes, launch

    if (rank := current_launch()) is not None:
        _check_rank(rank, nproc_per_node)
        _train_here(config)
        return
    processes = nproc_per_node or default_processes(config.parallel.smallest_world + config.ranks_apart)
    ranks = (world_size if dry_run else None) or processes
    dp = config.data_parallel_size(ranks)
    if dry_run:
        describe(config, ranks, dp, cluster, local=ranks == processes and cluster is None)
        return
    if processes == 1 and max_restarts == 0:
        _train_here(config)
        return
    typer.echo(f"starting {processes} ranks on this machine")
    arguments = ["train", str(config_file), *(overrides or ())]
    raise SystemExit(launch(processes, arguments, max_restarts=max_restarts))


def _check_rank(rank: Launch, nproc_per_node: int | None) -> None:
    """Refuse to start ranks from one, and say that all were restarted."""
    if nproc_per_node is not None:
        raise ConfigError(
            f"--nproc-per-node ({nproc_per_node}) starts ranks, and this process is rank {rank.rank} of "
            f"{rank.world_size} already: leave it out"
        )
    if rank.restart and rank.rank == 0:
        typer.echo(f"restarting all ranks ({rank.restart} of {rank.max_restarts}): the error above ended one of them")


def _train_here(config: RunConfig) -> None:
    from flagscale_like.data.pretrain import prepare_once
    from flagscale_like.recipes.pretrain import pretrain
    from flagscale_like.recipes.reinforce import draw, reinforce
    from flagscale_like.recipes.rounds import run_rounds
    from flagscale_like.runtime.launched import current_launch
    from flagscale_like.runtime.parallel import agree, parallel_context
    from flagscale_like.training.plan import last_step

    rank = current_launch()
    config.data_parallel_size(rank.world_size if rank else 1)
    with parallel_context(config.parallel, seed=config.train.seed, apart=config.ranks_apart) as ctx:
        if ctx.bridge is not None and ctx.bridge.is_apart:
            draw(config, ctx)
            return
        _make_run_folder(config, ctx)
        with _held(config, ctx):
            # Rank 0 makes the files. If it fails, `agree` raises its error on every rank.
            workers = os.cpu_count() or 1
            agree(ctx, lambda: prepare_once(config, workers, typer.echo) if ctx.is_main else None)
            learn = pretrain if config.rl is None else run_rounds if config.rl.rounds.count else reinforce
            progress = learn(prepare_once(config), ctx)
        is_main = ctx.is_main
    if config.checkpoint.export_hf and is_main and progress.step >= last_step(config):
        _verify_export(config, progress.step)


def _verify_export(config: RunConfig, step: int) -> None:
    """Compare the logits of RUN_DIR/hf with the native model's, where there is memory for both. The ranks have parted."""
    import psutil
    import torch

    from flagscale_like.checkpoint.hf import plan_export
    from flagscale_like.cli.convert import verify_export
    from flagscale_like.recipes.pretrain import export_source
    from flagscale_like.runtime.platforms import get_platform

    _, source = export_source(config, step)
    needed = 3 * 4 * config.model.parameter_count()  # the native model and transformers', fp32, and one that is loaded
    platform = get_platform()
    free = psutil.virtual_memory().available
    free = free if platform.device.type == "cpu" else min(free, platform.total_memory_bytes())
    way_out = "`convert export` verifies on a machine that has it"
    if needed > free:
        typer.echo(
            f"not verified: the check needs {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} are free; {way_out}"
        )
        return
    try:
        verify_export(plan_export(source, dtype=config.train.precision), RunFolder(config.run_dir).hf, None)
    except (MemoryError, torch.OutOfMemoryError):
        typer.echo(f"not verified: memory for the check ran out; {way_out}")


@contextmanager
def _held(config: RunConfig, ctx: ParallelContext) -> Iterator[None]:
    """Keep other processes from training in the run's folder. All ranks call it; rank 0 holds the lock.

    Raises:
        ConfigError: on every rank, if another process holds it.
    """
    from flagscale_like.run_lock import RunLock

    lock, problem = RunLock(RunFolder(config.run_dir).lock), None
    with ExitStack() as held:
        if ctx.is_main:
            try:
                held.enter_context(lock)
            except ConfigError as error:
                problem = str(error)
            except OSError as error:
                problem = f"run_dir {config.run_dir}: the lock cannot be written: {error.strerror}"
        if problem := ctx.broadcast(problem):
            raise ConfigError(problem)
        yield


def _make_run_folder(config: RunConfig, ctx: ParallelContext) -> None:
    try:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {config.run_dir}: cannot be made: {error.strerror}") from None
    ctx.barrier()
