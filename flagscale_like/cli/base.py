"""Shared by all commands: the typer application, common arguments, and functions that open a checkpoint."""

from __future__ import annotations

import sys
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flagscale_like.errors import ConfigError, UserError

if TYPE_CHECKING:
    from flagscale_like.checkpoint.adapters import AdaptedWeights
    from flagscale_like.checkpoint.format import CheckpointReader
    from flagscale_like.checkpoint.hf_folder import HfFolder

    OpenedWeights = CheckpointReader | HfFolder | AdaptedWeights
    OpenedModel = tuple[OpenedWeights, Path | None]


def example(text: str) -> str:
    """The last line of a command's help: an example."""
    return f"Example: {text}"


app = typer.Typer(
    name="flagscale-like",
    epilog=example("flagscale-like init first-run, and then cd first-run; flagscale-like train run.yaml"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flagscale_like {version('flagscale_like')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """3D-parallel pretraining and fine-tuning of language models, from a laptop CPU to a GPU cluster."""
    # A name or a text that the terminal has no letters for is printed all the same. (stderr does so by itself.)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="X.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: train.steps=100", metavar="[KEY=VALUE]...")
]
Checkpoint = Annotated[Path, typer.Option(help="A run folder, a checkpoints/ folder, or one step_* folder.")]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="LoRA adapters for these weights: a run, a checkpoint of adapters, or a folder in peft's format."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Take weights that are not the ones the adapters were trained on.")
]
Processes = Annotated[
    int | None, typer.Option(help="Number of processes that read files. Default: the number of CPUs.", min=1)
]


def refuse_unread(reader: str, **options: object) -> None:
    """Refuse options that a command would not read.

    Args:
        reader: the option that they belong to, such as --batch.
        options: each value by the option's name; None and False are not given.

    Raises:
        ConfigError: one is given.
    """
    names = [
        f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value is not False
    ]
    if names:
        verb, them = ("belongs", "it") if len(names) == 1 else ("belong", "them")
        raise ConfigError(f"{', '.join(names)} {verb} to {reader}: leave {them} out")


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


def model_to_plan(values: dict) -> dict | None:
    """model_of_source() of a run that is only planned: where that folder is not here, the YAML's own group `model` does.

    Raises:
        UserError: the folder is not here, and there is no such group.
    """
    try:
        return model_of_source(values)
    except UserError as error:
        if not isinstance(values.get("model"), dict):
            raise type(error)(f"{error}; to plan without it, give the group `model`") from None
        typer.echo(f"{error}: planned with the YAML's own model")
        return None


def new_file(path: Path | None, option: str) -> None:
    """Refuse an output that is there already, or whose folder is not.

    Raises:
        ConfigError: see above.
    """
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{option} {path}: is there already, and nothing is overwritten: give another name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}: make it first")


def open_model(
    path: Path, *, hugging_face: bool = False, adapter: Path | None, base: Path | None = None, force: bool = False
) -> OpenedModel:
    """checkpoint.opened.open_adapted, whose arguments and errors these are; rank 0 prints its notes on stderr."""
    from flagscale_like.checkpoint.opened import open_adapted
    from flagscale_like.runtime.launched import current_launch

    opened = open_adapted(path, hugging_face=hugging_face, adapter=adapter, base=base, force=force)
    launch = current_launch()
    for note in opened.notes if launch is None or launch.rank == 0 else ():
        typer.echo(note, err=True)
    return opened.source, opened.tokenizer
