"""`report`: writes an HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flagscale_like.cli.base import app, example
from flagscale_like.run_folder import RunFolder


@app.command(epilog=example("flagscale-like report runs/demo"))
def report(
    run: Annotated[Path, typer.Argument(help="A run folder: run_dir of its YAML file.")],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: RUN/report.html.")] = None,
) -> None:
    """Write an HTML file about a run: curves, events, configuration, layout, planned and measured memory."""
    from flagscale_like.training.report import write_report

    target = out or RunFolder(run).report
    story = write_report(run, target)
    alarms = sum(mark.kind != "checkpoint" for mark in story.happened)
    typer.echo(f"wrote {target}: {len(story.kept)} steps on record, {alarms} events; open it in a browser")
