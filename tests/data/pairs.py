"""Pairs of answers for tests: which of two is better shows in their words."""

import json
import random
from pathlib import Path

QUESTIONS = ("What is two and two?", "And three?", "Is it four?", "What is five?")


def write_pairs(path: Path, count: int, *, seed: int = 0, longest: int = 12) -> Path:
    """Pairs of answers of random letters: the chosen one is of a to d, the rejected one of e to h."""
    draw = random.Random(seed)

    def letters(alphabet: str) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(2, longest)))

    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            record = {"prompt": draw.choice(QUESTIONS), "chosen": letters("abcd"), "rejected": letters("efgh")}
            if number % 2:
                record["margin"] = round(draw.random(), 3)
            file.write(json.dumps(record) + "\n")
    return path
