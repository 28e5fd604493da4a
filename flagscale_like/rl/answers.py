"""What a reward sees of a rollout, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Answer:
    """A rollout as a reward sees it.

    Attributes:
        prompt: the prompt's text, as the policy read it: with the chat template's marks, where there is one.
        text: what was drawn, without the token or string that ended it.
        fields: the other columns of the prompt's row in the data set.
        prompt_ids: the prompt's tokens.
        ids: the drawn tokens, with the stop token where one ended the text.
        finish: `stop` or `length`; see generation.rollout.Rollout.
        messages: the prompt as a chat, where the data set has one; empty where it is a text.
    """

    prompt: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    prompt_ids: Sequence[int] = ()
    ids: Sequence[int] = ()
    finish: str = ""
    messages: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Score:
    """What an answer is worth.

    Attributes:
        value: the reward.
        heads: the outputs of a reward model's heads, whose mean is the value; empty where there are none.
        rejected: the answer is not trained on; it is replaced by another rollout.
        reason: why it was rejected or changed; empty where it was not.
        parts: of a mixture, what each of its sources gave, by name, before the weights; for the log.
    """

    value: float
    heads: tuple[float, ...] = ()
    rejected: bool = False
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


class RewardSource(Protocol):
    """What scores answers: a reward model, a function, a command, a judge, or a mixture of them.

    All ranks call `scores` alike, with the same answers (those of all data-parallel ranks), and all get the same scores. A
    reward model spreads them over its own ranks; what runs outside of the ranks is asked once, by rank 0.
    A call holds all answers of a prompt: a judge compares them with each other.
    """

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        """One score for each answer, in their order.

        Raises:
            DataError: a score is not finite, or the source fails on a sample; the message shows the sample.
        """
        ...


def means_of_parts(scores: Sequence[Score]) -> dict[str, float]:
    """The mean reward of each source of a mixture, by the source's name; empty where the reward is no mixture."""
    names = dict.fromkeys(name for score in scores for name in score.parts)
    return {name: sum(score.parts[name] for score in scores) / len(scores) for name in names}
