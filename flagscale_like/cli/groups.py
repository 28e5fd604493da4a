"""`data groups`, `data mine` and `data score`: groups of a query and its passages, for embedding models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flagscale_like.cli.base import example, refuse_unread
from flagscale_like.cli.data import (
    LongestLine,
    Overwrite,
    Prefix,
    Records,
    ShardSize,
    TokenizerFolder,
    Workers,
    data_app,
    print_report,
    show_progress,
)
from flagscale_like.cli.embed import open_embedder, say_cut, say_instruction
from flagscale_like.cli.model_options import EmbedderOptions, ModelOptions, ModelTokenizer, shares, start_ranks
from flagscale_like.errors import ConfigError, DataError

QueryLength = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of a query; the rest is cut. Default: no limit.")
]
PassageLength = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of a passage; the rest is cut. Default: no limit.")
]


@data_app.command(
    "groups",
    epilog=example("flagscale-like data groups nq.jsonl --tokenizer tok/ --end --out data/nq --passage-length 128"),
)
def groups(  # typer makes an option of every parameter
    inputs: Records,
    tokenizer: TokenizerFolder,
    out: Prefix,
    query_length: QueryLength = None,
    passage_length: PassageLength = None,
    query_instruction: Annotated[
        str, typer.Option(help="Put before each query whose line has no instruction, as it is: end it with a space.")
    ] = "",
    passage_instruction: Annotated[str, typer.Option(help="The same before each passage.")] = "",
    end: Annotated[
        bool, typer.Option("--end", help="Put the end-of-text token behind each text; writes OUT-tokenizer.")
    ] = False,
    min_negatives: Annotated[int, typer.Option(min=0, help="Leave out groups with fewer negatives.")] = 0,
    bad_lines: Annotated[
        Literal["stop", "skip"], typer.Option(help="Lines without a group: stop at the first, or count and skip them.")
    ] = "stop",
    overwrite: Overwrite = False,
    workers: Workers = 1,
    max_document_mb: LongestLine = 64.0,
    shard_mb: ShardSize = None,
) -> None:
    """Tokenize groups of a query, its positives and its negatives for embedding models, with the line of each text.

    A line has query, pos and neg; pos_scores and neg_scores (or scores), and instruction may stand beside them.
    """
    from flagscale_like.data.preprocess import preprocess_groups
    from flagscale_like.data.readers import find_inputs
    from flagscale_like.data.shards import GroupOptions

    files = find_inputs(inputs)
    with show_progress(files) as progress:
        report, own = preprocess_groups(
            files,
            tokenizer,
            out,
            GroupOptions(query_length, passage_length, query_instruction, passage_instruction, min_negatives),
            end=end,
            workers=workers,
            bad_lines=bad_lines,
            overwrite=overwrite,
            max_document_bytes=int(max_document_mb * 2**20),
            shard_bytes=int(shard_mb * 2**20) if shard_mb else None,
            progress=progress,
        )
    if report.dropped or report.bad_lines:
        print_report(report)
    _print_counts(report.counts, report.documents, report.tokens, own)
    typer.echo(f"wrote {out}.bin, .idx, .groups.json, .groups.npy, .scores.npy, .documents.parquet, .report.json")


def _print_counts(counts: dict[str, int], texts: int, tokens: int, tokenizer: Path) -> None:
    """Print what is in the groups, what was left out of them, and what a run needs."""
    from flagscale_like.data.group_shards import (
        EMPTY,
        GROUPS,
        NO_NEGATIVES,
        PASSAGES_CUT,
        POSITIVE_TOO,
        QUERIES_CUT,
        REPEATED,
        SCORED,
    )
    from flagscale_like.data.texts import TextEncoder

    typer.echo(
        f"{counts[GROUPS]:,} groups of {texts:,} texts, {tokens:,} tokens; {counts[SCORED]:,} with scores; "
        f"{counts[QUERIES_CUT]:,} queries and {counts[PASSAGES_CUT]:,} passages cut"
    )
    left = [f"{counts[name]:,} {name}" for name in (EMPTY, REPEATED, POSITIVE_TOO) if counts.get(name)]
    if left:
        typer.echo(f"left out: {', '.join(left)}")
    if counts[NO_NEGATIVES]:
        typer.echo(f"note: {counts[NO_NEGATIVES]:,} {NO_NEGATIVES}: objective.passages has to be 1 with them")
    typer.echo(f"each text is: {TextEncoder(tokenizer).describe()}; a run names the tokenizer {tokenizer}")


@data_app.command(
    "mine",
    epilog=example("flagscale-like data mine nq.jsonl --checkpoint runs/embed --out nq-mined.jsonl --range 10-210"),
)
@shares(EmbedderOptions)
def mine(  # typer makes an option of every parameter
    input: Annotated[Path, typer.Argument(help="JSON records with query and pos.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write: the records with new neg.")],
    model: EmbedderOptions,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Where negatives come from: text or JSON records. Default: all passages of the input."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="With --corpus: field of its records that holds the text. Default: text.")
    ] = None,
    ranks: Annotated[
        str, typer.Option("--range", help="Ranks FROM-TO, from 0, of the passages that are no positives: candidates.")
    ] = "10-210",
    count: Annotated[int, typer.Option(min=1, help="Negatives of each query, drawn among the candidates.")] = 15,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    below_positive: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Leave out candidates that score above this share of the best positive."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Find hard negatives: passages that an embedding model ranks high for a query, by exact search.

    Positives, and texts that are equal to one or to the query, are left out. The negatives replace those of the record.
    """
    if corpus is None:
        refuse_unread("--corpus", key=key)
    first, last = _range_of(ranks)
    _check_out(out, overwrite=overwrite)
    start_ranks(model.layout(), model.nproc_per_node)
    from flagscale_like.recipes.mine import MineOptions
    from flagscale_like.recipes.mine import mine as mine_negatives

    with open_embedder(model, model.layout()) as (embedder, _):
        for side in ("query", "passage"):
            say_instruction(embedder, side)
        options = MineOptions(first, last, count, seed, below_positive)
        found = mine_negatives(embedder, input, corpus, options, key=key or "text")
        say_cut(embedder)
        if found is None:
            return
        found.write(out)
    typer.echo(
        f"wrote {out}: {len(found.records):,} queries with negatives of ranks {first} to {last} of {found.passages:,} "
        "passages"
    )
    notes = {
        "passages of the corpus that repeat another": found.repeated,
        "empty passages of the corpus": found.empty,
        "negatives of the records": found.replaced,
        "records' scores, which were of other negatives": found.unscored,
    }
    left = [f"{number:,} {noun}" for noun, number in notes.items() if number]
    if left:
        typer.echo(f"left out: {', '.join(left)}")
    if found.short:
        typer.echo(f"note: {found.short:,} queries have fewer than {count} negatives, {found.without:,} of them none")


def _range_of(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"--range {text!r}: give two ranks, such as 10-210")
    return int(first), int(last)


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_file() and not overwrite:
        raise DataError(f"{out}: exists: choose another file, or replace it with --overwrite")


@data_app.command(
    "score",
    epilog=example("flagscale-like data score nq.jsonl --checkpoint runs/llm --out scored.jsonl --answer answers"),
)
@shares(ModelOptions)
def score(
    input: Annotated[Path, typer.Argument(help="JSON records with query, pos, neg and an answer.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write: the records with pos_scores and neg_scores.")],
    model: ModelOptions,
    tokenizer: ModelTokenizer = None,
    answer: Annotated[
        str, typer.Option(help="Field of a record with the answer: a text, or a list, of which the first.")
    ] = "answer",
    template: Annotated[
        str, typer.Option(help=r"How passage, query and answer become a text; \n is a new line. The answer comes last.")
    ] = r"{passage}\n\n{query}\n\n{answer}",
    seq_length: Annotated[
        int | None,
        typer.Option(min=2, help="Places of a row; longer passages are cut. Default: the model's, at most 1024."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Score passages by a language model: the mean log-probability of the answer's tokens after each passage and the query.

    After an interruption, the same command goes on where it ended.
    """
    from flagscale_like.cli.model import MAX_DEFAULT_WINDOW

    parallel = model.layout()
    start_ranks(parallel, model.nproc_per_node)
    from flagscale_like.checkpoint.adapters import identities
    from flagscale_like.recipes.teacher import Teacher, score_file
    from flagscale_like.runtime.parallel import parallel_context

    source, own = model.open()
    folder = tokenizer or own
    if folder is None:
        raise ConfigError(f"{model.path}: names no tokenizer: give --tokenizer FOLDER")
    length = seq_length or min(source.arch.max_position_embeddings or MAX_DEFAULT_WINDOW, MAX_DEFAULT_WINDOW)
    how = {"micro_batch_size": model.micro_batch_size, "precision": model.precision}
    made_from = {"weights": identities(source), "layout": parallel.model_dump(mode="json"), **how}
    with parallel_context(parallel) as ctx:
        teacher = Teacher(
            source,
            folder,
            ctx,
            template=template.replace(r"\n", "\n"),
            seq_length=length,
            **how,
        )
        made_from |= {"ranks": ctx.world_size}
        found = score_file(teacher, input, out, made_from=made_from, answer=answer, overwrite=overwrite)
        if found is not None:
            typer.echo(
                f"wrote {out}: {found[0]:,} records; this call scored {found[1]:,} passages, {teacher.cut:,} of them cut"
            )
