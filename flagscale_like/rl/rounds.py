"""Rounds: policy and reward model are renewed in turns; config.Rounds has the options.

Each round is a folder, RUN_DIR/rounds/round_0001, and each phase of it leaves a file there that says that it is done:

| phase   | file | content |
|---------|------|---------|
| sample  | samples.jsonl | pairs of answers that the policy drew |
| judge   | judged.jsonl | of each pair, which answer is better |
| write   | pairs.json, train/, held_out/ | the decided pairs as sources of pairs |
| renew   | reward/ | a run with objective.kind reward, on the pairs of all rounds |
| accept  | accepted.json | the reward model from here on, and what it was measured against |
| improve | (the policy's checkpoints) | iterations of the policy |

No phase keeps anything in memory for the next one: each begins from files. So a run that is killed anywhere goes on inside
the phase that it was in (samples and verdicts are written in parts, the two runs have their checkpoints), and does what it
would have done. A model's optimizer is gone when the other one learns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flagscale_like.config import Rounds
from flagscale_like.data.token_pairs import TokenPair, write_token_pairs
from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_VALUES, write_json
from flagscale_like.rl.answers import Answer
from flagscale_like.rl.growing_file import GrowingFile
from flagscale_like.rl.guard import answer_of, record_of
from flagscale_like.rl.rewards.checked import on_main
from flagscale_like.rl.rewards.judge import Verdict
from flagscale_like.runtime.parallel import ParallelContext

PART = 32  # pairs that are drawn, and judged, between two writes

AnswerPair = tuple[Answer, Answer]


class Phases(Protocol):
    """What rounds are made of. All ranks call every method alike. Each begins from files."""

    def sample(self, number: int, begin: int, end: int) -> list[AnswerPair]:
        """Pairs begin to end - 1 of a round, drawn from the policy; the same whichever part is asked for."""
        ...

    def judge(self, pairs: Sequence[AnswerPair]) -> list[Verdict]:
        """The verdict on each pair."""
        ...

    def renew(self, folder: Path, sources: Sequence[str], start: str | None) -> str | None:
        """Train a reward model on sources of pairs.

        Args:
            folder: of the run, perhaps begun.
            start: the last reward model; None where there is none.

        Returns:
            Its path; None where the run was asked to stop.
        """
        ...

    def accuracy(self, path: str, sources: Sequence[str]) -> float:
        """Share of the pairs of all sources whose chosen answer gets the higher reward.

        What the model was validated on is kept beside it (rl.validation), where it is a model that a round made.
        """
        ...

    def improve(self, number: int, reward: str) -> bool:
        """Make the iterations of a round with a reward model; False where the run was asked to stop."""
        ...


class RoundsRun:
    """The rounds of a run. All ranks call it alike; rank 0 writes.

    Args:
        root: RUN_DIR/rounds.
        tokenizer: the policy's folder.
        reward: the reward model that the run begins with; None where the first round makes it.
        seed: of the split into pairs to learn from and pairs that are held out.
        say: tells the user a line, on rank 0.
    """

    def __init__(
        self,
        options: Rounds,
        phases: Phases,
        ctx: ParallelContext,
        root: Path,
        *,
        tokenizer: Path,
        reward: str | None,
        seed: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.options, self.phases, self.ctx, self.root = options, phases, ctx, Path(root)
        self.tokenizer, self.reward, self.seed, self.say = tokenizer, reward, seed, say

    def run(self) -> bool:
        """Make all rounds that are left. Returns False where the run was asked to stop."""
        for number in range(1, self.options.count + 1):
            reward = self.renewed(number)
            if reward is None or not self.phases.improve(number, reward):
                return False
        return True

    def folder(self, number: int) -> Path:
        """Of a round, counted from 1."""
        return self.root / f"round_{number:04d}"

    def renewed(self, number: int) -> str | None:
        """The reward model of a round: made now, or already there. None where the run was asked to stop."""
        folder, before = self.folder(number), self.reward
        found = on_main(self.ctx, lambda: read_accepted(folder))
        if found is None:
            self._judged(number, self._samples(number))
            on_main(self.ctx, lambda: self._write_pairs(number))
            path = self.phases.renew(folder / "reward", self._sources("train", number), before)
            if path is None:
                return None
            found = self._accept(number, path, before)
        self.reward = str(found["reward"])
        return self.reward

    def _samples(self, number: int) -> list[AnswerPair]:
        """The pairs of a round, drawn as far as they are not there."""
        file = GrowingFile(self.folder(number) / "samples.jsonl", PART)
        self._grow(file, self.options.pairs, lambda begin, end: self._drawn(number, begin, end))
        records = on_main(self.ctx, file.records)
        return [(answer_of(record["first"]), answer_of(record["second"])) for record in records]

    def _drawn(self, number: int, begin: int, end: int) -> list[dict[str, Any]]:
        if not begin:
            self.say(f"round {number}: draws {self.options.pairs} pairs of answers")
        pairs = self.phases.sample(number, begin, end)
        return [{"first": record_of(first), "second": record_of(second)} for first, second in pairs]

    def _judged(self, number: int, pairs: Sequence[AnswerPair]) -> None:
        """Have the pairs judged, as far as they are not."""

        def verdicts(begin: int, end: int) -> list[dict[str, Any]]:
            part = pairs[begin:end]
            asked = [pair for pair in part if list(pair[0].ids) != list(pair[1].ids)]
            found = iter(self.phases.judge(asked) if asked else [])
            return [{"verdict": (next(found) if list(a.ids) != list(b.ids) else Verdict.TIE).value} for a, b in part]

        self._grow(GrowingFile(self.folder(number) / "judged.jsonl", PART), len(pairs), verdicts)

    def _grow(self, file: GrowingFile, count: int, make: Callable[[int, int], list[dict[str, Any]]]) -> None:
        """Make a file of `count` records, part by part."""
        parts = on_main(self.ctx, lambda: None if file.whole else file.begin())
        if parts is None:
            return
        for begin in range(parts * PART, count, PART):
            records = make(begin, min(begin + PART, count))
            on_main(self.ctx, lambda records=records: file.add(records))
        on_main(self.ctx, file.finish)

    def _write_pairs(self, number: int) -> None:
        """Write the decided pairs of a round as two sources. On rank 0."""
        folder = self.folder(number)
        if (folder / "pairs.json").is_file():
            return
        samples = GrowingFile(folder / "samples.jsonl", PART).records()
        verdicts = [Verdict(r["verdict"]) for r in GrowingFile(folder / "judged.jsonl", PART).records()]
        pairs = []
        for record, verdict in zip(samples, verdicts, strict=True):
            sides = {Verdict.FIRST: ("first", "second"), Verdict.SECOND: ("second", "first")}.get(verdict)
            if sides is not None:
                chosen, rejected = (record[side] for side in sides)
                pairs.append(TokenPair(chosen["prompt_ids"], chosen["ids"], rejected["ids"]))
        held_out = round(self.options.held_out * len(pairs))
        counts = {v.value: verdicts.count(v) for v in Verdict}
        if not 0 < held_out < len(pairs):
            raise DataError(
                f"{folder}: {len(pairs)} of {len(verdicts)} pairs are decided ({counts}), too few to learn from and to hold "
                "out: remove the folder, and give more rl.rounds.pairs or another judge"
            )
        order = np.random.RandomState(np.array([self.seed, number], dtype=np.uint32)).permutation(len(pairs)).tolist()
        parts = {"held_out": order[:held_out], "train": order[held_out:]}
        for name, members in parts.items():
            write_token_pairs(folder / name, [pairs[n] for n in sorted(members)], self.tokenizer)
        write_json(
            folder / "pairs.json", {"verdicts": counts, **{name: len(members) for name, members in parts.items()}}
        )
        self.say(f"round {number}: {len(pairs)} of {len(verdicts)} pairs are decided, {held_out} of them held out")

    def _sources(self, name: str, upto: int) -> list[str]:
        return [str(self.folder(number) / name / "pairs") for number in range(1, upto + 1)]

    def _accept(self, number: int, path: str, before: str | None) -> dict[str, Any]:
        """Choose between the renewed reward model and the last one, on the held-out pairs of all rounds."""
        sources = self._sources("held_out", number)
        after = self.phases.accuracy(path, sources)
        last = self.phases.accuracy(before, sources) if before is not None else None
        accepted = last is None or after >= last - self.options.tolerance
        record = {
            "round": number,
            "reward": path if accepted else before,
            "accepted": accepted,
            "accuracy": after,
            "accuracy before": last,
            "held-out pairs of rounds": number,
        }
        on_main(self.ctx, lambda: write_json(self.folder(number) / "accepted.json", record))
        compared = "" if last is None else f", the last one's {last:.1%}"
        verdict = "is accepted" if accepted else "is refused, the last one stays"
        self.say(
            f"round {number}: accuracy of the renewed reward model on held-out pairs {after:.1%}{compared}: it {verdict}"
        )
        return record


def read_accepted(folder: Path) -> dict[str, Any] | None:
    """What a round decided; None where it has not yet.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / "accepted.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        str(record["reward"]), float(record["accuracy"]), bool(record["accepted"])
    except BAD_VALUES as error:
        raise DataError(f"{path}: is damaged ({type(error).__name__}: {error}): remove it to decide again") from None
    return record


def read_rounds(root: Path) -> list[dict[str, Any]]:
    """What each round that is decided says, in order: verdicts, numbers of pairs, accuracies."""
    found = []
    for folder in sorted(Path(root).glob("round_*")):
        record = read_accepted(folder)
        if record is not None:
            found.append(json.loads((folder / "pairs.json").read_text(encoding="utf-8")) | record)
    return found
