"""Rounds: what is drawn, judged and accepted; a run that is stopped anywhere goes on inside its phase and does the same."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from flagscale_like.config import Parallel, Rounds
from flagscale_like.data.conversations import answer_lengths, check_readable, conversations_at, longest_row
from flagscale_like.data.index_file import read_lengths, read_tokens
from flagscale_like.data.token_pairs import TokenPair, write_token_pairs
from flagscale_like.errors import DataError, required
from flagscale_like.rl.answers import Answer
from flagscale_like.rl.growing_file import GrowingFile
from flagscale_like.rl.rewards.judge import Verdict
from flagscale_like.rl.rounds import PART, RoundsRun, read_accepted, read_rounds
from flagscale_like.runtime.parallel import parallel_context
from tests.data.chats import make_tokenizer
from tests.harness import run_ranks

OPTIONS = Rounds(
    count=3,
    iterations=2,
    pairs=PART + 8,
    judge={"kind": "function", "function": "x:f"},
    reward_model="x.yaml",
    held_out=0.25,
)


class Stop(Exception):
    pass


class Stepwise:
    """Phases without models. The call of number `stop` ends the run after it did half of its work, as a kill does."""

    def __init__(self, root, stop=None, accuracies=None):
        self.root, self.calls, self.stop = Path(root), 0, stop
        self.accuracies = accuracies or {1: 0.7, 2: 0.6, 3: 0.8}

    def _call(self):
        self.calls += 1
        if self.calls == self.stop:
            raise Stop

    def sample(self, number, begin, end):
        self._call()
        return [(self._answer(number, n, 0), self._answer(number, n, n % 8 != 3)) for n in range(begin, end)]

    def _answer(self, number, n, side):
        ids = [10 + n, 20 + number + 3 * side, 2]
        return Answer("p", f"{number} {n} {side}", {"n": n}, [1, 5 + n % 4], ids, "stop")

    def judge(self, pairs):
        self._call()
        assert all(list(a.ids) != list(b.ids) for a, b in pairs)  # equal answers are ties without a question
        order = list(Verdict)
        return [order[len(a.text + b.text) * (n + 1) % 4] for n, (a, b) in enumerate(pairs)]

    def renew(self, folder, sources, start):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "begun").write_text(f"{start}")
        self._call()
        marks = [hashlib.sha256(Path(f"{source}.bin").read_bytes()).hexdigest() for source in sources]
        (folder / "made").write_text(json.dumps([start and Path(start).parent.name, marks]))
        return str(folder)

    def accuracy(self, path, sources):
        self._call()
        return self.accuracies[int(Path(path).parent.name[-1])]

    def improve(self, number, reward):
        self._call()
        with open(self.root / "policy", "a") as file:
            file.write(f"{number} with {Path(reward).parent.name}\n")
        return True


def run(root, tokenizer, phases):
    said = []
    with parallel_context(Parallel()) as ctx:
        rounds = RoundsRun(
            OPTIONS, phases, ctx, root / "rounds", tokenizer=tokenizer, reward=None, seed=7, say=said.append
        )
        done = rounds.run()
    return done, said


def files_of(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def run_with_stops(folder, tokenizer):
    """The files of a whole run, and of runs that are stopped at each call and go on; and what the whole one said."""
    from megatron.core import parallel_state
    from torch import distributed

    whole = folder / "whole"
    whole.mkdir()
    phases = Stepwise(whole)
    done, said = run(whole, tokenizer, phases)
    assert done
    found = {}
    for stop in range(1, phases.calls + 1):
        root = folder / f"stop{stop}"
        root.mkdir()
        try:
            run(root, tokenizer, Stepwise(root, stop))
        except Stop:
            parallel_state.destroy_model_parallel()
            distributed.destroy_process_group()
        # A kill in the middle of a write: a part of a line, and folders that are not finished.
        for part in root.rglob("*.part"):
            with open(part, "a") as file:
                file.write('{"first": {"prom')
        # What improve() did is behind it: a second start skips whole rounds of it by the policy's own checkpoints.
        (root / "policy").unlink(missing_ok=True)
        run(root, tokenizer, Stepwise(root))
        found[stop] = files_of(root)
    return files_of(whole), found, said, read_rounds(whole / "rounds")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tok") / "tok", template=None)


def test_rounds_go_on_inside_the_phase_they_were_stopped_in(tmp_path, tokenizer):
    whole, stopped, said, rounds = run_ranks(1, run_with_stops, tmp_path, tokenizer)[0]
    normal = {name: data for name, data in whole.items() if ".chat.json" not in name}
    assert len(stopped) == 3 * (2 + 2 + 1 + 1 + 1) + 2  # two parts of samples and verdicts; two models from round 2 on
    for stop, files in stopped.items():
        same = {name: data for name, data in files.items() if ".chat.json" not in name}
        assert same.keys() == normal.keys(), stop
        for name, data in normal.items():
            text, other = (value.replace(root.encode(), b"") for value, root in
                           ((data, str(tmp_path / "whole")), (same[name], str(tmp_path / f"stop{stop}"))))  # fmt: skip
            assert text == other, (stop, name)
    assert [r["accepted"] for r in rounds] == [True, False, True]
    assert [r["accuracy before"] for r in rounds] == [None, 0.7, 0.7]
    assert (tmp_path / "whole" / "policy").read_text().split("\n")[:3] == [
        "1 with round_0001", "2 with round_0001", "3 with round_0003"
    ]  # fmt: skip
    start, marks = json.loads(whole["rounds/round_0003/reward/made"])
    assert (start, len(marks)) == ("round_0001", 3)  # from the last accepted model, on the pairs of all rounds
    assert any(
        "accuracy of the renewed reward model on held-out pairs 60.0%, the last one's 70.0%: it is refused" in s
        for s in said
    )
    counts = rounds[0]["verdicts"]
    assert sum(counts.values()) == OPTIONS.pairs
    assert counts["tie"] >= 5  # the pairs of equal answers, at least
    decided = counts["first"] + counts["second"]
    assert rounds[0]["held_out"] + rounds[0]["train"] == decided
    assert rounds[0]["held_out"] == round(0.25 * decided)


def test_files_that_grow_keep_whole_parts(tmp_path):
    file = GrowingFile(tmp_path / "x" / "f.jsonl", 2)
    assert (file.whole, file.records(), file.begin()) == (False, [], 0)
    file.add([{"n": 0}, {"n": 1}])
    file.add([{"n": 2}])
    assert file.begin() == 1  # the part of one record is dropped: it is not whole
    assert [r["n"] for r in file.records()] == [0, 1]
    file.add([{"n": 2}])
    file.finish()
    assert (file.whole, [r["n"] for r in file.records()], file.begin()) == (True, [0, 1, 2], 2)


def test_token_pairs_are_a_source_of_pairs(tmp_path, tokenizer):
    pairs = [TokenPair([1, 2, 3], [4, 5], [6], 0.5), TokenPair([7], [8], [9, 10, 11])]
    for _ in range(2):  # a folder that is there is replaced
        prefix = write_token_pairs(tmp_path / "pairs", pairs, tokenizer)
    found = required(conversations_at(prefix), "pairs")
    assert found.pairs
    assert found.counted == 7
    assert answer_lengths(prefix).tolist() == [2, 1, 1, 3]
    check_readable(prefix, found, places=16, vocab_size=300)
    lengths = read_lengths(prefix)
    assert longest_row(prefix) == 9
    assert [read_tokens(prefix, lengths, n).tolist() for n in range(4)] == [
        [1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8], [7, 9, 10, 11]
    ]  # fmt: skip
    assert np.fromfile(f"{prefix}.mask.bin", dtype=np.uint8).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1]
    with pytest.raises(DataError, match="pair 1 of 1 has an empty prompt or answer"):
        write_token_pairs(tmp_path / "none", [TokenPair([1], [], [2])], tokenizer)
    with pytest.raises(DataError, match="there are no pairs"):
        write_token_pairs(tmp_path / "none", [], tokenizer)


def test_a_damaged_decision_is_refused(tmp_path):
    assert read_accepted(tmp_path) is None
    (tmp_path / "accepted.json").write_text('{"reward": "x"}')
    with pytest.raises(DataError, match="is damaged"):
        read_accepted(tmp_path)
