"""`preprocess`, and `data`: what goes into training, and which of it a step was made of."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flagscale_like.cli.base import app, example
from flagscale_like.errors import ConfigError
from flagscale_like.run_folder import RunFolder

if TYPE_CHECKING:
    from flagscale_like.data.draws import DrawState
    from flagscale_like.data.filters import Cleaning
    from flagscale_like.data.provenance import Segment
    from flagscale_like.data.report import Report

data_app = typer.Typer(
    help="Look at training data, and at the data of a training step.",
    epilog=example("flagscale-like data inspect data/corpus"),
    no_args_is_help=True,
)


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


@data_app.command("locate", epilog=example("flagscale-like data locate --run runs/demo --step 1200 --top 5"))
def locate(
    run: Annotated[Path, typer.Option(help="The run's folder, or a checkpoint of it.")],
    step: Annotated[int, typer.Option(min=1, help="The training step.")],
    rank: Annotated[int | None, typer.Option(help="Only what this rank read.")] = None,
    attempt: Annotated[
        int | None,
        typer.Option(min=1, help="Of a step made several times, because the run went back: which; else the last."),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Samples to show, the worst loss first; 0 for all.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample, with the whole text.")] = False,
) -> None:
    """Show which documents a training step was made of: source file, line and text, the worst first."""
    import json
    from dataclasses import asdict

    from flagscale_like.config import RunConfig
    from flagscale_like.data.inspect import excerpt
    from flagscale_like.data.provenance import Provenance, dp_rank_of, locate, open_order, readings_of
    from flagscale_like.data.tokenizer import Tokenizer

    run_dir, segments, draws = _order_records(run)
    readings = readings_of(segments, step)
    if attempt is not None and attempt > len(readings):
        raise ConfigError(f"--attempt ({attempt}): step {step} was made {len(readings)} times")
    reading = readings[(attempt or len(readings)) - 1]
    segment, config = reading.segment, RunConfig.model_validate(reading.segment.config)
    if step > config.train.steps:
        raise ConfigError(f"--step ({step}): the run has {config.train.steps} steps (train.steps)")
    provenance = Provenance(open_order(segment, draws), config.data.source_names)
    dp_rank = dp_rank_of(segment, rank) if rank is not None else None
    found = locate(run_dir, reading, provenance, dp_rank=dp_rank)
    tokenizer = Tokenizer(config.data.tokenizer)
    shown = found[: top or None]
    if as_json:
        for sample in shown:
            texts = [tokenizer.decode(provenance.tokens(part).tolist()) for part in sample.parts]
            parts = [asdict(part) | {"text": text} for part, text in zip(sample.parts, texts, strict=True)]
            typer.echo(json.dumps({"step": step, **asdict(sample), "parts": parts}, ensure_ascii=False))
        return
    again = f"; attempt {readings.index(reading) + 1} of {len(readings)}" if len(readings) > 1 else ""
    order = "the worst loss first" if any(s.loss is not None for s in found) else "no losses were noted at this step"
    typer.echo(
        f"step {step} read samples {reading.first:,} to {reading.first + reading.count - 1:,}{again}; "
        f"{len(shown)} of {len(found)} shown, {order}"
    )
    for sample in shown:
        loss = f"loss {sample.loss:.4f}, " if sample.loss is not None else ""
        typer.echo(f"sample {sample.position}: {loss}dp rank {sample.dp_rank}, micro-batch {sample.micro_batch}")
        for part in sample.parts:
            text = excerpt(tokenizer.decode(provenance.tokens(part).tolist()), 120)
            typer.echo(f"  {part} ({part.source}, document {part.document}, tokens {part.start}-{part.end}) {text}")


def _order_records(run: Path) -> tuple[Path, list[Segment], list[DrawState]]:
    """The run's folder, and what it, or its checkpoints, say about the order of its data."""
    from flagscale_like.checkpoint.manifest import read_state, step_folders
    from flagscale_like.data.draws import read_draws
    from flagscale_like.data.provenance import draws_of_states, read_journal, segments_of_states
    from flagscale_like.errors import CheckpointError, DataError

    is_checkpoint = run.name.startswith("step_") and not (run / "checkpoints").is_dir()
    run_dir = run.parent.parent if is_checkpoint else run.parent if run.name == "checkpoints" else run
    segments = [] if is_checkpoint else read_journal(run_dir)
    if segments:
        return run_dir, segments, read_draws(run_dir)
    states = []
    for folder in [run] if is_checkpoint else step_folders(RunFolder(run_dir).checkpoints):
        try:
            states.append(read_state(folder))
        except CheckpointError:
            continue  # a damaged one says nothing; others may
    if not states:
        raise DataError(f"{run}: holds neither samples.jsonl, which training with sources writes, nor a checkpoint")
    return run_dir, segments_of_states(states), draws_of_states(states)


app.add_typer(data_app, name="data")
