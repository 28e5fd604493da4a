"""Commands about data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from flagscale_like.cli.base import app, example
from flagscale_like.errors import ConfigError


@app.command(epilog=example("flagscale-like preprocess corpus/*.jsonl --tokenizer tok/ --out data/corpus --workers 8"))
def preprocess(
    inputs: Annotated[
        list[str], typer.Argument(help="jsonl, text or parquet: files, folders, globs, or python-stdlib.")
    ],
    out: Annotated[Path, typer.Option(help="Prefix of the .bin, .idx and .documents.parquet to write.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder.")] = None,
    train_tokenizer: Annotated[int | None, typer.Option(help="Train a byte-level BPE of this size.")] = None,
    key: Annotated[str, typer.Option(help="jsonl field or parquet column with the text.")] = "text",
    unit: Annotated[
        Literal["file", "line", "paragraph"], typer.Option(help="A document of a plain text file.")
    ] = "file",
    workers: Annotated[int, typer.Option(help="Processes that tokenize.")] = 1,
) -> None:
    """Tokenize text into the .bin/.idx that training reads, with a table from each document to its source line."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from flagscale_like.data.preprocess import find_inputs, preprocess, read_documents
    from flagscale_like.data.tokenizer import train_bpe

    files = find_inputs(inputs)
    if (tokenizer is None) == (train_tokenizer is None):
        raise ConfigError("give --tokenizer FOLDER, or --train-tokenizer SIZE to make one")
    if workers < 1:
        raise ConfigError(f"--workers ({workers}) must be 1 or more")
    if tokenizer is None:
        tokenizer = Path(f"{out}-tokenizer")
        train_bpe((d.text for d in read_documents(files, key=key, unit=unit)), train_tokenizer, tokenizer)
    began = time.perf_counter()
    console = Console(stderr=True)
    columns = ("[progress.description]{task.description}", BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=sum(f.stat().st_size for f in files))
        summary = preprocess(
            files, tokenizer, out, key=key, unit=unit, workers=workers, progress=lambda n: bar.advance(task, n)
        )
    seconds = time.perf_counter() - began
    typer.echo(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens ({summary.tokens / seconds:,.0f} tokens/s), "
        f"{summary.empty:,} empty ones left out -> {out}.bin, .idx, .documents.parquet"
    )
