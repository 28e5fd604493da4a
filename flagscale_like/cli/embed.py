"""`embed`: vectors of texts; and what the commands that run an embedding model share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flagscale_like.cli.base import Adapter, Force, app, example, open_model
from flagscale_like.cli.model_options import (
    Dimensions,
    HuggingFace,
    MaxTokens,
    MicroBatchSize,
    ModelCheckpoint,
    ModelTokenizer,
    PassageInstruction,
    PipelineParallel,
    PoolingOption,
    Precision,
    QueryInstruction,
    RanksToStart,
    TensorParallel,
)
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.figures import fixed

if TYPE_CHECKING:
    from flagscale_like.config import Parallel
    from flagscale_like.recipes.embedder import Embedder


def start_ranks(checkpoint: Path | None, hf: Path | None, parallel: Parallel, nproc_per_node: int | None) -> None:
    """Start the ranks of this command and end with their exit code, unless this process is one of them."""
    from flagscale_like.runtime.launch import default_processes, launch
    from flagscale_like.runtime.launched import current_launch

    if (checkpoint is None) == (hf is None):
        raise ConfigError("give either --checkpoint or --hf")
    processes = 1 if current_launch() else nproc_per_node or default_processes(parallel.smallest_world)
    if processes > 1:
        raise SystemExit(launch(processes, sys.argv[1:]))


@contextmanager
def open_embedder(  # the options of a command
    path: Path,
    parallel: Parallel,
    *,
    hugging_face: bool,
    adapter: Path | None,
    force: bool,
    tokenizer: Path | None,
    pooling: str | None,
    instructions: dict[str, str | None],
    max_tokens: int | None,
    micro_batch_size: int = 1,
    precision: str = "fp32",
) -> Iterator[tuple[Embedder, dict[str, Any]]]:
    """Yield the model on this rank, and what its vectors depend on. Says which settings it has, and where they come from."""
    from flagscale_like.checkpoint.adapters import identities
    from flagscale_like.recipes.embedder import Embedder, settings_of, with_options
    from flagscale_like.runtime.parallel import parallel_context

    source, found_tokenizer = open_model(path, hugging_face=hugging_face, adapter=adapter, force=force)
    folder = tokenizer or found_tokenizer
    if folder is None:
        raise ConfigError(f"{path}: names no tokenizer: give --tokenizer FOLDER")
    settings = with_options(settings_of(source), pooling=pooling, instructions=instructions, max_tokens=max_tokens)
    made_from = {
        "weights": identities(source),
        "pooling": settings.pooling,
        "layout": parallel.model_dump(mode="json"),
        "micro_batch_size": micro_batch_size,
        "precision": precision,
    }
    with parallel_context(parallel) as ctx:
        embedder = Embedder(
            source,
            folder,
            ctx,
            settings,
            max_tokens=max_tokens or 0,
            micro_batch_size=micro_batch_size,
            precision=precision,
        )
        if ctx.is_main:
            typer.echo(
                f"pooling {settings.pooling}, texts are {embedder.texts.describe()}, of at most {embedder.places} tokens "
                f"(from {settings.origin})",
                err=True,
            )
        yield embedder, {**made_from, "ranks": ctx.world_size}


def say_instruction(embedder: Embedder, side: str) -> None:
    """Say what is put before the texts of a side, or that nothing is known of it."""
    text = embedder.settings.instructions.get(side)
    if embedder.ctx.is_main:
        option = f"--{side}-instruction"
        known = f"before each {side}: {text!r}" if text else f"before each {side}: nothing"
        typer.echo(known if text is not None else f"{known}; no run or folder says what ({option})", err=True)


def say_cut(embedder: Embedder) -> None:
    """Say how many texts were cut."""
    if embedder.cut and embedder.ctx.is_main:
        typer.echo(f"{embedder.cut:,} texts were cut to {embedder.places} tokens or their side's limit", err=True)


@app.command(epilog=example("flagscale-like embed passages.jsonl --checkpoint runs/embed --out passages.npy"))
def embed(  # typer makes an option of every parameter
    input: Annotated[Path, typer.Argument(help="Text, a line each, or JSON records, also compressed.")],
    out: Annotated[Path, typer.Option(help="The .npy file to write, a row a text.")],
    checkpoint: ModelCheckpoint = None,
    hf: HuggingFace = None,
    adapter: Adapter = None,
    force: Force = False,
    tokenizer: ModelTokenizer = None,
    key: Annotated[str, typer.Option(help="Field of a JSON record that holds the text.")] = "text",
    side: Annotated[Literal["query", "passage"], typer.Option(help="What the texts are.")] = "passage",
    query_instruction: QueryInstruction = None,
    passage_instruction: PassageInstruction = None,
    pooling: PoolingOption = None,
    max_tokens: MaxTokens = None,
    dimensions: Dimensions = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Data type of the file.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    micro_batch_size: MicroBatchSize = 1,
    precision: Precision = "fp32",
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    nproc_per_node: RanksToStart = None,
) -> None:
    """Write the vectors of a file's texts, of length 1. After an interruption, the same command goes on where it ended."""
    from flagscale_like.config import Parallel

    parallel = Parallel(tp=tp, pp=pp)
    start_ranks(checkpoint, hf, parallel, nproc_per_node)
    from flagscale_like.recipes.embed import embed_file

    with open_embedder(
        hf or checkpoint,
        parallel,
        hugging_face=hf is not None,
        adapter=adapter,
        force=force,
        tokenizer=tokenizer,
        pooling=pooling,
        instructions={"query": query_instruction, "passage": passage_instruction},
        max_tokens=max_tokens,
        micro_batch_size=micro_batch_size,
        precision=precision,
    ) as (embedder, made_from):
        check_dimensions(dimensions, embedder)
        say_instruction(embedder, side)
        options = {"key": key, "side": side, "dtype": dtype, "dimensions": dimensions, "overwrite": overwrite}
        count = embed_file(embedder, input, out, made_from=made_from, **options)
        say_cut(embedder)
        if embedder.ctx.is_main:
            typer.echo(f"wrote {out}: {count:,} vectors of {dimensions or embedder.size} numbers, {dtype}")


def check_dimensions(dimensions: int | None, embedder: Embedder) -> None:
    """Refuse more numbers of a vector than it has."""
    if dimensions is not None and dimensions > embedder.size:
        raise ConfigError(f"--dimensions is {dimensions}, a vector has {embedder.size} numbers: give at most so many")


def evaluate_retrieval(embedder: Embedder, folders: list[Path], split: str, dimensions: int | None) -> None:
    """`evaluate --retrieval`: print the measures of a ranking, a line for each collection."""
    from flagscale_like.recipes.retrieval import evaluate_retrieval, read_collection
    from flagscale_like.runtime.parallel import agree

    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder: --retrieval takes one with queries.jsonl, corpus.jsonl and qrels"
            )
    check_dimensions(dimensions, embedder)
    for side in ("query", "passage"):
        say_instruction(embedder, side)
    for folder in folders:
        collection = agree(embedder.ctx, lambda folder=folder: read_collection(folder, split))
        if embedder.ctx.is_main:
            for note in collection.notes:
                typer.echo(note, err=True)
        found = evaluate_retrieval(embedder, collection, dimensions=dimensions)
        say_cut(embedder)
        if found is not None:
            values = ", ".join(f"{name} {fixed(value)}" for name, value in found.items())
            counts = f"{len(collection.queries):,} queries and {len(collection.passages):,} passages"
            typer.echo(f"{folder}: {values} over {counts}")
