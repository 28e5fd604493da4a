"""Bad input of task rl on the command line: the cause, the way out, and the exit code; and what goes on all the same."""

import json

import pytest

from tests.commands import run_commands
from tests.harness import REPOSITORY

REWARDS = """
import math

def raises(answers):
    return [1 / len(answer.text[:0]) for answer in answers]

def not_a_number(answers):
    return [math.nan] * len(answers)

def equal(answers):
    return [True] * len(answers)

def sees_stop(answers):
    return [float("th" in answer.text) / 0 if "th" in answer.text else len(answer.ids) for answer in answers]
"""


def function(name):
    return [f"rl.reward={{kind: function, function: 'rewards.py:{name}'}}"]


MESSAGES = {"messages": [{"role": "user", "content": "a name"}]}
FILES = {
    "long.jsonl": json.dumps({"prompt": "name a river: " * 30}),
    "empty.jsonl": "\n  \n",
    "broken.jsonl": json.dumps({"prompt": "name a river: "}) + "\n{oops",
    "deep.jsonl": "[" * 100_000,
    "half.jsonl": '{"prompt": "half a character \\ud83d"}',
    "number.jsonl": '{"prompt": 5}',
    "chat.jsonl": json.dumps(MESSAGES),
    "none.jsonl": json.dumps({"messages": []}),
    "strange.jsonl": json.dumps({"prompt": "name\u2028a river\u0085 "}, ensure_ascii=False),
    "template.jinja": "{% for m in messages %}{{ m['content'] }}: {% endfor %}",
}
CASES = {  # name -> changes, exit code, words
    "no file": (["data.prompts=[nowhere.jsonl]"], 11, ["nowhere.jsonl: cannot be read: No such file"]),
    "a folder": (["data.prompts=[.]"], 11, ["cannot be read: Is a directory"]),
    "long": (["data.prompts=[long.jsonl]"], 11, ["long.jsonl:1: the prompt has", "shorten it, or raise train.seq_length"]),
    "empty": (["data.prompts=[empty.jsonl]"], 11, ["empty.jsonl: holds no prompt"]),
    "broken": (["data.prompts=[broken.jsonl]"], 11, ["broken.jsonl:2: "]),
    "deep": (["data.prompts=[deep.jsonl]"], 11, ["deep.jsonl:1: "]),
    "half": (["data.prompts=[half.jsonl]"], 11, ["half.jsonl:1: ", "surrogates not allowed"]),
    "number": (["data.prompts=[number.jsonl]"], 11, ["number.jsonl:1: prompt is int, not a text"]),
    "chat without template": (["data.prompts=[chat.jsonl]"], 11, ["chat.jsonl:1: ", "for a run of task rl, rl.template"]),
    "no messages": (["data.prompts=[none.jsonl]", "rl.template=template.jinja"], 11, ["none.jsonl:1: "]),
    "raises": (function("raises"), 11, ["ZeroDivisionError: division by zero at /", "rewards.py:5, for sample 1 of"]),
    "nan": (function("not_a_number"), 11, ["a score is nan, for sample 1 of", '"prompt": ']),
    "no function": (function("missing"), 10, ["has no function missing; it has equal"]),
    "group of one": (["rl.rollout.samples=1"], 10, ["rollout.samples is 1: give 2 or more"]),
    "temperature 0": (["rl.rollout.temperature=0"], 10, ["temperature 0 draws the same rollout every time", "above 0"]),
    "nearly 0": (["rl.rollout.temperature=1e-30"], 10, ["temperature is 1e-30; give 0, or a number of at least 0.0001"]),
    "tokenizer": (["model.vocab_size=200"], 10, ["has 257 tokens, and model.vocab_size is 200"]),
    "not a reward model": (["rl.reward={kind: model, path: first}"], 12, ["is a language model, not a reward model: train"]),
    "no critic": (["run_dir=first", "rl.algorithm=ppo", "train.steps=2"], 12, ["holds no critic, and rl.algorithm ppo"]),
    "equal": ([*function("equal"), "rl.kl.coefficient=0"], 0, ["the rollouts: all of their scores are equal"]),
    "stop strings": ([*function("sees_stop"), "rl.rollout.stop_strings=[th]"], 0, ["done: step 1"]),
    "strange": (["data.prompts=[strange.jsonl]"], 0, ["1 prompts", "done: step 1"]),
    "chat": (["data.prompts=[chat.jsonl]", "rl.template=template.jinja"], 0, ["1 prompts", "done: step 1"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad input")
    for name, text in (FILES | {"rewards.py": REWARDS}).items():
        (folder / name).write_text(text, encoding="utf-8")
    example = REPOSITORY / "examples/rl"
    common = [
        "train.steps=1",
        "train.global_batch_size=8",
        "rl.rollout.samples=4",
        "rl.minibatches=1",
        "checkpoint.interval=0",
    ]
    common += [
        "optimizer.warmup_steps=0",
        f"data.prompts=[{example}/prompts.jsonl]",
        f"data.tokenizer={example}/tokenizer",
    ]
    common += [f"rl.reward={{kind: function, function: '{example}/rewards.py:speakable'}}"]

    def line(name, changes):
        return ["train", str(example / "tiny.yaml"), *common, f"run_dir={name}", *changes]

    lines = [line("first", ["checkpoint.interval=1"])] + [line(name, own[0]) for name, own in CASES.items()]
    first, *others = run_commands(lines, folder)[0]
    assert first.exit_code == 0, first
    return dict(zip(CASES, others, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_with_a_way_out_or_gone_on_with(outcomes, name):
    _, code, words = CASES[name]
    found = outcomes[name]
    assert found.exit_code == code, found
    said = found.error if code else found.printed
    assert all(word in said for word in words), said
    if code:
        assert said.count("\n") <= (code == 10) * 3, said  # a line; pydantic's errors have a line for each key
