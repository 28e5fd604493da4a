"""`bench`: times the training loop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flagscale_like.cli.base import ConfigFile, Overrides, app, example, model_of_source
from flagscale_like.errors import ConfigError
from flagscale_like.json_files import write_json

if TYPE_CHECKING:
    from flagscale_like.config import RunConfig


@app.command(epilog=example("flagscale-like bench examples/aquila2/tiny.yaml --sweep train.micro_batch_size=1,2,4"))
def bench(  # typer makes an option of every parameter
    config_file: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before the timed ones.")] = 3,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE,VALUE: time each value. Several --sweep options time every combination."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also time a transformers model of the same shape, in one process.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Save a checkpoint after the last step, and report how long training waits.")
    ] = False,
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start. Default: one for each GPU; on a CPU, tp*pp*cp.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench"),
    result: Annotated[Path | None, typer.Option(hidden=True, help="File to which rank 0 writes its result.")] = None,
) -> None:
    """Time the training loop on synthetic tokens. Print tokens/s, TFLOP/s, MFU and memory beside the planner's estimates."""
    import json
    import tempfile

    from flagscale_like.config import load_config
    from flagscale_like.runtime.launch import default_processes, launch
    from flagscale_like.runtime.launched import current_launch

    if current_launch() is not None:
        _bench_here(load_config(config_file, overrides or (), model_of_source), steps, warmup, compare, save, result)
        return
    from flagscale_like.planner.report import table
    from flagscale_like.recipes.benchmark import plot, rows, sweep_points

    found: list[dict[str, Any]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}") from None
    for point in sweep_points(sweep or ()):
        name = " ".join(point)
        changed = [*(overrides or ()), *point]
        try:
            config = load_config(config_file, changed, model_of_source)
            processes = nproc_per_node or default_processes(config.parallel.smallest_world)
            config.data_parallel_size(processes)
            if compare and processes > 1:
                raise ConfigError(f"--compare runs in one process, this layout has {processes}")
        except ConfigError as error:
            if not point:
                raise
            found.append({"point": name, "error": str(error)})
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "point.json"
            options = ["--steps", str(steps), "--warmup", str(warmup), "--result", str(file)]
            options += ["--compare"] * compare + ["--save"] * save
            code = launch(processes, ["bench", str(config_file), *changed, *options])
            if not file.is_file():
                if not point:
                    raise SystemExit(code or 1)
                found.append({"point": name, "error": f"failed with exit code {code}"})
                continue
            found.append({"point": name, **json.loads(file.read_text(encoding="utf-8"))})
    write_json(out / "bench.json", found)
    typer.echo(table(rows(found), right=(2, 4, 5, 6, 7, 8, 9, 10)))
    good = [entry["measured"] for entry in found if "measured" in entry]
    if good:
        first = good[0]
        typer.echo(
            f"{first['devices']} x {first['device']}, {first['precision']}; MFU = model FLOPs / (step time x devices x "
            f"{first['peak_flops'] / 1e12:.4g} TFLOP/s); peak: {first['peak_source']}; model FLOPs without recompute"
        )
        plot(found, out / "bench.png")
    for entry in found:
        if "compared" in entry:
            c = entry["compared"]
            typer.echo(
                f"{entry['point'] or 'as configured'}: a step takes {c['ours_s']:.4g} s here, {c['theirs_s']:.4g} s in "
                f"transformers, in alternation; tokens/s relative to transformers: {c['ratio']:.2f} "
                f"(median of {c['rounds']} pairs; {c['note']})"
            )
    typer.echo(f"wrote {out / 'bench.json'}" + (f" and {out / 'bench.png'}" if good else ""))


def _bench_here(config: RunConfig, steps: int, warmup: int, compare: bool, save: bool, result: Path | None) -> None:
    """Time one configuration on this rank. Rank 0 writes the result to the file `result`."""
    import contextlib
    from dataclasses import asdict

    from flagscale_like.recipes.benchmark import compare_with_transformers, measure
    from flagscale_like.runtime.parallel import parallel_context

    with parallel_context(config.parallel, seed=config.train.seed) as ctx:
        with contextlib.redirect_stdout(sys.stderr):
            point = measure(config, ctx, steps=steps, warmup=warmup, checkpoint=save)
            compared = compare_with_transformers(config, ctx, rounds=steps, warmup=warmup) if compare else None
        if ctx.is_main and point is not None and result is not None:
            found = {"measured": asdict(point)} | ({"compared": asdict(compared)} if compared else {})
            write_json(result, found)
