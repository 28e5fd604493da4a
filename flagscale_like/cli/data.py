"""`preprocess` tokenizes text, `data chat` conversations; `data` shows them, and the documents that a training step read."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flagscale_like.cli.base import app, example, refuse_unread
from flagscale_like.errors import ConfigError, DataError, required
from flagscale_like.figures import fixed
from flagscale_like.run_folder import RunFolder

if TYPE_CHECKING:
    from flagscale_like.data.draws import DrawState
    from flagscale_like.data.provenance import Segment
    from flagscale_like.data.report import Report

data_app = typer.Typer(
    help="Tokenize conversations, pairs and groups; mine, score and judge them; show data, and what a training step read.",
    epilog=example("flagscale-like data inspect data/corpus"),
    no_args_is_help=True,
)


# Options that several of the commands below have.
Records = Annotated[list[str], typer.Argument(help="Files, folders or globs of JSON lines or arrays, also compressed.")]
TokenizerFolder = Annotated[Path, typer.Option(help="Hugging Face tokenizer folder.")]
Prefix = Annotated[Path, typer.Option(help="Path without suffix of the files to write.")]
Template = Annotated[Path | None, typer.Option(help="Chat template (Jinja). Default: the tokenizer's.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files of a prefix that is there.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of tokenizing processes.")]
LongestLine = Annotated[
    float, typer.Option(min=0.001, help="Longer lines are bad lines. Bounds the memory of a process.")
]
ShardSize = Annotated[
    float | None, typer.Option(min=0.001, help="Input of one shard. After an interruption, incomplete shards restart.")
]


@app.command(
    epilog=example("flagscale-like preprocess corpus/*.jsonl.zst --tokenizer tok/ --out data/corpus --workers 8")
)
def preprocess(  # typer makes an option of every parameter
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs of JSON records, parquet or text (also compressed), or python-stdlib."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Path without suffix of the .bin, .idx, .documents.parquet and .report.json to write.")
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder.")] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(help="Train a byte-level BPE with this vocabulary size on the input.", min=257)
    ] = None,
    key: Annotated[
        str, typer.Option(help="Field of a JSON record (also meta.text), or column of parquet, that holds the text.")
    ] = "text",
    unit: Annotated[
        Literal["file", "line", "paragraph"], typer.Option(help="What one document is in a plain text file.")
    ] = "file",
    workers: Workers = 1,
    bad_lines: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="Lines without a document: stop at the first, or count and skip them."),
    ] = "stop",
    fix_text: Annotated[
        bool, typer.Option("--fix-text", help="Repair text that was decoded with a wrong encoding (ftfy).")
    ] = False,
    min_characters: Annotated[int, typer.Option(min=0, help="Drop shorter documents.")] = 0,
    max_characters: Annotated[int | None, typer.Option(min=1, help="Drop longer documents.")] = None,
    quality: Annotated[
        Literal["none", "gopher"],
        typer.Option(help="Drop documents that break these rules; gopher suits English prose."),
    ] = "none",
    duplicates: Annotated[
        Literal["keep", "exact", "near"],
        typer.Option(help="exact: drop documents whose text is repeated; near: also similar ones (MinHash)."),
    ] = "keep",
    near_threshold: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=1.0, help="Jaccard similarity from which documents are near duplicates. Default: 0.8."
        ),
    ] = None,
    max_document_mb: Annotated[
        float, typer.Option(min=0.001, help="Longer lines (or files) are bad lines. Bounds the memory of a process.")
    ] = 64.0,
    shard_mb: ShardSize = None,
    overwrite: Overwrite = False,
    special_tokens: Annotated[
        Literal["text", "ids", "error"],
        typer.Option(help="What <|endoftext|> and the like become inside a document: text, the token, or a bad line."),
    ] = "text",
    add_bos: Annotated[
        bool, typer.Option("--add-bos", help="Begin each document with the tokenizer's bos_token, such as <s>.")
    ] = False,
) -> None:
    """Tokenize text to the .bin/.idx that training reads, and write a table with the source line of each document.

    After an interruption, the same command continues with the shards that are complete.
    """
    from flagscale_like.data.filters import Cleaning, Quality
    from flagscale_like.data.preprocess import preprocess
    from flagscale_like.data.readers import find_inputs, read_documents
    from flagscale_like.data.tokenizer import Tokenizer, is_trained_on, train_bpe

    if duplicates != "near":
        refuse_unread("--duplicates near", near_threshold=near_threshold)
    files = find_inputs(inputs)
    if (tokenizer is None) == (train_tokenizer is None):
        raise ConfigError("give either --tokenizer FOLDER, or --train-tokenizer SIZE to train one")
    cleaning = Cleaning(
        fix_text=fix_text,
        min_characters=min_characters,
        max_characters=max_characters,
        quality=Quality() if quality == "gopher" else None,
        duplicates=duplicates,
        **({} if near_threshold is None else {"near_threshold": near_threshold}),
    )
    if tokenizer is None:
        tokenizer = Path(f"{out}-tokenizer")
        entries = required(train_tokenizer, "--train-tokenizer")
        if not is_trained_on(tokenizer, entries, files):  # by this command, before it was interrupted
            if tokenizer.exists() and not overwrite:
                raise DataError(
                    f"{tokenizer}: exists, and was not trained for {entries:,} entries on this input: give it as "
                    "--tokenizer, choose another --out, or replace it with --overwrite"
                )
            texts = (d.text for d in read_documents(files, key=key, unit=unit, bad_lines=bad_lines))
            train_bpe(texts, entries, tokenizer, inputs=files)
    began = time.perf_counter()
    with show_progress(files) as progress:
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
            overwrite=overwrite,
            special_tokens=special_tokens,
            add_bos=add_bos,
            progress=progress,
        )
    if cleaning != Cleaning() or report.bad_lines:
        print_report(report)
    seconds = time.perf_counter() - began
    words = Tokenizer(tokenizer)
    if not add_bos and words.before_text:
        begin = words.decode_one(words.before_text[0])
        typer.echo(
            f"note: this tokenizer begins a text with {begin}; the documents are without it: --add-bos writes it"
        )
    typer.echo(
        f"{report.documents:,} documents, {report.tokens:,} tokens ({report.tokens / seconds:,.0f} tokens/s), "
        f"{report.empty:,} empty documents skipped; wrote {out}.bin, .idx, .documents.parquet, .report.json"
    )


@contextmanager
def show_progress(files: Sequence[Path]) -> Iterator[Callable[[int], None]]:
    """A progress bar over the bytes of the files; lines where the output is no terminal.

    Yields a function that takes the bytes that are done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from flagscale_like.data.inputs import ProgressLines, size_of

    console, total = Console(stderr=True), size_of(files)
    if not console.is_terminal or console.is_dumb_terminal:
        yield ProgressLines(total, functools.partial(typer.echo, err=True))
        return
    columns = ("[progress.description]{task.description}", BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("tokenizing", total=total)
        yield lambda size: bar.advance(task, size)


def print_report(report: Report) -> None:
    """Print how many documents were dropped for each reason."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "documents", "characters", "for example", box=None)
    for row in report.rows():
        table.add_row(*row)
    console = Console()
    Console(width=console.width if console.is_terminal else 200, soft_wrap=True).print(table)


@data_app.command("chat", epilog=example("flagscale-like data chat chats.jsonl --tokenizer tok/ --out data/chats"))
def chat(  # typer makes an option of every parameter
    inputs: Records,
    tokenizer: TokenizerFolder,
    out: Prefix,
    template: Template = None,
    length: Annotated[int | None, typer.Option(min=1, help="Places of a row: train.seq_length.")] = None,
    long: Annotated[
        Literal["refuse", "drop", "cut"], typer.Option(help="Conversations that do not fit --length.")
    ] = "refuse",
    train: Annotated[
        Literal["all", "last"], typer.Option(help="The assistant's messages that count: all, or the last.")
    ] = "all",
    skip_empty: Annotated[
        bool, typer.Option("--skip-empty", help="Leave out conversations without a token that counts.")
    ] = False,
    bad_lines: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="Lines without a conversation: stop at the first, or count and skip them."),
    ] = "stop",
    overwrite: Overwrite = False,
    workers: Workers = 1,
    max_document_mb: LongestLine = 64.0,
    shard_mb: ShardSize = None,
) -> None:
    """Tokenize conversations for fine-tuning: the tokens, the weight of each, and a table with the line of each conversation.

    A line has messages [{role, content}], prompt and completion, or ShareGPT's conversations [{from, value}].
    """
    from flagscale_like.data.preprocess import preprocess_chat
    from flagscale_like.data.readers import find_inputs
    from flagscale_like.data.shards import ChatOptions

    files = find_inputs(inputs)
    text = _chat_template(tokenizer, template, long, length)
    with show_progress(files) as progress:
        report, own = preprocess_chat(
            files,
            tokenizer,
            out,
            ChatOptions(text, train, length, long, skip_empty),
            workers=workers,
            bad_lines=bad_lines,
            overwrite=overwrite,
            max_document_bytes=int(max_document_mb * 2**20),
            shard_bytes=int(shard_mb * 2**20) if shard_mb else None,
            progress=progress,
        )
    _print_chat_report(report, own)
    typer.echo(f"wrote {out}.bin, .idx, .mask.bin, .mask.idx, .chat.json, .documents.parquet, .report.json")


@data_app.command("pairs", epilog=example("flagscale-like data pairs pairs.jsonl --tokenizer tok/ --out data/pairs"))
def pairs(  # typer makes an option of every parameter
    inputs: Records,
    tokenizer: TokenizerFolder,
    out: Prefix,
    template: Template = None,
    length: Annotated[int | None, typer.Option(min=2, help="Places of a row: train.seq_length.")] = None,
    long: Annotated[
        Literal["refuse", "drop", "cut"],
        typer.Option(help="Pairs whose two conversations do not fit --length together; cut shortens their ends."),
    ] = "refuse",
    skip_empty: Annotated[
        bool, typer.Option("--skip-empty", help="Leave out pairs with an answer of which no token counts.")
    ] = False,
    bad_lines: Annotated[
        Literal["stop", "skip"], typer.Option(help="Lines without a pair: stop at the first, or count and skip them.")
    ] = "stop",
    overwrite: Overwrite = False,
    workers: Workers = 1,
    max_document_mb: LongestLine = 64.0,
    shard_mb: ShardSize = None,
) -> None:
    """Tokenize pairs of answers for DPO and reward models: the tokens, which count, and a table with the line of each pair.

    A line has prompt, chosen and rejected (texts or messages), or chosen and rejected as whole conversations; margin and
    weight may stand beside them.
    """
    from flagscale_like.data.preprocess import preprocess_chat
    from flagscale_like.data.readers import find_inputs
    from flagscale_like.data.shards import ChatOptions

    files = find_inputs(inputs)
    text = _chat_template(tokenizer, template, long, length)
    with show_progress(files) as progress:
        report, own = preprocess_chat(
            files,
            tokenizer,
            out,
            ChatOptions(text, "all", length, long, skip_empty, pairs=True),
            workers=workers,
            bad_lines=bad_lines,
            overwrite=overwrite,
            max_document_bytes=int(max_document_mb * 2**20),
            shard_bytes=int(shard_mb * 2**20) if shard_mb else None,
            progress=progress,
        )
    _print_pair_report(report, own)
    typer.echo(f"wrote {out}.bin, .idx, .mask.bin, .mask.idx, .chat.json, .pairs.npy, .documents.parquet, .report.json")


@data_app.command(
    "judge", epilog=example("flagscale-like data judge answers.jsonl --judge judge.yaml --out pairs.jsonl")
)
def judge(
    answers: Annotated[
        Path, typer.Argument(help="JSON lines with prompt (a text or messages), first and second (two answers).")
    ],
    judge: Annotated[
        Path, typer.Option(help="YAML file with the keys of rl.reward: a judge, a function, a command, or a mixture.")
    ],
    out: Annotated[Path, typer.Option(help="File to write: the decided pairs, as `data pairs` reads them.")],
) -> None:
    """Have pairs of answers judged: a judge is asked in both orders, another reward by the higher score. Ties are left out.

    Interrupted, the same command goes on with the pairs that are not judged.
    """
    from flagscale_like.config import Parallel
    from flagscale_like.recipes.judge import judge_file, read_reward
    from flagscale_like.runtime.parallel import parallel_context

    options = read_reward(judge)
    with parallel_context(Parallel(), alone=True) as ctx:
        judge_file(answers, options, out, ctx, typer.echo)


def _chat_template(tokenizer: Path, template: Path | None, long: str, length: int | None) -> str:
    """The chat template of `data chat` and `data pairs`, from its file or the tokenizer's folder."""
    from flagscale_like.data.chat import read_template, read_template_file
    from flagscale_like.errors import DataError

    if long != "refuse" and length is None:
        raise ConfigError(f"--long {long} needs --length, the places of a row (train.seq_length)")
    text = read_template_file(template) if template else read_template(tokenizer)
    if text is None:
        raise DataError(f"tokenizer {tokenizer}: has no chat template: give one with --template FILE (Jinja)")
    return text


def _print_pair_report(report: Report, tokenizer: Path) -> None:
    """Print the counts of `data pairs`, what was left out, where a reward is read, and what a run needs."""
    from flagscale_like.data.chat_shards import COUNTED, CUT, ENDS
    from flagscale_like.data.pair_shards import MARGINS, OTHER_PROMPTS

    if report.dropped or report.bad_lines:
        print_report(report)
    number, counted = report.documents // 2, report.counts[COUNTED]
    typer.echo(
        f"{number:,} pairs, {report.tokens:,} tokens, of which {counted:,} count ({counted / report.tokens:.1%}); "
        f"{report.counts.get(CUT, 0):,} cut; {report.counts[MARGINS]:,} with a margin"
    )
    for name, count in report.counts.items():
        if name.startswith(ENDS):
            typer.echo(f"a reward is read at the last counted token: {name.removeprefix(ENDS)} of {count:,} answers")
    if report.counts[OTHER_PROMPTS]:
        typer.echo(f"note: {report.counts[OTHER_PROMPTS]:,} {OTHER_PROMPTS}: each answer counts after its own tokens")
    typer.echo(f"a run names the tokenizer {tokenizer}, which has the chat template")


def _print_chat_report(report: Report, tokenizer: Path) -> None:
    """Print the counts of `data chat`, what was left out, and what a run needs."""
    from flagscale_like.data.chat_shards import COUNTED, CUT, ENDS
    from flagscale_like.data.tokenizer import Tokenizer

    if report.dropped or report.bad_lines:
        print_report(report)
    counted = report.counts[COUNTED]
    typer.echo(
        f"{report.documents:,} conversations, {report.tokens:,} tokens, of which {counted:,} count "
        f"({counted / report.tokens:.1%}); {report.counts.get(CUT, 0):,} cut"
    )
    words = Tokenizer(tokenizer)
    end = words.decode_one(words.eod)
    other = {name: number for name, number in report.counts.items() if name.startswith(ENDS) and name != ENDS + end}
    for name, number in other.items():
        typer.echo(
            f"note: {number:,} {name}, not with the end-of-text token {end}, at which generation stops: see the chat template"
        )
    typer.echo(f"a run names the tokenizer {tokenizer}, which has the chat template")


@data_app.command("inspect", epilog=example("flagscale-like data inspect data/corpus --samples 3"))
def inspect(
    prefix: Annotated[Path, typer.Argument(help="Path of the .bin and .idx without the suffix.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder. Default: the tokenizer that `preprocess` used.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of documents to show, evenly spaced in the data.")] = 3,
) -> None:
    """Print the number of documents and tokens, a histogram of lengths, and some documents with their source lines.

    Of conversations, the tokens that count are coloured; between « and » where the output is no terminal.
    """
    from rich.console import Console

    from flagscale_like.data.inspect import describe_index

    prefix = Path(str(prefix).removesuffix(".idx").removesuffix(".bin"))
    console = Console(highlight=False, soft_wrap=True)
    for line in describe_index(prefix, tokenizer, samples=samples, colour=console.is_terminal):
        console.print(line, markup=False)


@data_app.command("locate", epilog=example("flagscale-like data locate --run runs/demo --step 1200 --top 5"))
def locate(
    run: Annotated[Path, typer.Option(help="A run folder, or one checkpoint of it.")],
    step: Annotated[int, typer.Option(min=1, help="The training step.")],
    rank: Annotated[int | None, typer.Option(help="Show only the samples that this rank read.", min=0)] = None,
    attempt: Annotated[
        int | None,
        typer.Option(min=1, help="If the step ran several times because of rewinds: which time. Default: the last."),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Number of samples to show, the largest loss first; 0 for all.")] = 10,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each sample, with the whole text.")
    ] = False,
) -> None:
    """Show the documents that a training step read, with source file, line and text, in the order of their loss."""
    import json
    from dataclasses import asdict

    from flagscale_like.data.inspect import excerpt
    from flagscale_like.data.provenance import Provenance, dp_rank_of, locate, open_order, readings_of
    from flagscale_like.data.tokenizer import Tokenizer

    run_dir, segments, draws = _order_records(run)
    readings = readings_of(segments, step)
    if attempt is not None and attempt > len(readings):
        raise ConfigError(f"--attempt ({attempt}): step {step} ran {len(readings)} times: give 1 to {len(readings)}")
    reading = readings[(attempt or len(readings)) - 1]
    segment, config = reading.segment, reading.segment.config
    if step > config.train.steps:
        raise ConfigError(f"--step ({step}): the run has {config.train.steps} steps (train.steps): give one of them")
    provenance = Provenance(open_order(segment, draws), config.data.source_names)
    dp_rank = dp_rank_of(segment, rank) if rank is not None else None
    found = locate(run_dir, reading, provenance, dp_rank=dp_rank)
    tokenizer = Tokenizer(config.data.required_tokenizer)
    shown = found[: top or None]
    if as_json:
        for sample in shown:
            texts = [tokenizer.decode(provenance.tokens(part).tolist()) for part in sample.parts]
            parts = [asdict(part) | {"text": text} for part, text in zip(sample.parts, texts, strict=True)]
            typer.echo(json.dumps({"step": step, **asdict(sample), "parts": parts}, ensure_ascii=False))
        return
    again = f"; attempt {readings.index(reading) + 1} of {len(readings)}" if len(readings) > 1 else ""
    order = "the worst loss first" if any(s.loss is not None for s in found) else "no losses are recorded for this step"
    typer.echo(
        f"step {step} read samples {reading.first:,} to {reading.first + reading.count - 1:,}{again}; "
        f"{len(shown)} of {len(found)} shown, {order}"
    )
    for sample in shown:
        loss = f"loss {fixed(sample.loss)}, " if sample.loss is not None else ""
        typer.echo(f"sample {sample.position}: {loss}dp rank {sample.dp_rank}, micro-batch {sample.micro_batch}")
        for part in sample.parts:
            text = excerpt(tokenizer.decode(provenance.tokens(part).tolist()), 120)
            typer.echo(f"  {part} ({part.source}, document {part.document}, tokens {part.start}-{part.end}) {text}")


def _order_records(run: Path) -> tuple[Path, list[Segment], list[DrawState]]:
    """Read the records from which the order of the samples follows: the run folder's, or those of its checkpoints.

    Returns:
        The run folder, the segments of the run, and the draw states of dynamic data selection.

    Raises:
        DataError: the folder holds neither samples.jsonl nor a readable checkpoint.
    """
    from flagscale_like.checkpoint.manifest import read_state, step_folders
    from flagscale_like.data.draws import read_draws
    from flagscale_like.data.provenance import draws_of_states, read_journal, segments_of_states
    from flagscale_like.errors import CheckpointError, DataError

    is_checkpoint = run.name.startswith("step_") and not RunFolder(run).checkpoints.is_dir()
    run_dir = run.parent.parent if is_checkpoint else run.parent if run.name == "checkpoints" else run
    segments = [] if is_checkpoint else read_journal(run_dir)
    if segments:
        return run_dir, segments, read_draws(run_dir)
    states = []
    for folder in [run] if is_checkpoint else step_folders(RunFolder(run_dir).checkpoints):
        try:
            states.append(read_state(folder))
        except CheckpointError:
            continue  # the others may be readable
    if not states:
        raise DataError(
            f"{run}: holds neither a samples.jsonl, which training with data.sources writes, nor a readable checkpoint: give "
            "a run folder"
        )
    return run_dir, segments_of_states(states), draws_of_states(states)


app.add_typer(data_app, name="data")
