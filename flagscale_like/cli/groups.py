"""`data groups`, `data mine` and `data score`: groups of a query and its passages, for embedding models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flagscale_like.cli.base import example
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
