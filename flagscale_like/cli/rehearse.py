"""`rehearse`: takes steps as any rank of a run of any size, on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flagscale_like.cli.base import ConfigFile, Overrides, app, example, model_to_plan, new_file


@app.command(
    epilog=example("flagscale-like rehearse examples/aquila2/34b.yaml --world-size 512 --cluster 64x8xA100-40")
)
def rehearse(  # typer makes an option of every parameter
    config_file: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks of the run. Default: the devices of --cluster.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="NODESxDEVICESxNAME, for example 64x8xH100: the devices that the run is to fit.")
    ] = "1x8xH100",
    ranks: Annotated[
        str,
        typer.Option(
            help="Ranks to rehearse: auto (one of each kind of stage), stages (one of each stage), all, or numbers with "
            "commas: 0,3,511. With stages or all their operations are matched, and the step is replayed in time."
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Platform of the devices, by the name that FLAGSCALE_LIKE_DEVICE takes.")
    ] = "cuda",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for each rank's memory (JSON, plot, torch's snapshot) and events (JSON)."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="File to write the replayed step to, as a Chrome trace. Needs stages or all.")
    ] = None,
    time_only: Annotated[
        bool,
        typer.Option(
            "--time-only",
            help="Only match and replay: passes of micro-batches that repeat are run once, and no memory is followed. Needs "
            "stages or all.",
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print what the ranks say while they run.")] = False,
) -> None:
    """Take two steps as ranks of a run of any size, without its devices: memory, waits, collectives. Nothing is computed."""
    os.environ["FLAGSCALE_LIKE_DEVICE"] = "cpu"  # before torch and megatron-core are set up: no device is used
    from flagscale_like.cluster import GIB, parse_cluster, with_devices
    from flagscale_like.config import load_config
    from flagscale_like.data.synthetic import like_the_data
    from flagscale_like.errors import ConfigError, DoesNotFitError
    from flagscale_like.recipes.rehearse import nearest_change, record, rehearse, rehearsed_kind
    from flagscale_like.rehearsal.chrome_trace import write_trace
    from flagscale_like.rehearsal.rehearse import growing_segments, overflow_message
    from flagscale_like.rehearsal.report import describe, write
    from flagscale_like.rehearsal.timing import describe_timed, time_step

    new_file(trace, "--trace")
    if out is not None and out.exists() and (not out.is_dir() or any(out.glob("rank_*"))):
        raise ConfigError(f"--out {out}: holds a rehearsal already, or is a file: give the name of another folder")
    config = load_config(config_file, overrides or (), model_to_plan)
    place = parse_cluster(cluster)
    world = world_size or place.devices
    place = with_devices(place, world)
    whole = ranks in ("stages", "all")
    if trace is not None and not whole:
        raise ConfigError(f"--trace {trace} replays a whole pipeline: give --ranks stages (it is {ranks})")
    if time_only and (not whole or out is not None):
        raise ConfigError(
            "--time-only replays a whole pipeline, and follows no memory: give --ranks stages, and no --out"
        )
    say = typer.echo if verbose else lambda _: None
    if assumed := like_the_data(config)[1]:
        typer.echo(assumed)
    problems, records = [], []
    kind = rehearsed_kind(device)
    if time_only:
        records += record(config, place, kind, world_size=world, ranks=ranks)
    for found in () if time_only else rehearse(config, place, kind, world_size=world, ranks=ranks, say=say):
        typer.echo(describe(found))
        typer.echo(f"this process has taken {found.process_bytes / GIB:.1f} GiB at most\n")
        for path in write(found, out) if out is not None else ():
            typer.echo(f"wrote {path}")
        if not found.fits:
            message = overflow_message(found, place)
            typer.echo(f"{message}\n")
            problems.append((found, message))
        records += [found.record] if whole else []
    if whole:
        timed = time_step(records, config, place, keep_slices=trace is not None)
        typer.echo(describe_timed(timed) + "\n")
        if trace is not None:
            typer.echo(f"wrote {trace}: {write_trace(trace, timed.timeline, timed.stages):,} slices")
    if problems:
        found, message = problems[0]
        if grows := growing_segments([one for one, _ in problems]):
            raise DoesNotFitError(f"{message}; {grows}")
        change = nearest_change(config, place, kind, found, world, say=typer.echo)
        raise DoesNotFitError(f"{message}; {change}")
    if time_only:
        typer.echo("memory was not followed (--time-only)")
        return
    typer.echo("all rehearsed ranks fit" if place.device.is_gpu else "rehearsed")
