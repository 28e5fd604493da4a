"""`plan`: ranks the layouts of a model on a cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flagscale_like.cli.base import ConfigFile, Overrides, app, example, model_to_plan, new_file
from flagscale_like.cli.describe import describe_iteration, find_cluster, reward_models
from flagscale_like.errors import ConfigError

if TYPE_CHECKING:
    from flagscale_like.cluster import ClusterSpec
    from flagscale_like.config import RunConfig
    from flagscale_like.planner.search import Plan, Ranking


@app.command(epilog=example("flagscale-like plan examples/aquila2/34b.yaml --cluster 64x8xA100-40 --write best.yaml"))
def plan(  # typer makes an option of every parameter
    config_file: ConfigFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str,
        typer.Option(help="NODESxDEVICESxNAME, for example 64x8xH100. The NAME `this` measures this machine's device."),
    ] = "1x8xH100",
    network_gb_per_s: Annotated[
        float | None, typer.Option(help="Network bandwidth of one device in one direction, GB/s.", min=0.001)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of layouts to list.")] = 10,
    max_vpp: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of model chunks on a stage; 1: no interleaving.")
    ] = None,
    imbalance: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Tokens that come to the expert-parallel rank with the most, relative to the mean. 1.2 without the option.",
        ),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Try activation offload for layouts that do not fit the memory.")
    ] = False,
    rehearse: Annotated[
        int, typer.Option(min=0, help="Check this many of the fastest layouts with a rehearsal (see `rehearse`).")
    ] = 0,
    write: Annotated[Path | None, typer.Option(help="File to write the YAML of the best layout to.")] = None,
) -> None:
    """Rank the layouts of a model on a cluster by expected tokens per second, and say why the other layouts are slower."""
    from dataclasses import replace

    from flagscale_like.config import load_config
    from flagscale_like.planner.evidence import describe_evidence
    from flagscale_like.planner.report import (
        describe_memory,
        describe_ranking,
        describe_time,
        updated_config,
    )
    from flagscale_like.planner.search import Goal, rank_layouts

    if rehearse and cluster.lower().endswith("xthis"):
        raise ConfigError(
            "--rehearse uses no device, and --cluster names this machine's: name another, such as 1x8xH100"
        )
    new_file(write, "--write")
    config = load_config(config_file, overrides or (), model_to_plan)
    place = find_cluster(cluster, config, 1)
    if network_gb_per_s is not None:
        place = replace(place, network_gb_per_s=network_gb_per_s)
    cuda = place.device.is_gpu
    goal = Goal.of(config, cuda=cuda)
    if imbalance is not None:
        if config.model.experts is None:
            raise ConfigError(f"--imbalance ({imbalance}) is of experts, and the model has none: leave it out")
        goal = replace(goal, imbalance=imbalance)
    ranking = rank_layouts(goal, place, offload=offload, max_vpp=max_vpp)
    best = ranking.plans[0] if config.rl is None else first_with_room(config, ranking, cuda=cuda)
    if config.lora is not None:
        typer.echo(config.describe_parameters())
    typer.echo(describe_ranking(ranking, place, top=top))
    typer.echo(f"\nthe best: {best.layout.describe()}: {describe_time(best)}\n{describe_memory(best.memory)}")
    if config.rl is not None:
        describe_iteration(config, best, place, cuda=cuda)
    if cuda:
        typer.echo(describe_evidence(best, goal, place))
    if rehearse:
        check_by_rehearsal(config, ranking.plans[:rehearse], place)
    if write is not None:
        try:
            write.write_text(updated_config(config, best.layout).to_yaml(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--write {write}: cannot be written: {error.strerror}") from None
        typer.echo(f"wrote {write}")


def first_with_room(config: RunConfig, ranking: Ranking, *, cuda: bool) -> Plan:
    """The fastest plan of the policy's learning that has room for the other models and for drawing as well.

    Raises:
        ConfigError: none has.
    """
    from flagscale_like.planner.iteration import plan_iteration

    rewards, least = reward_models(config)[0], math.inf
    for place, plan in enumerate(ranking.plans, 1):
        found = plan_iteration(config, plan.layout, plan.memory, rewards, prompt=1, cluster=None, cuda=cuda)
        if found.peak_bytes <= ranking.budget_bytes:
            if place > 1:
                typer.echo(
                    f"of the layouts that fit the policy alone, number {place} is the first with room for all models"
                )
            return plan
        least = min(least, found.peak_bytes)
    raise ConfigError(
        f"{len(ranking.plans)} layouts fit the policy alone, and none has room for all models of the run: the nearest needs "
        f"{least / 2**30:.1f} of {ranking.budget_bytes / 2**30:.1f} GiB: give more devices, or fewer rl.rollout.rows"
    )


def check_by_rehearsal(config: RunConfig, plans: Sequence[Plan], cluster: ClusterSpec) -> None:
    """Rehearse plans, and print a line on each."""
    os.environ["FLAGSCALE_LIKE_DEVICE"] = "cpu"  # before torch and megatron-core are set up: no device is used
    from flagscale_like.recipes.rehearse import check_plans, rehearsed_kind

    typer.echo("\nrehearsed:")
    for _, _, line in check_plans(config, plans, cluster, rehearsed_kind("cuda" if cluster.device.is_gpu else "cpu")):
        typer.echo(line)
