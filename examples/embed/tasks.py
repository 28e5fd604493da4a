"""The four retrieval tasks of the Aquila2 article (knowledge, memory, examples, tools) in small, as checkable data.

A query and the passage that answers it share neither of the two words that tell passages apart: each has a partner that means
the same. A model that has seen every word, but not every pair of words, has to find the passage of a new pair.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

QUALITIES = (
    "big large, small little, fast quick, old ancient, new modern, cheap inexpensive, rich wealthy, quiet silent, "
    "strange odd, happy glad, hard difficult, wet damp, clean spotless, strong sturdy, clever smart, angry furious"
)
THINGS = (
    "car automobile, ship vessel, house dwelling, road highway, child kid, doctor physician, teacher instructor, "
    "cash money, picture painting, stone rock, forest woods, rug carpet, coat jacket, cup mug, couch sofa, shop store"
)
ACTIONS = (
    "buy purchase, begin start, end finish, repair fix, choose select, hide conceal, show display, find locate, "
    "build construct, sell trade, send dispatch, copy duplicate, delete erase, sort arrange, count tally, print publish"
)
RECORDS = (
    "mail letter, photo image, song track, film movie, table spreadsheet, note memo, map chart, invoice bill, "
    "file document, link address, code program, date day, price cost, ticket pass, report summary, order request"
)


@dataclass(frozen=True)
class Task:
    """One kind of retrieval. The instructions are those of LLM-Embedder (Zhang et al. 2023).

    Attributes:
        query_instruction, passage_instruction: what is put before a text.
        query, passage: a text, with two places for words.
        words: the two lists of partners, the query's word first.
    """

    query_instruction: str
    passage_instruction: str
    query: str
    passage: str
    words: tuple[str, str]

    def pairs(self) -> list[tuple[str, str]]:
        """Every query with the passage that answers it."""
        partners = [[entry.split() for entry in part.split(", ")] for part in self.words]
        return [
            (self.query.format(first[0], second[0]), self.passage.format(first[1], second[1]))
            for first, second in itertools.product(*partners)
        ]

    def texts(self) -> list[str]:
        """Every query and passage, with its instruction."""
        return [text for q, p in self.pairs() for text in (self.query_instruction + q, self.passage_instruction + p)]


TASKS = {
    "knowledge": Task(
        "Represent this query for retrieving relevant documents: ",
        "Represent this document for retrieval: ",
        "where is a {} {}?",
        "here one finds a {} {}.",
        (QUALITIES, THINGS),
    ),
    "memory": Task(
        "Embed this dialogue to find useful historical dialogues: ",
        "Embed this historical dialogue for retrieval: ",
        "do you remember my {} {}?",
        "I told you of a {} {}.",
        (QUALITIES, RECORDS),
    ),
    "example": Task(
        "Convert this example into vector to look for useful examples: ",
        "Convert this example into vector for retrieval: ",
        "input: {} the {}",
        "input: {} the {} output: done",
        (ACTIONS, THINGS),
    ),
    "tool": Task(
        "Transform this user request for fetching helpful tool descriptions: ",
        "Transform this tool description for retrieval: ",
        "please {} this {}",
        "a tool to {} a {}",
        (ACTIONS, RECORDS),
    ),
}


def write_task(folder: Path, task: Task, *, held_out: float = 0.2, negatives: int = 3, seed: int = 0) -> None:
    """Write FOLDER/train.jsonl, and queries.jsonl, corpus.jsonl and qrels.jsonl of the queries that are held out.

    The corpus has every passage of the task. A negative shares one of its two words with the positive.
    """
    draw, pairs = random.Random(seed), task.pairs()
    side = round(len(pairs) ** 0.5)
    order = draw.sample(range(len(pairs)), len(pairs))
    tests = sorted(order[: round(held_out * len(pairs))])
    folder.mkdir(parents=True, exist_ok=True)
    train, known = [], sorted(set(order) - set(tests))
    for number in known:
        first, second = divmod(number, side)
        near = [n for n in known if n != number and (n // side == first or n % side == second)]
        query, passage = pairs[number]
        train.append({"query": query, "pos": [passage], "neg": [pairs[n][1] for n in draw.sample(near, negatives)]})
    _write(folder / "train.jsonl", train)
    own = {"instruction": task.query_instruction}
    _write(folder / "queries.jsonl", [{"_id": f"q{n}", "text": pairs[n][0], **own} for n in tests])
    own = {"instruction": task.passage_instruction}
    _write(folder / "corpus.jsonl", [{"_id": f"p{n}", "text": text, **own} for n, (_, text) in enumerate(pairs)])
    _write(folder / "qrels.jsonl", [{"query": f"q{n}", "passage": f"p{n}", "score": 1} for n in tests])


def _write(path: Path, records: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
