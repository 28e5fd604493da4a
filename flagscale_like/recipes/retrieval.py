"""Exact search, and the measures of a ranking: what `evaluate --retrieval` and `data mine` share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flagscale_like.data.readers import find_inputs, read_documents
from flagscale_like.errors import DataError, required
from flagscale_like.json_files import BAD_JSON, lines_of
from flagscale_like.recipes.embedder import BLOCK, Embedder, Text, shortened

QUERIES_AT_ONCE = 4096  # rows of a product of queries and a block of passages
CUTS = (1, 5, 10, 100)


class Search:
    """The passages with the highest scores of each query, over passages that are added block by block.

    Memory holds the queries and `depth` scores of each, and one product of QUERIES_AT_ONCE queries and a block.

    Args:
        queries: float32 [q, h], of length 1.
        depth: passages to keep of each query.
        device: where scores are computed.
    """

    def __init__(self, queries: np.ndarray, depth: int, device: torch.device) -> None:
        self.queries, self.depth, self.device, self.seen = torch.from_numpy(queries), depth, device, 0
        self.scores = torch.full((len(queries), depth), -math.inf)
        self.ids = torch.full((len(queries), depth), -1, dtype=torch.int64)

    def add(self, passages: np.ndarray) -> None:
        """Compare the queries with further passages, float32 [n, h], whose numbers go on from those before."""
        block = torch.from_numpy(passages).to(self.device).T
        numbers = torch.arange(self.seen, self.seen + len(passages))
        for start in range(0, len(self.queries), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            found = (self.queries[part].to(self.device) @ block).cpu()
            scores = torch.cat((self.scores[part], found), dim=1)
            ids = torch.cat((self.ids[part], numbers.expand(len(found), -1)), dim=1)
            best = torch.topk(scores, self.depth, dim=1)
            self.scores[part], self.ids[part] = best.values, ids.gather(1, best.indices)
        self.seen += len(passages)

    def ranking(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scores of the passages, int64 and float32 [q, min(depth, passages)], the highest score first.

        Of equal scores the passage with the lower number comes first.
        """
        depth = min(self.depth, self.seen)
        ids, scores = self.ids[:, :depth].numpy(), self.scores[:, :depth].numpy()
        order = np.lexsort((ids, -scores), axis=1)
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def search(
    embedder: Embedder, queries: Sequence[Text], passages: Sequence[Text], depth: int, *, dimensions: int | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Rank passages for each query by the cosine of their vectors. All ranks call it; rank 0 gets Search.ranking()."""
    parts = [embedder.encode(queries[start : start + BLOCK], "query") for start in range(0, len(queries), BLOCK)]
    found = None
    if embedder.ctx.is_main:
        vectors = shortened(np.concatenate([part for part in parts if part is not None]), dimensions)
        found = Search(vectors, min(depth, len(passages)), embedder.ctx.platform.device)
    for start in range(0, len(passages), BLOCK):
        block = embedder.encode(passages[start : start + BLOCK], "passage")
        if found is not None:
            found.add(shortened(required(block, "vectors on rank 0"), dimensions))
    return found.ranking() if found is not None else None


@dataclass(frozen=True)
class Collection:
    """Queries, passages, and which passages answer which query.

    Attributes:
        queries, passages: texts by their ids.
        relevant: of each query, the grade of each passage that answers it, above 0.
        notes: what was left out, in lines.
    """

    queries: dict[str, Text]
    passages: dict[str, Text]
    relevant: dict[str, dict[str, int]]
    notes: list[str]


def read_collection(folder: Path, split: str = "test") -> Collection:
    """Read queries.jsonl, corpus.jsonl, and qrels/SPLIT.tsv or qrels.jsonl: BEIR's layout (Thakur et al. 2021).

    A record of the first two has `_id` and `text`, and may have `title`, which goes before the text, and an `instruction` of
    its own. A line of .tsv has a query's id, a passage's id and a grade; a record of qrels.jsonl has query, passage and
    score.

    Raises:
        DataError: a file is missing or is no such file, an id is there twice, or no query has a passage that answers it.
    """
    notes: list[str] = []
    queries = _texts_by_id(folder / "queries.jsonl", notes)
    passages = _texts_by_id(folder / "corpus.jsonl", notes)
    relevant: dict[str, dict[str, int]] = {}
    unknown = 0
    for query, passage, grade in _judgements(folder, split):
        if query not in queries or passage not in passages:
            unknown += 1
        elif grade > 0:
            relevant.setdefault(query, {})[passage] = grade
    if unknown:
        notes.append(f"{folder}: {unknown:,} judgements of a query or a passage that is not there are left out")
    if not relevant:
        raise DataError(f"{folder}: no query of the split {split} has a passage that answers it")
    without = len(queries) - len(relevant)
    if without:
        notes.append(f"{folder}: {without:,} of {len(queries):,} queries have no passage in {split}, and do not count")
    repeated = len(passages) - len({one.text for one in passages.values()})
    if repeated:
        notes.append(f"{folder / 'corpus.jsonl'}: {repeated:,} passages repeat the text of another")
    return Collection({query: queries[query] for query in relevant}, passages, relevant, notes)


def _texts_by_id(path: Path, notes: list[str]) -> dict[str, Text]:
    found: dict[str, Text] = {}
    empty: list[int] = []
    for line in read_documents(find_inputs([str(path)]), key=None):
        record = json.loads(line.text)
        if not isinstance(record, dict) or not isinstance(record.get("text"), str) or "_id" not in record:
            raise DataError(f"{path}:{line.line}: needs `_id` and `text`")
        name, text = str(record["_id"]), f"{record.get('title') or ''} {record['text']}".strip()
        if name in found:
            raise DataError(f"{path}:{line.line}: the id {name!r} is there twice")
        if text:
            found[name] = Text(text, record.get("instruction"))
        else:
            empty.append(line.line)
    if empty:
        notes.append(f"{path}:{empty[0]}: {len(empty):,} empty texts are left out")
    return found


def _judgements(folder: Path, split: str) -> Iterable[tuple[str, str, int]]:
    table, lines = folder / "qrels" / f"{split}.tsv", folder / "qrels.jsonl"
    if not table.is_file() and not lines.is_file():
        raise DataError(f"{folder}: has neither qrels/{split}.tsv nor qrels.jsonl: name another --split, or add one")
    path = table if table.is_file() else lines
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8")), start=1):
        try:
            if path == lines:
                record = json.loads(line)
                yield str(record["query"]), str(record["passage"]), int(record.get("score", 1))
            elif number > 1 or line.rpartition("\t")[2].lstrip("-").isdigit():  # the first line names the columns
                query, passage, grade = line.split("\t")
                yield query, passage, int(grade)
        except (*BAD_JSON, KeyError, TypeError):
            raise DataError(f"{path}:{number}: needs a query's id, a passage's id and a grade") from None


def measures(
    ranking: np.ndarray, relevant: Sequence[Mapping[int, int]], *, cuts: Sequence[int] = CUTS
) -> dict[str, float]:
    """Recall at each cut, MRR@10 and NDCG@10, means over the queries, as trec_eval computes them.

    Args:
        ranking: int [q, k], numbers of the passages of each query, the best first.
        relevant: of each query, the grade of each passage that answers it.
    """
    totals = dict.fromkeys([*(f"recall@{cut}" for cut in cuts), "MRR@10", "NDCG@10"], 0.0)
    for row, grades in zip(ranking.tolist(), relevant, strict=True):
        gains = [grades.get(passage, 0) for passage in row]
        for cut in cuts:
            totals[f"recall@{cut}"] += sum(gain > 0 for gain in gains[:cut]) / len(grades)
        first = next((place for place, gain in enumerate(gains[:10], start=1) if gain > 0), None)
        totals["MRR@10"] += 1 / first if first else 0.0
        totals["NDCG@10"] += _discounted(gains[:10]) / _discounted(sorted(grades.values(), reverse=True)[:10])
    return {name: total / len(relevant) for name, total in totals.items()}


def _discounted(gains: Sequence[int]) -> float:
    """Discounted cumulative gain (Järvelin and Kekäläinen 2002), with the grades as gains."""
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))


def evaluate_retrieval(
    embedder: Embedder, collection: Collection, *, dimensions: int | None = None
) -> dict[str, float] | None:
    """measures() of a model on a collection. All ranks call it; rank 0 gets them."""
    names = {name: number for number, name in enumerate(collection.passages)}
    found = search(
        embedder,
        list(collection.queries.values()),
        list(collection.passages.values()),
        max(CUTS),
        dimensions=dimensions,
    )
    if found is None:
        return None
    relevant = [
        {names[passage]: grade for passage, grade in collection.relevant[query].items()} for query in collection.queries
    ]
    return measures(found[0], relevant)
