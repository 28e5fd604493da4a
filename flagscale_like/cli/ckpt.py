"""`ckpt`: list, verify, show, reshard, prune and plan checkpoints."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from flagscale_like.cli.base import ConfigFile, Overrides, Processes, app, example, model_to_plan, new_file
from flagscale_like.run_folder import RunFolder

ckpt_app = typer.Typer(
    help="Look at checkpoints.", epilog=example("flagscale-like ckpt list runs/demo"), no_args_is_help=True
)
app.add_typer(ckpt_app, name="ckpt")


def _checkpoints_root(run: Path) -> Path:
    checkpoints = RunFolder(run).checkpoints
    return checkpoints if checkpoints.is_dir() else run


@ckpt_app.command("list", epilog=example("flagscale-like ckpt list runs/demo"))
def ckpt_list(run: Annotated[Path, typer.Argument(help="A run folder or its checkpoints/ folder.")]) -> None:
    """List a run's checkpoints, the newest first. Reads the manifests only."""
    from rich.console import Console
    from rich.table import Table

    from flagscale_like.checkpoint.manifest import TEMPORARY, read_latest, read_manifest, read_state, step_folders
    from flagscale_like.errors import CheckpointError

    root = _checkpoints_root(run)
    latest = read_latest(root)
    table = Table("step", "holds", "layout", "MB", "consumed samples", "folder", box=None)
    for folder in step_folders(root):
        try:
            size = sum(record.size_bytes for record in read_manifest(folder)) / 1e6
            state = read_state(folder)
            degrees = state.get("layout")
            known = isinstance(degrees, dict)
            layout = " ".join(f"{name}{degree}" for name, degree in degrees.items()) if known else "unknown"
            where = f"{folder}{' (latest)' if folder == latest else ''}"
            holds = "adapters" if state.get("lora") else "model"
            step, samples = str(state.get("step")), str(state.get("consumed_samples"))
            table.add_row(step, holds, layout, f"{size:,.1f}", samples, where)
        except CheckpointError as error:
            table.add_row(folder.name.removeprefix("step_"), "damaged", "", "", "", str(error))
    for folder in sorted(root.glob(f"{TEMPORARY}*")):
        table.add_row("", "unfinished", "", "", "", str(folder))
    if not table.row_count:
        raise CheckpointError(f"{root}: holds no checkpoints: give a run folder or its checkpoints/ folder")
    console = Console()
    Console(width=console.width if console.is_terminal else 1000).print(table)


@ckpt_app.command("verify", epilog=example("flagscale-like ckpt verify runs/demo"))
def ckpt_verify(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoints/ or a step_* folder.")],
    processes: Processes = None,
) -> None:
    """Compare the size and checksum of each file of a checkpoint, or of a run's newest checkpoint, with the manifest."""
    from flagscale_like.checkpoint.manifest import find_checkpoint, misnamed, read_records, verify_files
    from flagscale_like.errors import CheckpointError

    folder = find_checkpoint(checkpoint)
    began = time.perf_counter()
    problems = verify_files(folder, processes=processes or os.cpu_count() or 1)
    seconds, (records, index) = time.perf_counter() - began, read_records(folder)
    records = [*records, index] if index else records
    if problems:
        raise CheckpointError(f"{folder}: {len(problems)} of {len(records)} files are damaged: {'; '.join(problems)}")
    if wrong := misnamed(folder):
        raise CheckpointError(f"{folder}: {wrong[0]}")
    size = sum(record.size_bytes for record in records)
    typer.echo(f"{folder}: {len(records)} files are intact ({size / 1e6:,.1f} MB, {size / 1e9 / seconds:.2f} GB/s)")


@ckpt_app.command("show", epilog=example("flagscale-like ckpt show runs/demo --tensors"))
def ckpt_show(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoints/ or a step_* folder.")],
    tensors: Annotated[bool, typer.Option(help="Also list each tensor, its shape and its dtype.")] = False,
) -> None:
    """Print the content of a checkpoint: step, model, layout, versions, files, number of tensors."""
    import yaml

    from flagscale_like.checkpoint.format import CheckpointReader
    from flagscale_like.checkpoint.manifest import find_checkpoint, read_manifest

    folder = find_checkpoint(checkpoint)
    reader = CheckpointReader(folder)
    held = [kind for kind in ("param", "exp_avg", "exp_avg_sq") if reader.has(kind)]
    shown = {key: value for key, value in reader.state.items() if key != "config"}
    if reader.notes:
        shown["notes"] = list(reader.notes)
    files = {record.name: record.size_bytes for record in read_manifest(folder)}
    summary = {"folder": str(folder), **shown, "holds": held, "tensors": len(reader.shapes()), "file_bytes": files}
    typer.echo(yaml.safe_dump(summary, sort_keys=False), nl=False)
    if tensors:
        for key, shape in reader.shapes().items():
            typer.echo(f"{key} {list(shape)} {reader.dtype(key, 'param')}")


@ckpt_app.command("reshard", epilog=example("flagscale-like ckpt reshard runs/demo --out moved/demo --files 4"))
def ckpt_reshard(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoints/ or a step_* folder.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; must not exist.")],
    files: Annotated[int, typer.Option(min=1, help="Number of files to write, of equal size.")] = 1,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Omit the optimizer's moments.")] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Also record the sha256 of each file.")] = False,
    processes: Processes = None,
) -> None:
    """Rewrite a checkpoint as another number of files. Training on another layout does not need this: any layout loads it."""
    from flagscale_like.checkpoint.manifest import find_checkpoint
    from flagscale_like.checkpoint.reshard import reshard

    folder = find_checkpoint(checkpoint)
    records = reshard(
        folder, out, files=files, weights_only=weights_only, sha256=sha256, processes=processes or os.cpu_count() or 1
    )
    typer.echo(f"wrote {out} from {folder}: {len(records)} files, {sum(r.size_bytes for r in records) / 1e6:,.1f} MB")


@ckpt_app.command("prune", epilog=example("flagscale-like ckpt prune runs/demo --keep 2 --keep-every 1000"))
def ckpt_prune(
    run: Annotated[Path, typer.Argument(help="A run folder or its checkpoints/ folder. The run must not be training.")],
    keep: Annotated[int, typer.Option(min=1, help="Number of newest checkpoints to keep.")],
    keep_every: Annotated[
        int,
        typer.Option(min=0, help="Also keep checkpoints whose step is a multiple of this number; 0 turns this off."),
    ] = 0,
    dry_run: Annotated[bool, typer.Option(help="List the checkpoints to remove, without removing them.")] = False,
    processes: Processes = None,
) -> None:
    """Remove old checkpoints and the files of interrupted saves. The newest checkpoint that is intact is never removed."""
    from flagscale_like.checkpoint.manifest import newest_whole, remove, remove_leftovers, to_remove
    from flagscale_like.errors import CheckpointError

    root = _checkpoints_root(run)
    good, rejected = newest_whole(root, processes=processes or os.cpu_count() or 1)
    for reason in rejected:
        typer.echo(f"damaged: {reason}")
    if good is None:
        raise CheckpointError(f"{root}: holds no intact checkpoint: nothing was removed")
    gone = to_remove(root, keep=keep, keep_every=keep_every, good=good)
    if not dry_run:
        problems = remove(gone)
        remove_leftovers(root)
        if problems:
            raise CheckpointError("; ".join(problems))
    for folder in gone:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {folder}")
    typer.echo(f"{len(gone)} checkpoints {'would be removed' if dry_run else 'removed'}; {good} is intact")


@ckpt_app.command(
    "plan", epilog=example("flagscale-like ckpt plan examples/llama3/405b.yaml --world-size 16384 --load parallel.tp=4")
)
def ckpt_plan(  # typer makes an option of every parameter
    config_file: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks that save. Default: the layout's fewest.")
    ] = None,
    load: Annotated[
        list[str] | None,
        typer.Option(help="Override of the layout that loads: parallel.tp=4. Repeatable.", metavar="KEY=VALUE"),
    ] = None,
    load_world_size: Annotated[int | None, typer.Option(min=1, help="Ranks that load. Default: --world-size.")] = None,
    gb_per_s: Annotated[
        float, typer.Option(min=1e-9, help="Rate of the file system for all ranks together, GB/s.")
    ] = 100,
    node_gb_per_s: Annotated[
        float | None, typer.Option(min=1e-9, help="The most that a node of 8 ranks can read, GB/s.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="File to write the planned index to.")] = None,
) -> None:
    """Plan a checkpoint of any number of ranks and a load on another layout: files, bytes a rank, time. Saves nothing."""
    from flagscale_like.config import load_config
    from flagscale_like.errors import CheckpointError
    from flagscale_like.rehearsal.checkpoint_plan import States, describe_load, describe_save, plan_load, planned_index

    new_file(write, "--write")
    config = load_config(config_file, overrides or (), model_to_plan)
    saved = States.of(config, world_size or config.parallel.smallest_world)
    other = load_config(config_file, [*(overrides or ()), *(load or ())], model_to_plan)
    loaded = States.of(other, load_world_size or saved.layout.world_size)
    table = planned_index(saved)
    typer.echo(describe_save(table, saved.layout, gb_per_s))
    typer.echo(describe_load(table, plan_load(table, loaded), loaded.layout, gb_per_s, node_gb_per_s))
    if write is not None:
        try:
            table.save(write)
        except OSError as error:
            raise CheckpointError(f"--write {write}: cannot be written: {error.strerror}") from None
        typer.echo(f"wrote {write}")
