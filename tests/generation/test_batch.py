"""`generate --batch`: answers are added to a file, each once, whatever happens in between."""

import json

import pytest

from tests.commands import run_commands
from tests.generation.folders import make_folder

ROWS = [
    {"prompt": "a line", "id": "x"},
    {"messages": [{"role": "user", "content": "and?"}], "max_new_tokens": 3},
    {"prompt": "", "temperature": 0},
    {"prompt": "then another", "seed": 8, "top_k": 20},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    make_folder(folder / "hf")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "top_k": "many"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "\u00fc\u2028" * 40}) + "\n")
    (folder / "other.jsonl").write_text('{"text": "not ours"}\n')
    return folder


def answers_in(path):
    return {(row["number"], row["sample"]): row for row in map(json.loads, path.read_text().splitlines())}


def test_a_file_is_answered_once(folder):
    batch = ["generate", "--checkpoint", "hf", "--batch", "rows.jsonl", "--samples", "2", "--max-new-tokens", "8"]
    batch += ["--temperature", "0.9", "--stop", "zz"]
    lines = [
        [*batch, "--out", "one.jsonl"],
        [*batch, "--out", "one.jsonl", "--rows", "3"],
        [*batch, "--out", "one.jsonl", "--seed", "5"],
        [*batch, "--out", "other.jsonl"],
        [*batch[:3], "--batch", "bad.jsonl"],
        [*batch[:3], "--batch", "long.jsonl"],
        ["generate", "--checkpoint", "hf", "--prompt", "a", "--samples", "2"],
    ]
    (found,) = run_commands(lines, folder)
    added, again, other, foreign, bad, long, misused = found
    assert added.exit_code == 0, added.error
    assert "added 8 texts" in added.printed
    rows = answers_in(folder / "one.jsonl")
    assert sorted(rows) == [(number, sample) for number in range(4) for sample in range(2)]
    assert rows[0, 1]["id"] == "x"
    assert rows[1, 0]["tokens"] <= 3
    assert rows[2, 0]["completion"] == rows[2, 1]["completion"]  # at temperature 0
    assert rows[3, 0]["completion"] != rows[3, 1]["completion"]
    assert again.exit_code == 0, again.error
    assert "8 of 8 texts are there already" in again.printed + again.error
    assert "added 0 texts" in again.printed
    assert (other.exit_code, foreign.exit_code, bad.exit_code, long.exit_code, misused.exit_code) == (
        11,
        11,
        11,
        10,
        10,
    )
    assert "has another model, prompt or sampling" in other.error
    assert "is no answer of this command" in foreign.error
    assert "bad.jsonl, line 2: top_k is 'many'" in bad.error
    assert "long.jsonl, line 1" in long.error
    assert not (folder / "bad.answers.jsonl").exists()

    whole = (folder / "one.jsonl").read_text().splitlines(keepends=True)
    (folder / "torn.jsonl").write_text("".join(whole[:3]) + whole[3][:20])  # as a kill leaves it
    ranks = run_commands([[*batch, "--out", "torn.jsonl"]], folder, ranks=2)
    assert [outcome.exit_code for (outcome,) in ranks] == [0, 0], ranks[0][0].error
    assert "added 5 texts" in ranks[0][0].printed
    torn = answers_in(folder / "torn.jsonl")
    for row in (*rows.values(), *torn.values()):
        row["logprob"] = pytest.approx(row["logprob"], abs=1e-4)
    assert torn == rows
