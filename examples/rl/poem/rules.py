"""A form of poem whose rules can be checked, and data to learn it from.

A poem is four lines, with `/` between them. The prompt says how long each line is: `4:` asks for lines of four letters. Lines
1 and 2 rhyme, and lines 3 and 4: they end with the same letter. No line stands twice.

    4:abca/dbba/cdad/bacd

`python examples/rl/poem/rules.py FOLDER` writes the poems that base.yaml reads. A token of tokenizer/ is a letter: its ids
are the 256 bytes and the end of a text.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from flagscale_like.rl.answers import Answer

LETTERS, LENGTHS, LINES = "abcdefgh", (3, 4, 5), 4


def quality(text: str, length: int) -> float:
    """How well a poem keeps the rules, from 0 to 1: the length of its lines, their rhymes, and that no line stands twice."""
    lines = text.split("/")
    right = sum(len(line) == length for line in lines[:LINES]) / LINES
    pairs = zip(lines[0:LINES:2], lines[1:LINES:2], strict=False)
    rhymes = sum(bool(a and b) and a[-1] == b[-1] for a, b in pairs) / (LINES // 2)
    different = len({line for line in lines[:LINES] if line}) / LINES
    superfluous = abs(len(lines) - LINES)
    return max(0.0, 0.4 * right + 0.4 * rhymes + 0.2 * different - 0.2 * superfluous)


def rules(answers: Sequence[Answer]) -> list[float]:
    """The reward: `function: examples/rl/poem/rules.py:rules`."""
    return [quality(answer.text, int(answer.fields["length"])) for answer in answers]


def write_poem(draw: random.Random, length: int, *, care: float) -> str:
    """A poem of a writer who keeps each rule with probability `care`."""

    def line(end: str | None) -> str:
        size = length if draw.random() < care else max(1, length + draw.choice((-1, 1, 2)))
        body = draw.choices(LETTERS, k=size)
        return "".join(body[:-1]) + (end or body[-1])

    lines: list[str] = []
    for number in range(LINES if draw.random() < care else draw.choice((3, 5))):
        rhymes = number % 2 and draw.random() < care
        lines.append(line(lines[-1][-1] if rhymes else None))
    return "/".join(lines)


def make_poems(path: Path, *, poems: int = 4000, care: float = 0.7, seed: int = 0) -> None:
    """Write texts to begin with, which keep the rules now and then, each with its prompt before it."""
    draw = random.Random(seed)
    texts = [f"{length}:{write_poem(draw, length, care=care)}" for length in draw.choices(LENGTHS, k=poems)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) / "poems.jsonl"
    make_poems(target)
    print(f"wrote {target}")
