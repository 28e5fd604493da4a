"""Hard negatives: of each query, passages that an embedding model ranks high and that are no positives of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_like.data.group_shards import BadGroupError, GroupRecord, group_of, read_object
from flagscale_like.data.readers import find_inputs, read_documents
from flagscale_like.errors import DataError
from flagscale_like.json_files import replace_file
from flagscale_like.recipes.embedder import Embedder, Text
from flagscale_like.recipes.retrieval import search
from flagscale_like.runtime.parallel import agree

SCORE_KEYS = ("pos_scores", "neg_scores", "scores", "teacher_scores")


@dataclass(frozen=True)
class MineOptions:
    """Which passages become negatives.

    Attributes:
        first, last: ranks from `first` up to but not with `last`, of the passages that are neither a positive nor the query.
        count: negatives of each query, drawn among them without repetition.
        seed: of the draw, which follows from (seed, number of the record) alone.
        below_positive: leave out passages whose score is above this share of the query's best positive's (NV-Retriever,
            Moreira et al. 2024: 0.95); None: none.
    """

    first: int = 10
    last: int = 210
    count: int = 15
    seed: int = 0
    below_positive: float | None = None


@dataclass
class Mined:
    """What was found.

    Attributes:
        records: with their negatives in the place of those before.
        passages: in the corpus, without repetitions.
        repeated, empty: texts of the corpus that were left out.
        replaced: negatives that were there before.
        unscored: records whose teacher's scores were left out, because they were of other negatives.
        short: records with fewer negatives than asked for.
        without: records with none.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    passages: int = 0
    repeated: int = 0
    empty: int = 0
    replaced: int = 0
    unscored: int = 0
    short: int = 0
    without: int = 0

    def write(self, path: Path) -> None:
        """Write the records as JSON lines, whole or not at all."""
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
        replace_file(path, "".join(lines).encode("utf-8"))


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], GroupRecord, int]]:
    """Each record of a file of groups, its group, and its line.

    Raises:
        DataError: a line has no group, or its texts cannot be encoded as UTF-8.
    """
    for line in read_documents(find_inputs([str(path)]), key=None):
        try:
            record = read_object(line.text)
            yield record, group_of(record), line.line
        except BadGroupError as error:
            raise DataError(f"{path}:{line.line}: {error}") from None


def read_corpus(path: Path, key: str) -> Iterator[str]:
    """The passages of a corpus: a field of JSON records, or the lines of a text file."""
    for document in read_documents(find_inputs([str(path)]), key=key, unit="line"):
        yield document.text.strip()


def mine(
    embedder: Embedder, path: Path, corpus: Path | None, options: MineOptions, *, key: str = "text"
) -> Mined | None:
    """Find negatives for every query of a file. All ranks call it; rank 0 gets them.

    Args:
        corpus: where negatives come from; None takes all passages of the file.
        key: field of the corpus's records that holds the text.

    Raises:
        DataError: on every rank: a file cannot be read.
    """
    found = agree(embedder.ctx, lambda: list(read_records(path)))
    mined, texts = Mined(), {}
    groups = [group for _, group, _ in found]
    instruction = _shared_instruction(groups)
    everything = (
        (text for group in groups for text in group.positives + group.negatives)
        if corpus is None
        else agree(embedder.ctx, lambda: list(read_corpus(corpus, key)))
    )
    for text in everything:
        if not text:
            mined.empty += 1
        elif text in texts:
            mined.repeated += 1
        else:
            texts[text] = len(texts)
    mined.passages = len(texts)
    if not texts:
        raise DataError(f"{corpus or path}: holds no passage")
    most = max(len(group.positives) for group in groups) + 1  # the positives and the query itself are left out
    queries = [Text(group.query, group.query_instruction) for group in groups]
    ranking = search(embedder, queries, [Text(text, instruction) for text in texts], options.last + most)
    if ranking is None:
        return None
    passages = list(texts)
    for number, ((record, group, _), ids, scores) in enumerate(zip(found, *ranking, strict=True)):
        own = {texts[text] for text in (*group.positives, group.query) if text in texts}
        negatives = [passages[n] for n in _choose(ids, scores, own, number, options)]
        mined.records.append(_with_negatives(record, negatives, mined))
        mined.replaced += len(group.negatives)
        mined.short += len(negatives) < options.count
        mined.without += not negatives
    return mined


def _shared_instruction(groups: Sequence[GroupRecord]) -> str | None:
    """What the records say is put before passages, where they agree; a passage of the corpus has no record of its own."""
    found = {group.passage_instruction for group in groups}
    if len(found) > 1:
        raise DataError(
            "the records have different instructions for passages, and a corpus has one: give --passage-instruction and "
            "leave them out of the records"
        )
    return found.pop()


def _choose(ids: np.ndarray, scores: np.ndarray, own: set[int], number: int, options: MineOptions) -> list[int]:
    """The passages that become negatives of one query, in the order of their ranks.

    Args:
        ids, scores: passages by rank.
        own: the positives and the query, where they are passages.
        number: of the record.
    """
    others = np.array([n for n in ids.tolist() if n not in own][: options.last], dtype=np.int64)
    ranked = others[options.first :]
    if options.below_positive is not None:
        score_of = dict(zip(ids.tolist(), scores.tolist(), strict=True))
        best = max((score_of[n] for n in own if n in score_of), default=np.inf)
        ranked = np.array([n for n in ranked.tolist() if score_of[n] <= options.below_positive * best], dtype=np.int64)
    draw = np.random.RandomState(
        np.array([options.seed, number], dtype=np.uint32)
    )  # its numbers never change with numpy
    chosen = draw.permutation(len(ranked))[: options.count]
    return ranked[np.sort(chosen)].tolist()


def _with_negatives(record: Mapping[str, Any], negatives: list[str], mined: Mined) -> dict[str, Any]:
    kept = {name: value for name, value in record.items() if name not in SCORE_KEYS}
    mined.unscored += len(kept) < len(record)
    return {**kept, "neg": negatives}
