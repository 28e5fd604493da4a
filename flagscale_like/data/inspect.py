"""Describes the content of a .bin/.idx pair as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.text import Text

from flagscale_like.data.best_fit import best_fit_decreasing
from flagscale_like.data.conversations import Conversations, conversations_at, mask_of, places_of
from flagscale_like.data.groups import Groups, GroupTable, groups_at
from flagscale_like.data.index_file import read_lengths, read_tokens
from flagscale_like.data.table import DocumentTable
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError

BAR = 40
EXCERPT_CHARACTERS = 300
GROUP_CHARACTERS = 120  # of each text of a group


def describe_index(prefix: Path, tokenizer: Path | None, *, samples: int, colour: bool = False) -> Iterator[str | Text]:
    """Describe a .bin/.idx pair: documents, tokens, quartiles and histogram of document lengths, and sample documents.

    Yields lines. Of conversations they say how many tokens count, and how full rows of their length get; samples are whole,
    and their tokens that count are marked. Of groups they say how many passages each has, and samples are whole groups.

    Args:
        prefix: the path without .bin or .idx.
        tokenizer: the tokenizer's folder. None uses the folder that PREFIX.report.json names. Without either, the sample
            documents are shown as token ids.
        samples: how many documents to show.
        colour: mark by colour, for a terminal; otherwise by « and ».

    Raises:
        DataError: the pair is missing or incomplete, or the tokenizer cannot be read.
    """
    try:
        lengths = read_lengths(str(prefix))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: is missing; `preprocess` writes it") from None
    edges = np.percentile(lengths, [0, 25, 50, 75, 99, 100])
    chat, groups = conversations_at(prefix), groups_at(prefix)
    noun = "conversation" if chat else "text" if groups else "document"
    yield (
        f"{prefix}: {len(lengths):,} {noun}s, {int(lengths.sum(dtype=np.int64)):,} tokens, "
        f"{Path(f'{prefix}.bin').stat().st_size / 1e6:,.1f} MB"
    )
    if chat:
        yield from _describe_chat(chat, lengths)
    if groups:
        yield from _describe_groups(groups, GroupTable(prefix))
    yield f"tokens a {noun}: " + ", ".join(f"{n} {int(e):,}" for n, e in zip(NAMES, edges, strict=True))
    yield from _histogram(lengths, noun)
    words = _tokenizer_of(prefix, tokenizer) if samples else None
    table = DocumentTable(prefix)
    if groups:
        yield from _sample_groups(prefix, GroupTable(prefix), words, samples)
        return
    for document in np.unique(np.linspace(0, len(lengths) - 1, samples).astype(int)).tolist():
        ids = read_tokens(str(prefix), lengths, document)
        where = table.place(document)
        yield f"{noun} {document}{f', {where[0]}:{where[1]}' if where else ''}, {lengths[document]:,} tokens:"
        if words and chat:
            yield marked(words, ids, read_tokens(mask_of(prefix), lengths, document), colour=colour)
        else:
            yield "  " + excerpt(words.decode(ids.tolist())) if words else f"  {ids[:50].tolist()} ..."


def _describe_chat(chat: Conversations, lengths: np.ndarray) -> Iterator[str]:
    tokens = int(lengths.sum(dtype=np.int64))
    which = "every answer" if chat.train == "all" else "the last answer of a conversation"
    which, noun = ("the two answers of a pair", "pair") if chat.pairs else (which, "conversation")
    if chat.pairs:
        yield f"{len(lengths) // 2:,} pairs: the chosen answer is the first of two conversations"
    yield f"{chat.counted:,} tokens count ({chat.counted / tokens:.1%}): {which}; tokenizer {chat.tokenizer}"
    places = places_of(lengths, chat)
    if chat.length:
        rows = len(best_fit_decreasing(places, chat.length))
        full = places.sum(dtype=np.int64) / chat.length
        yield (
            f"packed into rows of {chat.length:,}: {rows:,} rows, {full / rows:.1%} full; each {noun} in a row of its own: "
            f"{full / len(places):.1%}"
        )


def _describe_groups(groups: Groups, table: GroupTable) -> Iterator[str]:
    yield f"{groups.groups:,} groups, {groups.scored:,} with a teacher's scores; tokenizer {groups.tokenizer}"
    for name, counts in zip(("positives", "negatives"), table.counts.T, strict=True):
        edges = np.percentile(counts, [0, 25, 50, 75, 99, 100])
        yield f"{name} a group: " + ", ".join(f"{n} {int(e):,}" for n, e in zip(NAMES, edges, strict=True))
    for side, instruction in (("query", groups.query_instruction), ("passage", groups.passage_instruction)):
        if instruction:
            yield f"before each {side}, unless its line says otherwise: {instruction!r}"


def _sample_groups(prefix: Path, table: GroupTable, words: Tokenizer | None, samples: int) -> Iterator[str]:
    """The texts of some groups, evenly spaced in the data, each with its side and score."""
    where = DocumentTable(prefix)
    for group in np.unique(np.linspace(0, len(table) - 1, samples).astype(int)).tolist():
        query, (positives, negatives) = int(table.queries[group]), table.counts[group].tolist()
        line = where.place(query)
        yield f"group {group}{f', {line[0]}:{line[1]}' if line else ''}:"
        for place, document in enumerate(range(query, query + 1 + positives + negatives)):
            side = "query" if not place else "pos" if place <= positives else "neg"
            ids, score = read_tokens(str(prefix), table.lengths, document), float(table.scores[document])
            text = (
                excerpt(words.decode(ids.tolist(), special=True), GROUP_CHARACTERS) if words else f"{ids[:50].tolist()}"
            )
            yield f"  {side}{'' if np.isnan(score) else f' {score:g}'} ({len(ids):,} tokens) {text}"


def marked(words: Tokenizer, ids: np.ndarray, weights: np.ndarray, *, colour: bool) -> Text:
    """A conversation as text, in which the tokens that count are marked. Weights other than 1 stand behind their part."""
    text, first = Text("  "), 0
    for last in range(1, len(ids) + 1):
        if last < len(ids) and weights[last] == weights[first]:
            continue
        part, weight = words.decode(ids[first:last].tolist(), special=True), float(weights[first])
        if not weight:
            text.append(part, style="dim")
        else:
            note = f"[{weight:g}]" if weight != 1 else ""
            text.append(part + note if colour else f"«{part}»{note}", style="bold green")
        first = last
    return text


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


def _histogram(lengths: np.ndarray, noun: str) -> list[str]:
    """One line for each power of two: documents of at most that many tokens, and their share of all tokens."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts, tokens = np.bincount(powers), np.bincount(powers, weights=lengths)
    first = int(np.flatnonzero(counts)[0])
    width = len(f"{2 ** (len(counts) - 1):,}")
    return [
        f"  <= {2**power:>{width},} {'#' * round(BAR * counts[power] / counts.max()):<{BAR}} {counts[power]:,} {noun}s, "
        f"{tokens[power] / tokens.sum():.1%} of tokens"
        for power in range(first, len(counts))
    ]
