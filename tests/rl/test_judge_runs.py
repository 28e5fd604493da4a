"""A judge on our own engine: a model that has learned to judge, asked for a file of answers and as the reward of runs."""

import json
import random
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flagscale_like.cli import app
from flagscale_like.config import JudgeReward, Parallel
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.families import read_config
from flagscale_like.recipes.reinforce import open_generator
from flagscale_like.rl.rewards import Surroundings, open_judge
from flagscale_like.rl.rewards.judge import Comparison
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import run_ranks
from tests.rl.runs import close, make_folder, numbers, rl_config, run_all
from tests.rl.tiny_judge import make_judge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("judge"))
    make_judge(folder / "model")
    draw = random.Random(3)
    lines = [{"prompt": "p", "chosen": side(draw, "XYZ"), "rejected": side(draw, "abc")} for _ in range(12)]
    write(folder / "labelled.jsonl", lines)
    return folder


def side(draw, letters):
    return "".join(draw.choices(letters, k=draw.randint(1, 8)))


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def options_of(folder, **changes):
    model = folder / "model"
    return {
        "kind": "judge", "path": str(model), "instruction": str(model / "question.txt"), "max_new_tokens": 4
    } | changes  # fmt: skip


def compared(layout, cases):
    """Verdicts and counts of judges on a layout, what they said, and what this rank's engine was asked; or the error.

    Args:
        cases: (the judge's options, pairs of answers).
    """
    with parallel_context(Parallel(**layout)) as ctx:
        return [_compared(ctx, options, pairs) for options, pairs in cases]


def _compared(ctx, options, pairs):
    asked: list[str] = []

    def opened(judge):
        engine, tokenizer = open_generator(Path(judge.path), ctx, precision="fp32")
        own, words = engine.generate, Tokenizer(tokenizer)
        engine.generate = lambda prompts, sampling: (
            asked.extend(words.decode(prompt.ids) for prompt in prompts) or own(prompts, sampling)
        )
        return engine, tokenizer

    said = []
    around = Surroundings(ctx, seq_length=64, tokenizer=None, open_engine=opened, say=said.append)
    try:
        judge = open_judge(JudgeReward(**options), around)
        verdicts = judge.compare([Comparison(*pair) for pair in pairs])
    except (ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return [verdict.name for verdict in verdicts], str(judge.counts), said, asked


PAIRS = [("pp", "XYX", "ab"), ("p", "cab", "YZZZ"), ("ppp", "abc", "abc"), ("pp", "Z", "bbbbb"), ("p", "c", "ZX")]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=["dp2", "tp2"])
def test_a_model_judges_alike_on_every_layout_and_is_asked_in_both_orders(folder, layout):
    options = options_of(folder, labelled=str(folder / "labelled.jsonl"), agreement=0.9)
    long = [("p", "X", "a"), ("p", "X" * 60, "a" * 60)]
    ranks = run_ranks(2, compared, layout, [(options, PAIRS), (options_of(folder), long)])
    agreed = "the judge agrees with 100.0% of the labelled pairs that it decides (12 pairs, 0 ties, 0 not parsed)"
    for (verdicts, counts, said, _), without_room in ranks:
        assert verdicts == ["FIRST", "SECOND", "TIE", "FIRST", "SECOND"]
        assert counts == "asked 34, unparsed 0, ties 1, turned 1"
        assert said == [agreed]
        # Refused on both ranks, though only one of them would have been asked the long question.
        room = "DataError: judge: of 4 questions, prompt 2 has 124 tokens, and the room is 96, with the new ones:"
        assert without_room.startswith(room)
    own = [found[3][12 if not layout else 24 :] for found, _ in ranks]
    questions = [f"{p}={a}|{b}>" for p, *both in PAIRS for a, b in (both, both[::-1])]
    shared = own[0] if layout else [own[n % 2][n // 2] for n in range(len(questions))]  # the ranks share them, or not
    assert shared == questions


def test_a_model_that_does_not_judge_is_refused(folder, tmp_path):
    write(tmp_path / "turned.jsonl", [{"prompt": "p", "chosen": "abc", "rejected": "XY"}] * 4)
    (tmp_path / "said.txt").write_text("{prompt}={first}|{second}>A")  # it is answered already: the model ends its text
    turned = options_of(folder, labelled=str(tmp_path / "turned.jsonl"), agreement=0.5)
    said = options_of(folder, instruction=str(tmp_path / "said.txt"))
    disagrees, unparsed = run_ranks(1, compared, {}, [(turned, PAIRS), (said, PAIRS * 3)])[0]
    assert disagrees.startswith(
        "ConfigError: the judge agrees with 0.0% of the labelled pairs that it decides (4 pairs, 0"
    )
    assert unparsed.startswith("DataError: judge: 30 of 30 verdicts cannot be parsed, more than unparsed_limit (0.1)")


def test_data_judge_asks_a_model(folder, tmp_path):
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(options_of(folder)))
    write(tmp_path / "answers.jsonl", [{"prompt": p, "first": a, "second": b} for p, a, b in PAIRS])
    out = tmp_path / "pairs.jsonl"
    arguments = ["data", "judge", str(tmp_path / "answers.jsonl"), "--judge", str(tmp_path / "judge.yaml")]
    said = run_ranks(1, command, [*arguments, "--out", str(out)])[0]
    assert "5 pairs: first 2, second 2, tie 1, unparsed 0; asked 10, unparsed 0, ties 1, turned 1" in said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["chosen"] for record in found] == ["XYX", "YZZZ", "Z", "ZX"]


def command(arguments):
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_a_run_is_rewarded_by_a_judge_on_every_layout(folder, tmp_path):
    """The judge's own model is the policy: it draws answers of both kinds, and learns to draw those that it prefers."""
    (tmp_path / "question.txt").write_text("{prompt}{first}|{second}>")
    write(tmp_path / "prompts.jsonl", [{"prompt": f"{'p' * n}="} for n in (1, 2, 3, 4)])
    reward = options_of(folder, instruction=str(tmp_path / "question.txt"), opponents=2)
    architecture = read_config(folder / "model")[1].model_dump(mode="json")
    changes = {
        "model": architecture,
        "data__prompts": [str(tmp_path / "prompts.jsonl")],
        "checkpoint": {"interval": 0, "init_from_hf": str(folder / "model")},
        "train__steps": 3,
    }
    layouts = {"one": {}, "dp2": {}, "tp2": {"tp": 2, "sp": True}}
    rl = {"reward": reward, "rollout": {"samples": 8, "max_new_tokens": 6}}
    configs = {name: rl_config(tmp_path / name, folder, rl, parallel=layout, **changes)
               for name, layout in layouts.items()}  # fmt: skip
    found = run_ranks(1, run_all, [configs["one"]])[0]
    found += run_ranks(2, run_all, [configs["dp2"], configs["tp2"]])[0]
    assert [error for _, error in found] == [None] * 3
    wanted = numbers(tmp_path / "one")
    assert wanted[0]["reward/mean"] == pytest.approx(0.5)  # what one answer wins, another loses
    assert wanted[0]["reward/deviation"] > 0.1
    for name in ("dp2", "tp2"):
        close(numbers(tmp_path / name), wanted)
