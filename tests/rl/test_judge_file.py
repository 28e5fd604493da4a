"""`data judge`: pairs in a file are judged part by part, and what is decided is what `data pairs` reads."""

import json

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from typer.testing import CliRunner

from flagscale_like.cli import app
from flagscale_like.data.pair_shards import parse_pair
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.rl.rounds import PART

LENGTHS = """
calls = []

def lengths(answers):
    calls.append(len(answers))
    if any(answer.fields.get("stop") for answer in answers):
        raise RuntimeError("stopped")
    return [len(answer.text) for answer in answers]
"""


def end_group():
    if dist.is_initialized():  # after an error
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def judge(*arguments):
    end_group()
    found = CliRunner().invoke(app, ["data", "judge", *map(str, arguments)])
    if isinstance(found.exception, Exception) and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


@pytest.fixture(autouse=True)
def _no_group_is_left():
    yield
    end_group()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "lengths.py").write_text(LENGTHS)
    (tmp_path / "judge.yaml").write_text(f"kind: function\nfunction: {tmp_path}/lengths.py:lengths\n")
    lines: list[dict] = [
        {"prompt": f"p{n}", "first": "a" * (1 + n % 3), "second": "bb", "n": n} for n in range(PART + 5)
    ]
    lines.append({"prompt": [{"role": "user", "content": "chat"}], "first": "long", "second": "s"})
    write(tmp_path, lines)
    return tmp_path


def write(folder, lines):
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_a_file_is_judged(folder):
    out = folder / "pairs.jsonl"
    said = judge(folder / "answers.jsonl", "--judge", folder / "judge.yaml", "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    ties = sum(n % 3 == 1 for n in range(PART + 5))
    assert f"{PART + 6} pairs: first {sum(n % 3 == 2 for n in range(PART + 5)) + 1}, second" in said
    assert len(found) == PART + 6 - ties
    assert found[0] == {"prompt": "p0", "n": 0, "chosen": "bb", "rejected": "a"}
    assert found[1] == {"prompt": "p2", "n": 2, "chosen": "aaa", "rejected": "bb"}
    assert [parse_pair(json.dumps(one)).chosen.messages[-1]["content"] for one in (found[0], found[-1])] == [
        "bb",
        "long",
    ]
    assert sorted(p.name for p in folder.glob("pairs*")) == ["pairs.jsonl"]
    with pytest.raises(DataError, match="exists"):
        judge(folder / "answers.jsonl", "--judge", folder / "judge.yaml", "--out", out)


def test_an_interrupted_command_goes_on(folder):
    lines, out = read(folder), folder / "pairs.jsonl"
    arguments = (folder / "answers.jsonl", "--judge", folder / "judge.yaml", "--out", out)
    write(folder, [*lines[:-1], lines[-1] | {"stop": True}])
    with pytest.raises(DataError, match="RuntimeError: stopped at .*lengths.py:7"):
        judge(*arguments)
    kept = folder / "pairs.jsonl.verdicts.part"
    assert len(kept.read_text().splitlines()) == PART
    (folder / "lengths.py").write_text(
        LENGTHS.replace("len(answer.text)", "-len(answer.text)").replace("RuntimeError", "KeyError")
    )
    write(folder, lines)
    judge(*arguments)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found[0]["chosen"] == "bb"  # judged before the interruption
    assert found[-1]["chosen"][0]["content"] == "s"  # by the changed function, after it
    out.unlink()
    write(folder, [*lines[:-1], lines[-1] | {"stop": True}])
    with pytest.raises(DataError):
        judge(*arguments)
    write(folder, lines[1:])
    with pytest.raises(DataError, match="holds verdicts on other pairs or of another judge"):
        judge(*arguments)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "p", "first": "a"}', "answers.jsonl:1: is no object with prompt, first and second"),
        ('{"prompt": "p", "first": "a", "second": 3}', "second is int, not a text"),
        ('{"prompt": [{"role": "x"}], "first": "a", "second": "b"}', "unknown role 'x'"),
        ("[", "answers.jsonl:1: "),
        ("", "holds no pair"),
    ],
)
def test_lines_that_are_no_pairs_are_refused(folder, line, words):
    (folder / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=words):
        judge(folder / "answers.jsonl", "--judge", folder / "judge.yaml", "--out", folder / "out.jsonl")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: judge\n", "give the judge either url"),
        ("kind: oracle\n", "judge.yaml: .*'oracle'"),
        ("kind: model\npath: runs/reward\n", "give it tokenizer: text"),
        ("[1, 2\n", "cannot be read"),
    ],
)
def test_files_that_describe_no_reward_are_refused(folder, text, words):
    (folder / "judge.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        judge(folder / "answers.jsonl", "--judge", folder / "judge.yaml", "--out", folder / "out.jsonl")
