"""Shards of groups: each line of the inputs becomes a query, its positives and its negatives, each a document.

| keys of a line | |
|---|---|
| `query` | a text |
| `pos` | a text, or a list of texts that answer the query |
| `neg` | a list of texts that do not; or none |
| `pos_scores`, `neg_scores` | a teacher's score of each of them, as FlagEmbedding writes them |
| `scores` | the same in one list, first those of `pos` |
| `instruction` | what is put before the query; or an object with `query` and `passage` |

FlagEmbedding's `prompt` is read as `instruction`, LLM-Embedder's `teacher_scores` as `scores`. Other keys are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from flagscale_like.data.formats import printable
from flagscale_like.data.readers import BadLine, Document, Piece, PieceReader
from flagscale_like.data.report import Report
from flagscale_like.data.shards import BATCH_CHARACTERS, ShardMaker, ShardOptions
from flagscale_like.data.texts import EncodedText, TextEncoder
from flagscale_like.errors import required

QUERY, POSITIVE, NEGATIVE = 0, 1, 2  # GroupText.side

# Names of Report.counts.
GROUPS, SCORED, NO_NEGATIVES = "groups", "groups with scores", "groups without negatives"
QUERIES_CUT, PASSAGES_CUT = "queries cut", "passages cut"
EMPTY, REPEATED, POSITIVE_TOO = "empty negatives", "repeated passages", "negatives that are a positive or the query"
# Reasons of Report.dropped.
TOO_FEW = "groups with too few negatives"

Item = TypeVar("Item")


class BadGroupError(ValueError):
    """A line holds no group; the message says why, without the line's number."""


@dataclass(frozen=True)
class GroupText(Document):
    """A text of a group, with its side and a teacher's score; nan for none."""

    side: int = QUERY
    score: float = math.nan


@dataclass(frozen=True)
class GroupRecord:
    """A query and its passages.

    Attributes:
        query: the text, without white space at its ends, as all texts here.
        positives, negatives: texts, none twice.
        positive_scores, negative_scores: a teacher's score of each; nan for none.
        query_instruction, passage_instruction: what the line says is put before the texts; None: it says nothing.
        left_out: how many passages were left out, by reason.
    """

    query: str
    positives: list[str]
    negatives: list[str]
    positive_scores: list[float]
    negative_scores: list[float]
    query_instruction: str | None = None
    passage_instruction: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        """Whether a teacher has scored the passages."""
        return not math.isnan(self.positive_scores[0])


def parse_group(text: str) -> GroupRecord:
    """Read the group of one line of JSON.

    Raises:
        BadGroupError: the text is not JSON; the query or all positives are missing or empty; the query is equal to a
            positive; the scores are not one finite number for each passage; or a key has another type.
    """
    return group_of(read_object(text))


def read_object(text: str) -> dict[str, Any]:
    """The object of one line of JSON.

    Raises:
        BadGroupError: it is none.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadGroupError(f"no JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadGroupError(f"is {type(record).__name__}, not an object with query, pos and neg")
    return record


def group_of(record: Mapping[str, Any]) -> GroupRecord:
    """The group of a record; see parse_group()."""
    query = record.get("query")
    if not isinstance(query, str):
        found = ", ".join(map(str, record)) or "(none)"
        raise BadGroupError(f"has no query (its keys are {found}): give query, pos and neg")
    query = query.strip()
    if not query:
        raise BadGroupError("the query is empty")
    positives, negatives = _texts(record, "pos"), _texts(record, "neg")
    if not positives:
        raise BadGroupError("has no pos: a group needs a positive")
    if "" in positives:
        raise BadGroupError(f"positive {positives.index('') + 1} is empty")
    if query in positives:
        raise BadGroupError(f"the query is equal to positive {positives.index(query) + 1}")
    positive_scores, negative_scores = _scores(record, len(positives), len(negatives))
    left: dict[str, int] = {}
    kept_positives = _kept(zip(positives, positive_scores, strict=True), {}, left)
    reasons = {"": EMPTY, query: POSITIVE_TOO, **dict.fromkeys(positives, POSITIVE_TOO)}
    kept_negatives = _kept(zip(negatives, negative_scores, strict=True), reasons, left)
    return GroupRecord(query, *_columns(kept_positives, kept_negatives), *_instructions(record), left_out=left)


def _kept(
    passages: Iterator[tuple[str, float]] | zip, reasons: Mapping[str, str], left: dict[str, int]
) -> dict[str, float]:
    """The passages and their scores, without those that `reasons` names and those that are there twice, which are counted."""
    kept: dict[str, float] = {}
    for text, score in passages:
        reason = reasons.get(text) or (REPEATED if text in kept else None)
        if reason:
            left[reason] = left.get(reason, 0) + 1
        else:
            kept[text] = score
    return kept


def _columns(
    positives: Mapping[str, float], negatives: Mapping[str, float]
) -> tuple[list[str], list[str], list[float], list[float]]:
    return list(positives), list(negatives), list(positives.values()), list(negatives.values())


def _texts(record: Mapping[str, Any], name: str) -> list[str]:
    value = record.get(name)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadGroupError(f"{name} is {_kind(value)}: give a text or a list of texts")
    return [text.strip() for text in value]


def _kind(value: object) -> str:
    if not isinstance(value, list):
        return type(value).__name__
    return "a list with " + ", ".join(sorted({type(item).__name__ for item in value} - {"str"}))


def _scores(record: Mapping[str, Any], positives: int, negatives: int) -> tuple[list[float], list[float]]:
    """A teacher's scores of the positives and of the negatives; nan where the record has none."""
    wanted = {"pos_scores": positives, "neg_scores": negatives}
    given = {name: record[name] for name in wanted if record.get(name) is not None}
    for name in ("scores", "teacher_scores"):
        if record.get(name) is not None:
            if given:
                raise BadGroupError(f"has {name} beside {next(iter(given))}: give one of them")
            given = {name: record[name]}
            wanted = {name: positives + negatives}
    if not given:
        return [math.nan] * positives, [math.nan] * negatives
    found: list[float] = []
    for name, count in wanted.items():
        values = given.get(name, [])
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            raise BadGroupError(f"{name} is no list of finite numbers")
        if len(values) != count:
            of = {"pos_scores": "pos", "neg_scores": "neg"}.get(name, "pos and neg")
            raise BadGroupError(
                f"{name} has {len(values)} numbers, {of} {'have' if ' ' in of else 'has'} {count} texts"
            )
        found += map(float, values)
    return found[:positives], found[positives:]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _instructions(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    value = record.get("instruction", record.get("prompt"))
    if value is None or isinstance(value, str):
        return value, None
    if not isinstance(value, Mapping) or set(value) - {"query", "passage"}:
        raise BadGroupError("instruction is neither a text nor an object with query and passage")
    sides = value.get("query"), value.get("passage")
    if not all(side is None or isinstance(side, str) for side in sides):
        raise BadGroupError("instruction has a query or passage that is no text")
    return sides


class GroupShardMaker(ShardMaker):
    """Makes shards of groups: of each line a query, its positives and its negatives, in this order."""

    def __init__(self, options: ShardOptions) -> None:
        super().__init__(options)
        self.options_of_groups = required(options.groups, "ShardOptions.groups")
        self.texts = TextEncoder(options.tokenizer_folder)

    def encoded(
        self, pieces: Sequence[Piece], report: Report, lines: dict[str, int]
    ) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
        for piece in pieces:
            reader = PieceReader(piece, self.options.read)
            held: list[tuple[Document, GroupRecord]] = []
            size = 0
            for found in reader:
                if isinstance(found, BadLine):
                    self.bad_line(found, piece, report)
                    continue
                report.read += 1
                try:
                    held.append((found, parse_group(found.text)))
                except BadGroupError as error:
                    self.bad_line(BadLine(found.source, found.line, str(error)), piece, report)
                size += len(found.text)
                if size >= BATCH_CHARACTERS:
                    yield from self._documents_of(held, piece, report)
                    held, size = [], 0
            yield from self._documents_of(held, piece, report)
            lines[printable(piece.path)] = reader.lines

    def _documents_of(
        self, held: Sequence[tuple[Document, GroupRecord]], piece: Piece, report: Report
    ) -> Iterator[tuple[GroupText, np.ndarray, None]]:
        options = self.options_of_groups
        queries = [_with(record.query_instruction, options.query_instruction, [record.query]) for _, record in held]
        passages = [
            _with(record.passage_instruction, options.passage_instruction, record.positives + record.negatives)
            for _, record in held
        ]
        encoded_queries = iter(self.texts.encode(_flat(queries), options.query_length))
        encoded_passages = iter(self.texts.encode(_flat(passages), options.passage_length))
        for line, record in held:
            query = next(encoded_queries)
            found = [next(encoded_passages) for _ in record.positives + record.negatives]
            yield from self._group(line, record, query, found, piece, report)

    def _group(
        self,
        line: Document,
        record: GroupRecord,
        query: EncodedText,
        passages: Sequence[EncodedText],
        piece: Piece,
        report: Report,
    ) -> Iterator[tuple[GroupText, np.ndarray, None]]:
        """The documents of one line. A negative that is a positive once both are cut is left out."""
        count, left = len(record.positives), dict(record.left_out)
        positives = {passage.ids.tobytes() for passage in passages[:count]}
        kept = [(n, p) for n, p in enumerate(passages) if n < count or p.ids.tobytes() not in positives]
        left[POSITIVE_TOO] = left.get(POSITIVE_TOO, 0) + len(passages) - len(kept)
        for reason, number in left.items():
            report.count(reason, number)
        negatives = len(kept) - count
        if negatives < self.options_of_groups.min_negatives:
            report.drop(TOO_FEW, len(line.text), (line.source, line.line, f"{negatives}"))
            return
        report.count(GROUPS)
        report.count(SCORED, int(record.scored))
        report.count(NO_NEGATIVES, int(not negatives))
        report.count(QUERIES_CUT, int(query.cut))
        report.count(PASSAGES_CUT, sum(passage.cut for _, passage in kept))
        texts, scores = record.positives + record.negatives, record.positive_scores + record.negative_scores
        yield GroupText(line.source, line.line, record.query), query.ids, None
        for n, passage in kept:
            side = POSITIVE if n < count else NEGATIVE
            yield GroupText(line.source, line.line, texts[n], side, scores[n]), passage.ids, None


def _with(own: str | None, default: str, texts: Sequence[str]) -> list[str]:
    return [(default if own is None else own) + text for text in texts]


def _flat(lists: Sequence[Sequence[Item]]) -> list[Item]:
    return [item for items in lists for item in items]
