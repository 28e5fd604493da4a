"""Groups of a query and its passages for tests: a positive repeats the query's name, a negative has another one's."""

import json
import random
from pathlib import Path


def write_groups(path: Path, count: int, *, negatives: int = 3, seed: int = 0, scores: bool = False) -> Path:
    """Groups of random letters with one or two positives and 1 to `negatives` negatives."""
    draw = random.Random(seed)
    names = ["".join(draw.choices("abcdefgh", k=5)) + str(number) for number in range(count + negatives)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            others = draw.sample([name for name in names if name != names[number]], draw.randint(1, negatives))
            record = {
                "query": f"where is {names[number]}?",
                "pos": [f"{names[number]} is {word}" for word in ("here", "there")[: draw.randint(1, 2)]],
                "neg": [f"{name} is gone" for name in others],
            }
            if scores and number % 2:
                record["pos_scores"] = [1.0] * len(record["pos"])
                record["neg_scores"] = [round(draw.random(), 3) for _ in others]
            file.write(json.dumps(record) + "\n")
    return path
