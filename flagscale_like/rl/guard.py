"""The guard on exploration: what happens to rollouts outside of what the reward model was validated on; see config.Outside.

Rewards that a model gives are right where it was seen to be right. A policy that is trained against it leaves that region,
because the model's errors pay there as well as its knowledge (Gao et al. 2023). The guard takes that pay away, and keeps what
it finds for people or judges to label, so that the next reward model knows it.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flagscale_like.config import Outside
from flagscale_like.json_files import dispensable, keep_records, open_records, read_records, replace_file, write_record
from flagscale_like.rl.answers import Answer, Score
from flagscale_like.rl.validation import Validation, at_level

Why = Literal["high", "low", "band", "disagreement", "surprise", "kl"]
WHYS: tuple[Why, ...] = ("high", "low", "band", "disagreement", "surprise", "kl")


OUTSIDE = ("outside/share", *(f"outside/{why}" for why in WHYS))  # what is reported: shares of the rollouts


@dataclass(frozen=True)
class Guarded:
    """Scores after the guard.

    Attributes:
        scores: changed where an answer is outside.
        why: of each answer, why it is outside; empty for one that is inside.
    """

    scores: list[Score]
    why: list[tuple[Why, ...]]


@dataclass(frozen=True)
class Place:
    """Where an answer lies, seen from the reference.

    Attributes:
        kl: its log-ratio, the whole answer's log-probability under the policy less that under the reference, in nats.
        surprise: minus its log-probability under the reference, in nats a token.
    """

    kl: float | None = None
    surprise: float | None = None


class Guard:
    """Finds the rollouts that are outside, and does to them what the options say.

    Args:
        record: what the reward model was validated on.
        part: the reward model's name in a mixture, and its weight there; without it, the score is the model's.

    Attributes:
        record: see above; that of a renewed reward model may take its place.
    """

    def __init__(self, options: Outside, record: Validation, *, part: tuple[str, float] | None = None) -> None:
        self.options, self.record, self.part = options, record, part

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest score that is inside."""
        low, high = self.options.scores
        return at_level(self.record.scores, low), at_level(self.record.scores, high)

    @property
    def kl_bound(self) -> float | None:
        """The highest log-ratio that is inside, in nats; None where nothing bounds it."""
        if self.options.kl != "validated":
            return self.options.kl
        return at_level(self.record.kl, self.options.scores[1]) if self.record.kl else None

    @property
    def surprise_bound(self) -> float | None:
        """The highest surprise that is inside, in nats a token; None where nothing bounds it."""
        level = self.options.surprise
        return at_level(self.record.surprise, level) if self.record.surprise and level < 1 else None

    def apply(self, scores: Sequence[Score], places: Sequence[Place] | None = None) -> Guarded:
        """Guard the scores of some answers.

        Args:
            places: where each answer lies; None where that is not known.
        """
        known: Sequence[Place] = places if places is not None else [Place()] * len(scores)
        why = [self.reasons(score, place) for score, place in zip(scores, known, strict=True)]
        guarded = [self._changed(score, own) if own else score for score, own in zip(scores, why, strict=True)]
        return Guarded(guarded, why)

    def reasons(self, score: Score, place: Place = Place()) -> tuple[Why, ...]:
        """Why an answer is outside; nothing where it is inside."""
        if self.options.action == "off":
            return ()
        (low, high), value = self.bounds, self._of_model(score)
        found: dict[Why, bool] = {
            "high": value > high,
            "low": value < low,
            "band": self.record.band_of(value).accuracy < self.options.accuracy,
            "disagreement": self._disagrees(score),
            "surprise": _beyond(place.surprise, self.surprise_bound),
            "kl": _beyond(place.kl, self.kl_bound),
        }
        return tuple(name for name, is_so in found.items() if is_so)

    def _of_model(self, score: Score) -> float:
        return score.value if self.part is None else score.parts[self.part[0]]

    def _disagrees(self, score: Score) -> bool:
        level = self.options.disagreement
        if len(score.heads) < 2 or not self.record.disagreement or level == 1:
            return False
        return statistics.pstdev(score.heads) > at_level(self.record.disagreement, level)

    def _changed(self, score: Score, why: tuple[Why, ...]) -> Score:
        """The score of an answer that is outside.

        The reward model knows nothing of it, so that its score is that of a typical answer, the median, and no more: any
        higher one, such as the highest that is inside, would make it worth more than most of what is inside, and the policy
        would go there. A score below the lowest is put there with any action: left out, a bad answer would go unpunished.
        """
        options, (low, _) = self.options, self.bounds
        value = self._of_model(score)
        inside = max(value, low)
        if why != ("low",):
            inside = min(inside, at_level(self.record.scores, 0.5))
        if options.action == "penalise" and why != ("low",):
            inside -= options.penalty * self.record.deviation
        weight = 1.0 if self.part is None else self.part[1]
        return replace(
            score,
            value=score.value + weight * (inside - value),
            rejected=score.rejected or (options.action == "reject" and why != ("low",)),
            reason="; ".join(filter(None, (score.reason, f"outside: {', '.join(why)}"))),
        )


def _beyond(value: float | None, bound: float | None) -> bool:
    return value is not None and bound is not None and value > bound


def shares(why: Sequence[tuple[Why, ...]]) -> dict[str, float]:
    """What is reported of rollouts: the share that is outside, and that of each reason; by the names of OUTSIDE."""
    counts, total = Counter(reason for own in why for reason in own), max(1, len(why))
    numbers = [sum(map(bool, why)), *(counts[name] for name in WHYS)]
    return {name: number / total for name, number in zip(OUTSIDE, numbers, strict=True)}


class Candidates:
    """The rollouts outside that are kept for labelling: a JSON line each, on rank 0.

    Args:
        path: of the file.
        keep: lines that stay; the oldest go first.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep

    def add(self, step: int, answers: Sequence[Answer], scores: Sequence[Score], why: Sequence[tuple[Why, ...]]) -> int:
        """Keep the answers of a step that are outside. Returns how many they are."""
        found = [
            {"step": step, **record_of(answer), "score": score.value, "heads": list(score.heads), "why": list(own)}
            for answer, score, own in zip(answers, scores, why, strict=True)
            if own
        ]
        if found and self.keep:
            with dispensable(self.path), open_records(self.path) as file:
                for record in found:
                    write_record(file, record)
            self._forget()
        return len(found)

    def _forget(self) -> None:
        """Drop the oldest lines once there are twice as many as may stay."""
        records = read_records(self.path)
        if len(records) > 2 * self.keep:
            lines = "".join(json.dumps(record) + "\n" for record in records[-self.keep :])
            replace_file(self.path, lines.encode("utf-8"))

    def go_back(self, step: int) -> None:
        """Drop what later steps kept: they are made again."""
        keep_records(self.path, "step", step)

    def since(self, step: int) -> list[dict[str, Any]]:
        """What was kept after a step, the newest first, each answer once."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for record in reversed(read_records(self.path)[-self.keep :] if self.keep else []):
            if record.get("step", 0) > step:
                found.setdefault((record["prompt"], record["text"]), record)
        return list(found.values())


def record_of(answer: Answer) -> dict[str, Any]:
    """An answer as a line of a file."""
    return {
        "prompt": answer.prompt,
        "text": answer.text,
        "fields": dict(answer.fields),
        "prompt_ids": [int(number) for number in answer.prompt_ids],
        "ids": [int(number) for number in answer.ids],
        "finish": answer.finish,
        "messages": [dict(message) for message in answer.messages],
    }


def answer_of(record: dict[str, Any]) -> Answer:
    """The answer of a line that record_of() made; other keys are not read."""
    return Answer(**{name: record[name] for name in record_of(Answer("", ""))})
