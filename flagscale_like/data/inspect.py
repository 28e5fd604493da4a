"""Describes the content of a .bin/.idx pair as text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flagscale_like.data.index_file import read_lengths, read_tokens
from flagscale_like.data.table import DocumentTable
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError

BAR = 40
EXCERPT_CHARACTERS = 300


def describe_index(prefix: Path, tokenizer: Path | None, *, samples: int) -> str:
    """Describe a .bin/.idx pair: documents, tokens, quartiles and histogram of document lengths, and sample documents.

    Args:
        prefix: the path without .bin or .idx.
        tokenizer: the tokenizer's folder. None uses the folder that PREFIX.report.json names. Without either, the sample
            documents are shown as token ids.
        samples: how many documents to show.

    Raises:
        DataError: the pair is missing or incomplete, or the tokenizer cannot be read.
    """
    try:
        lengths = read_lengths(str(prefix))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: is missing; `preprocess` writes it") from None
    edges = np.percentile(lengths, [0, 25, 50, 75, 99, 100])
    lines = [
        f"{prefix}: {len(lengths):,} documents, {int(lengths.sum(dtype=np.int64)):,} tokens, "
        f"{Path(f'{prefix}.bin').stat().st_size / 1e6:,.1f} MB",
        "tokens a document: " + ", ".join(f"{n} {int(e):,}" for n, e in zip(NAMES, edges, strict=True)),
        *_histogram(lengths),
    ]
    words = _tokenizer_of(prefix, tokenizer) if samples else None
    table = DocumentTable(prefix)
    for document in np.unique(np.linspace(0, len(lengths) - 1, samples).astype(int)).tolist():
        ids = read_tokens(str(prefix), lengths, document)
        where = table.place(document)
        lines.append(f"document {document}{f', {where[0]}:{where[1]}' if where else ''}, {lengths[document]:,} tokens:")
        lines.append("  " + excerpt(words.decode(ids.tolist())) if words else f"  {ids[:50].tolist()} ...")
    return "\n".join(lines)


NAMES = ("min", "25 %", "median", "75 %", "99 %", "max")


def excerpt(text: str, limit: int = EXCERPT_CHARACTERS) -> str:
    """The first `limit` characters of a text as a JSON string, with the length of the text if it is longer."""
    return json.dumps(text[:limit], ensure_ascii=False) + (
        f" ... ({len(text):,} characters)" if len(text) > limit else ""
    )


def _tokenizer_of(prefix: Path, tokenizer: Path | None) -> Tokenizer | None:
    report = Path(f"{prefix}.report.json")
    if tokenizer is None and report.is_file():
        named = Path(json.loads(report.read_text(encoding="utf-8"))["tokenizer"])
        tokenizer = named if named.is_dir() else None
    return Tokenizer(tokenizer) if tokenizer else None


def _histogram(lengths: np.ndarray) -> list[str]:
    """One line for each power of two: documents of at most that many tokens, and their share of all tokens."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts, tokens = np.bincount(powers), np.bincount(powers, weights=lengths)
    first = int(np.flatnonzero(counts)[0])
    width = len(f"{2 ** (len(counts) - 1):,}")
    return [
        f"  <= {2**power:>{width},} {'#' * round(BAR * counts[power] / counts.max()):<{BAR}} {counts[power]:,} documents, "
        f"{tokens[power] / tokens.sum():.1%} of tokens"
        for power in range(first, len(counts))
    ]
