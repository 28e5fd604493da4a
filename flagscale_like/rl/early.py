"""Rewards that come while the last rollouts are still drawn: each copy of the policy has its own rollouts scored.

What scores a copy's rollouts is no concern of the other copies: no rank waits for one of another copy. So a function, a
command and a judge behind a URL are asked in a thread, by one rank of the copy, and a reward model makes passes of its own.
What needs all ranks at once has no early form: a reward model whose copies share experts. Nor has a judge on our own engine,
which draws, too: all verdicts in one batch take fewer passes than those of each prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from flagscale_like.errors import UserError
from flagscale_like.generation.rollout import Rollout
from flagscale_like.model.spec import ModelSpec
from flagscale_like.rl.answers import Answer, RewardSource, Score
from flagscale_like.rl.rewards.checked import AskedByMain
from flagscale_like.rl.rewards.judge import JudgedAnswers
from flagscale_like.rl.rewards.model import RewardModel

AnswerOf = Callable[[Rollout], Answer]
SamplesOf = Callable[[int], int]  # the number of a prompt -> how many rollouts are drawn of it
Key = tuple[int, int]  # numbers of prompt and sample


class Early(Protocol):
    """Scores the rollouts of one copy. The ranks that share it call every method alike."""

    def add(self, rollout: Rollout) -> None:
        """A rollout has ended."""
        ...

    def finish(self) -> dict[Key, Score]:
        """The scores, on the copy's first rank; others may return none.

        Raises:
            UserError: on the first rank, where one failed.
        """
        ...


def early_form(
    source: RewardSource, answer_of: AnswerOf, samples_of: SamplesOf, *, is_first: bool, passes: bool = True
) -> Early | None:
    """How a source scores early; None where it cannot.

    Args:
        is_first: whether this rank is the first of its copy.
        passes: whether a model may make passes before the end.
    """
    if isinstance(source, JudgedAnswers):
        source = source.outside or source
    if isinstance(source, AskedByMain):
        return AskedInThread(source.source, answer_of, samples_of, asks=is_first)
    if isinstance(source, RewardModel) and passes and source.engine.shared_experts is None:
        return ScoredInPasses(source, answer_of)
    return None


class AskedInThread:
    """Asks a source that runs outside of the ranks, about the rollouts of a prompt once all of them are there.

    Args:
        asks: whether this rank asks.
    """

    def __init__(self, source: RewardSource, answer_of: AnswerOf, samples_of: SamplesOf, *, asks: bool) -> None:
        self.source, self.answer_of, self.samples_of = source, answer_of, samples_of
        self._waiting: dict[int, list[Rollout]] = {}  # by prompt, where not all of its rollouts are there
        self._asked: list[tuple[list[Rollout], Future[list[Score]]]] = []
        self._pool = ThreadPoolExecutor(1) if asks else None

    def add(self, rollout: Rollout) -> None:
        """See Early."""
        if self._pool is None:
            return
        own = self._waiting.setdefault(rollout.prompt, [])
        own.append(rollout)
        if len(own) == self.samples_of(rollout.prompt):
            own = sorted(self._waiting.pop(rollout.prompt), key=lambda one: one.sample)
            answers = [self.answer_of(one) for one in own]
            self._asked.append((own, self._pool.submit(self.source.scores, answers)))

    def finish(self) -> dict[Key, Score]:
        """See Early."""
        assert not self._waiting, f"prompts {list(self._waiting)} lack rollouts"
        found: dict[Key, Score] = {}
        if self._pool is not None:
            try:
                for rollouts, asked in self._asked:
                    found |= {(r.prompt, r.sample): s for r, s in zip(rollouts, asked.result(), strict=True)}
            finally:
                self._pool.shutdown(cancel_futures=True)
        return found


class ScoredInPasses:
    """A reward model scores answers whenever they fill a pass; each copy scores its own, and shares no experts."""

    def __init__(self, model: RewardModel, answer_of: AnswerOf) -> None:
        self.model, self.answer_of, self.room = model, answer_of, PassRoom(model.engine.spec)
        self._new: list[tuple[Key, Answer]] = []
        self._found: dict[Key, Score] = {}
        self._problem: UserError | None = None

    def add(self, rollout: Rollout) -> None:
        """See Early."""
        answer = self.answer_of(rollout)
        try:
            if self.room.is_full(self.model.places(answer)):
                self._score()
            self._new.append(((rollout.prompt, rollout.sample), answer))
        except UserError as error:  # the copy's ranks go on to the end of the drawing, where all ranks meet
            self._problem = self._problem or error

    def _score(self) -> None:
        new, self._new = self._new, []
        if not new:
            return
        try:
            scores = self.model.own_scores([answer for _, answer in new])
        except UserError as error:
            self._problem = self._problem or error
            return
        self._found |= {key: score for (key, _), score in zip(new, scores or (), strict=False)}

    def finish(self) -> dict[Key, Score]:
        """See Early."""
        self._score()
        if self._problem is not None:
            raise self._problem
        return self._found


class PassRoom:
    """Counts places until they fill a pass of a model.

    Attributes:
        places: of a pass: all of one row; of several, what best fit is sure to find room for.
    """

    def __init__(self, spec: ModelSpec) -> None:
        rows = spec.micro_batch_size * max(1, 2 * (spec.parallel.pp - 1))
        self.places = spec.seq_length if rows == 1 else 0.9 * rows * spec.seq_length
        self._taken = 0

    def is_full(self, places: int) -> bool:
        """Whether so many more have no room; then they are the first of the next pass."""
        full = self._taken + places > self.places
        self._taken = places if full else self._taken + places
        return full
