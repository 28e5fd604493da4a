"""What all rewards share: scores are finite numbers, one for each answer, and an error shows the sample that it is about."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flagscale_like.errors import DataError, UserError
from flagscale_like.rl.answers import Answer, RewardSource, Score
from flagscale_like.runtime.parallel import ParallelContext

T = TypeVar("T")

LONGEST = 300  # characters of a text in an error
LARGEST = 1e12  # of a score: advantages are computed in fp32, whose squares end at 3e38


def show(answers: Sequence[Answer], number: int) -> str:
    """A sample in an error's words: its number, and its prompt and text as JSON, cut where they are long."""
    answer = answers[number]
    texts = {name: _cut(getattr(answer, name)) for name in ("prompt", "text")}
    return f"sample {number + 1} of {len(answers)}: {json.dumps(texts, ensure_ascii=False)}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


def checked_values(answers: Sequence[Answer], values: object, source: str) -> list[float]:
    """The numbers that a source returned for some answers.

    Args:
        source: who gave them, for the error.

    Raises:
        DataError: they are not as many as the answers, or one is not a finite number, or larger than LARGEST.
    """
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        values = _as_list(values)
    if not isinstance(values, Sequence):
        raise DataError(
            f"{source}: returned {type(values).__name__} for {len(answers)} answers: return a list of numbers"
        )
    if len(values) != len(answers):
        raise DataError(f"{source}: returned {len(values)} scores for {len(answers)} answers: return one for each")
    found = []
    for number, value in enumerate(values):
        try:
            score = float("" if isinstance(value, str | bytes) else value)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{source}: a score is {value!r}, not a number, for {show(answers, number)}") from None
        if not math.isfinite(score):
            raise DataError(f"{source}: a score is {score}, for {show(answers, number)}")
        if abs(score) > LARGEST:
            raise DataError(
                f"{source}: a score is {score:g}, beyond {LARGEST:g}, the most that is computed with, for "
                f"{show(answers, number)}"
            )
        found.append(score)
    return found


def _as_list(values: Any) -> Any:
    """The list of an array or a tensor."""
    return values.tolist() if hasattr(values, "tolist") else values


def on_main(ctx: ParallelContext, work: Callable[[], T]) -> T:
    """Run something on rank 0 alone; every rank gets its result.

    Raises:
        UserError: on every rank, where `work` raised one.
    """
    result: Any = None
    problem: UserError | None = None
    if ctx.is_main:
        try:
            result = work()
        except UserError as error:
            problem = error
    result, problem = ctx.broadcast((result, problem))
    if problem is not None:
        raise problem
    return result


class AskedByMain:
    """A source that is not spread over the ranks: rank 0 asks it, and all ranks get the scores."""

    def __init__(self, source: RewardSource, ctx: ParallelContext) -> None:
        self.source, self.ctx = source, ctx

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        """See RewardSource."""
        return on_main(self.ctx, lambda: self.source.scores(answers))
