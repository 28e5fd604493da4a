"""The options of the commands that run a model, and of those that run an embedding model: listed once, with one text each."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from flagscale_like.cli.base import Adapter, Force, open_model
from flagscale_like.errors import ConfigError, required

if TYPE_CHECKING:
    from flagscale_like.cli.base import OpenedModel
    from flagscale_like.config import Parallel

PoolingOption = Annotated[
    Literal["last", "mean", "first"] | None,
    typer.Option(help="Hidden states that make a vector. Default: what the run or the folder says."),
]
QueryInstruction = Annotated[
    str | None, typer.Option(help="Put before each query. Default: what the run or the folder says.")
]
PassageInstruction = Annotated[str | None, typer.Option(help="The same before each passage.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most tokens of a text; the rest is cut. Default: what the model was trained with, or 512."
    ),
]
Dimensions = Annotated[
    int | None, typer.Option(min=1, help="Keep so many numbers of each vector. Default: the hidden size.")
]
ModelTokenizer = Annotated[Path | None, typer.Option(help="Tokenizer folder. Default: the model's tokenizer.")]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Data type of weights and activations.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights a command runs, how, and on which ranks."""

    checkpoint: Annotated[Path | None, typer.Option(help="Native checkpoint: a run, or one step_* folder.")] = None
    hf: Annotated[Path | None, typer.Option(help="Hugging Face folder, instead of --checkpoint.")] = None
    adapter: Adapter = None
    force: Force = False
    micro_batch_size: Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)] = 1
    precision: Precision = "fp32"
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.", min=1)] = 1
    pp: Annotated[int, typer.Option(help="Pipeline stages.", min=1)] = 1
    nproc_per_node: Annotated[
        int | None,
        typer.Option(
            help="Ranks to start. Default: one for each GPU; on a CPU, those of one copy of the model.", min=1
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raises ConfigError where not exactly one of --checkpoint and --hf is given."""
        if (self.checkpoint is None) == (self.hf is None):
            raise ConfigError("give either --checkpoint or --hf")

    @property
    def path(self) -> Path:
        """Where the weights are."""
        return required(self.hf or self.checkpoint, "--hf or --checkpoint")

    def layout(self, cp: int = 1) -> Parallel:
        """The degrees of parallelism."""
        from flagscale_like.config import Parallel

        return Parallel(tp=self.tp, pp=self.pp, cp=cp)

    def open(self) -> OpenedModel:
        """The weights, and the folder of their tokenizer."""
        return open_model(self.path, hugging_face=self.hf is not None, adapter=self.adapter, force=self.force)


@dataclass(frozen=True, kw_only=True)
class EmbedderOptions(ModelOptions):
    """The same of an embedding model, and how it makes vectors of texts."""

    hf: Annotated[
        Path | None, typer.Option(help="Hugging Face or sentence-transformers folder, instead of --checkpoint.")
    ] = None
    tokenizer: ModelTokenizer = None
    pooling: PoolingOption = None
    query_instruction: QueryInstruction = None
    passage_instruction: PassageInstruction = None
    max_tokens: MaxTokens = None

    def of_vectors(self) -> dict[str, Any]:
        """The options that say how texts become vectors; None where one is not given."""
        names = ("pooling", "query_instruction", "passage_instruction", "max_tokens")
        return {name: getattr(self, name) for name in names}


def start_ranks(parallel: Parallel, nproc_per_node: int | None) -> None:
    """Start the ranks of this command and end with their exit code, unless this process is one of them or needs no other."""
    from flagscale_like.runtime.launch import default_processes, launch
    from flagscale_like.runtime.launched import current_launch

    processes = 1 if current_launch() else nproc_per_node or default_processes(parallel.smallest_world)
    if processes > 1:
        raise SystemExit(launch(processes, sys.argv[1:]))


def shares(kind: type[ModelOptions]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of `kind` as options of its own. It gets them as one object, its parameter `model`."""

    def decorate(command: Any) -> Callable[..., None]:
        shared, hints = fields(kind), get_type_hints(command, include_extras=True)
        hints = {name: hint for name, hint in hints.items() if name != "model"} | get_type_hints(
            kind, include_extras=True
        )

        def with_model(**given: Any) -> None:
            model = kind(**{field.name: given.pop(field.name) for field in shared})
            command(model=model, **given)

        own = [p for name, p in inspect.signature(command).parameters.items() if name != "model"]
        defaults = {parameter.name: parameter.default for parameter in own} | {f.name: f.default for f in shared}
        run: Any = with_model
        run.__name__, run.__doc__, run.__annotations__ = command.__name__, command.__doc__, hints
        run.__signature__ = inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
                for name, default in defaults.items()
            ]
        )
        return run

    return decorate
