"""`embed`: vectors of texts; and what the commands that run an embedding model share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flagscale_like.cli.base import app, example
from flagscale_like.cli.model_options import Dimensions, EmbedderOptions, shares, start_ranks
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.figures import fixed

if TYPE_CHECKING:
    from flagscale_like.config import Parallel
    from flagscale_like.recipes.embedder import Embedder, Side


@contextmanager
def open_embedder(model: EmbedderOptions, parallel: Parallel) -> Iterator[tuple[Embedder, dict[str, Any]]]:
    """Yield the model on this rank, and what its vectors depend on. Says which settings it has, and where they come from."""
    from flagscale_like.checkpoint.adapters import identities
    from flagscale_like.recipes.embedder import Embedder, settings_of, with_options
    from flagscale_like.runtime.parallel import parallel_context

    source, found_tokenizer = model.open()
    folder = model.tokenizer or found_tokenizer
    if folder is None:
        raise ConfigError(f"{model.path}: names no tokenizer: give --tokenizer FOLDER")
    instructions: dict[Side, str | None] = {"query": model.query_instruction, "passage": model.passage_instruction}
    settings = with_options(
        settings_of(source), pooling=model.pooling, instructions=instructions, max_tokens=model.max_tokens
    )
    made_from = {
        "weights": identities(source),
        "pooling": settings.pooling,
        "layout": parallel.model_dump(mode="json"),
        "micro_batch_size": model.micro_batch_size,
        "precision": model.precision,
    }
    with parallel_context(parallel) as ctx:
        embedder = Embedder(
            source,
            folder,
            ctx,
            settings,
            max_tokens=model.max_tokens or 0,
            micro_batch_size=model.micro_batch_size,
            precision=model.precision,
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
@shares(EmbedderOptions)
def embed(
    input: Annotated[Path, typer.Argument(help="Text, a line each, or JSON records, also compressed.")],
    out: Annotated[Path, typer.Option(help="The .npy file to write, a row a text.")],
    model: EmbedderOptions,
    key: Annotated[str, typer.Option(help="Field of a JSON record that holds the text.")] = "text",
    side: Annotated[Literal["query", "passage"], typer.Option(help="What the texts are.")] = "passage",
    dimensions: Dimensions = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Data type of the file.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write the vectors of a file's texts, of length 1. After an interruption, the same command goes on where it ended."""
    start_ranks(model.layout(), model.nproc_per_node)
    from flagscale_like.recipes.embed import embed_file

    with open_embedder(model, model.layout()) as (embedder, made_from):
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
