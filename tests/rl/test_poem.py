"""The poem of examples/rl/poem: its rules, and the data that its YAML files read."""

import json
import random

import pytest

from examples.rl.poem.rules import LINES, make_poems, quality, rules, write_poem
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.rl.answers import Answer
from flagscale_like.rl.rewards.function import Function
from tests.harness import REPOSITORY


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abca/dbba/cdad/bacd", 1.0),
        ("abca/abca/cdad/bacd", 0.95),  # a line twice
        ("abca/dbb/cdad/bacd", 0.4 * 0.75 + 0.4 * 0.5 + 0.2),  # a short line, without its rhyme
        ("abca/dbba/cdad", 0.4 * 0.75 + 0.4 * 0.5 + 0.2 * 0.75 - 0.2),  # a line is missing
        ("abca/dbba/cdad/bacd/aaaa", 0.8),  # one too many
        ("", 0.0),
        ("/" * 40, 0.0),
    ],
)
def test_the_rules(text, expected):
    assert quality(text, 4) == pytest.approx(expected)


def test_the_data_is_what_the_rules_are_about(tmp_path):
    make_poems(tmp_path / "x" / "poems.jsonl", poems=200)
    poem = REPOSITORY / "examples" / "rl" / "poem"
    tokenizer = Tokenizer(poem / "tokenizer")
    texts = [json.loads(line)["text"] for line in (tmp_path / "x" / "poems.jsonl").read_text().splitlines()]
    scores = [quality(text[2:], int(text[0])) for text in texts]
    assert 0.5 < sum(scores) / len(scores) < 0.95  # they keep the rules now and then
    assert all(tokenizer.decode(tokenizer.encode_batch([text])[0]) == text for text in texts)
    assert all(len(tokenizer.encode_batch([text])[0]) == len(text) for text in texts)  # a token is a letter
    prompts = [json.loads(line) for line in (poem / "prompts.jsonl").read_text().splitlines()]
    assert [prompt["prompt"] for prompt in prompts] == ["3:", "4:", "5:"]
    careful = write_poem(random.Random(1), 4, care=1.0)
    assert quality(careful, 4) >= 0.95
    assert len(careful.split("/")) == LINES
    function = Function(f"{REPOSITORY}/examples/rl/poem/rules.py:rules")
    answers = [Answer(prompt["prompt"], careful, prompt) for prompt in prompts]
    assert [score.value for score in function.scores(answers)] == rules(answers)
