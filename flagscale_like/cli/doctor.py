"""`doctor`: checks the installation."""

from __future__ import annotations

import typer

from flagscale_like.cli.base import app, example
from flagscale_like.errors import PlatformError


@app.command(epilog=example("flagscale-like doctor"))
def doctor() -> None:
    """List the installed components, and what does not work without each missing one."""
    from rich.console import Console
    from rich.table import Table

    from flagscale_like.runtime.doctor import examine

    findings = examine()
    table = Table("", "", "", box=None, show_header=False)
    for finding in findings:
        table.add_row(finding.name, finding.status, finding.detail)
    Console(soft_wrap=True, highlight=False).print(table)
    broken = [f.name for f in findings if f.status == "broken"]
    if broken:
        raise PlatformError(f"training cannot start: {', '.join(broken)}: see the lines marked broken")
    typer.echo("everything that training needs is installed")
