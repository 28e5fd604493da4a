"""`preprocess`, and `data`: what goes into training, and which of it a step was made of."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flagscale_like.cli.base import app, example
from flagscale_like.errors import ConfigError

if TYPE_CHECKING:
    from flagscale_like.data.filters import Cleaning
    from flagscale_like.data.report import Report

data_app = typer.Typer(help="Look at training data, and at the data of a training step.", no_args_is_help=True)


@app.command(
    epilog=example("flagscale-like preprocess corpus/*.jsonl.zst --tokenizer tok/ --out data/corpus --workers 8")
)
def preprocess(
    inputs: Annotated[
        list[str],
        typer.Argument(help="jsonl or text (also .gz, .zst), or parquet: files, folders, globs, or python-stdlib."),
    ],
    out: Annotated[Path, typer.Option(help="Prefix of the .bin, .idx, .documents.parquet and .report.json to write.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder.")] = None,
    train_tokenizer: Annotated[int | None, typer.Option(help="Train a byte-level BPE of this size.")] = None,
    key: Annotated[str, typer.Option(help="jsonl field or parquet column with the text.")] = "text",
    unit: Annotated[
        Literal["file", "line", "paragraph"], typer.Option(help="A document of a plain text file.")
    ] = "file",
    workers: Annotated[int, typer.Option(help="Processes that tokenize.")] = 1,
    bad_lines: Annotated[
        Literal["stop", "skip"], typer.Option(help="At a line without a document: stop, or count it and go on.")
    ] = "stop",
    fix_text: Annotated[
        bool, typer.Option("--fix-text", help="Mend text decoded with a wrong encoding (ftfy).")
    ] = False,
    min_characters: Annotated[int, typer.Option(min=0, help="Drop shorter documents.")] = 0,
    max_characters: Annotated[int | None, typer.Option(min=1, help="Drop longer documents.")] = None,
    quality: Annotated[
        Literal["none", "gopher"], typer.Option(help="Rules of quality; gopher's are made for English prose.")
    ] = "none",
    duplicates: Annotated[
        Literal["keep", "exact", "near"],
        typer.Option(help="Drop repeated documents; near: also similar ones (MinHash)."),
    ] = "keep",
    near_threshold: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Jaccard resemblance from which documents are near duplicates.")
    ] = 0.8,
    max_document_mb: Annotated[
        float, typer.Option(min=0.001, help="Longer lines (or files) are bad ones; bounds a process's memory.")
    ] = 64.0,
    shard_mb: Annotated[
        float | None, typer.Option(min=0.001, help="Input of a shard, the unit that an interruption can cost.")
    ] = None,
) -> None:
    """Tokenize text into the .bin/.idx that training reads, with a table from each document to its source line.

    After an interruption, the same command goes on where it was.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from flagscale_like.data.filters import Cleaning, Quality
    from flagscale_like.data.preprocess import preprocess
    from flagscale_like.data.readers import find_inputs, read_documents
    from flagscale_like.data.tokenizer import train_bpe

    files = find_inputs(inputs)
    if (tokenizer is None) == (train_tokenizer is None):
        raise ConfigError("give --tokenizer FOLDER, or --train-tokenizer SIZE to make one")
    if workers < 1:
        raise ConfigError(f"--workers ({workers}) must be 1 or more")
    cleaning = Cleaning(
        fix_text=fix_text,
        min_characters=min_characters,
        max_characters=max_characters,
        quality=Quality() if quality == "gopher" else None,
        duplicates=duplicates,
        near_threshold=near_threshold,
    )
    if tokenizer is None:
        tokenizer = Path(f"{out}-tokenizer")
        if not (tokenizer / "tokenizer_config.json").is_file():  # the last file of one: an interrupted run made it
            train_bpe(
                (d.text for d in read_documents(files, key=key, unit=unit, bad_lines=bad_lines)),
                train_tokenizer,
                tokenizer,
            )
    began = time.perf_counter()
    console = Console(stderr=True)
    columns = ("[progress.description]{task.description}", BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=sum(f.stat().st_size for f in files))
        report = preprocess(
            files,
            tokenizer,
            out,
            key=key,
            unit=unit,
            workers=workers,
            bad_lines=bad_lines,
            cleaning=cleaning,
            max_document_bytes=int(max_document_mb * 2**20),
            shard_bytes=int(shard_mb * 2**20) if shard_mb else None,
            progress=lambda size: bar.advance(task, size),
        )
    _print_report(report, cleaning)
    seconds = time.perf_counter() - began
    typer.echo(
        f"{report.documents:,} documents, {report.tokens:,} tokens ({report.tokens / seconds:,.0f} tokens/s), "
        f"{report.empty:,} empty ones left out -> {out}.bin, .idx, .documents.parquet, .report.json"
    )


def _print_report(report: Report, cleaning: Cleaning) -> None:
    """The table of what was dropped and why, where anything could be."""
    from rich.console import Console
    from rich.table import Table

    from flagscale_like.data.filters import Cleaning

    if cleaning == Cleaning() and not report.bad_lines:
        return
    table = Table("", "documents", "characters", "for example", box=None)
    for row in report.rows():
        table.add_row(*row)
    console = Console()
    Console(width=console.width if console.is_terminal else 200, soft_wrap=True).print(table)


@data_app.command("inspect", epilog=example("flagscale-like data inspect data/corpus --samples 3"))
def inspect(
    prefix: Annotated[Path, typer.Argument(help="Prefix of .bin and .idx.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder for the samples; the one it was made with, if left out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show, spread over the data.")] = 3,
) -> None:
    """Show documents, tokens, a histogram of lengths, and documents decoded, with where they came from."""
    from flagscale_like.data.inspect import describe_index

    typer.echo(describe_index(Path(str(prefix).removesuffix(".idx").removesuffix(".bin")), tokenizer, samples=samples))


app.add_typer(data_app, name="data")
