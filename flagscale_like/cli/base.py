"""Shared by all commands: the typer application, common arguments, and functions that open a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flagscale_like.checkpoint.format import CheckpointReader


def example(text: str) -> str:
    """The last line of a command's help: an example."""
    return f"Example: {text}"


app = typer.Typer(
    name="flagscale-like",
    help="3D-parallel pretraining of language models, from a laptop CPU to a GPU cluster.",
    epilog=example("flagscale-like init first-run, and then cd first-run; flagscale-like train run.yaml"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="X.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: train.steps=100", metavar="[KEY=VALUE]...")
]
Checkpoint = Annotated[Path, typer.Option(help="A run folder, a checkpoints/ folder, or one step_* folder.")]
Processes = Annotated[
    int | None, typer.Option(help="Number of processes that read files. Default: the number of CPUs.")
]


def model_of_source(values: dict) -> dict | None:
    """Read the group `model` from the checkpoint or the Hugging Face folder that training starts from.

    Args:
        values: the parsed YAML file; checkpoint.init_from_hf or checkpoint.load names the folder.

    Returns:
        The keys of `model`. None: the YAML names no such folder.
    """
    options = values.get("checkpoint")
    if not isinstance(options, dict):
        return None
    if isinstance(options.get("init_from_hf"), str):
        from flagscale_like.families import read_config

        return read_config(Path(options["init_from_hf"]))[1].model_dump(mode="json")
    if isinstance(options.get("load"), str):
        from flagscale_like.checkpoint.format import CheckpointReader
        from flagscale_like.checkpoint.manifest import find_checkpoint

        return CheckpointReader(find_checkpoint(Path(options["load"]))).arch.model_dump(mode="json")
    return None


def open_checkpoint(checkpoint: Path) -> tuple[CheckpointReader, Path | None]:
    """Open the newest checkpoint at a path.

    Returns:
        The reader, and the tokenizer folder that the run used or that was imported with the checkpoint; None if the folder
        does not exist.
    """
    from flagscale_like.checkpoint.format import CheckpointReader
    from flagscale_like.checkpoint.manifest import find_checkpoint

    reader = CheckpointReader(find_checkpoint(checkpoint))
    for note in reader.notes:
        typer.echo(note, err=True)
    tokenizer = reader.state.get("config", {}).get("data", {}).get("tokenizer") or reader.folder / "tokenizer"
    return reader, Path(tokenizer) if Path(tokenizer).is_dir() else None
