"""What stands in for a run's tokenizer, prompts, drawing and reward where nothing is computed: a rehearsal.

Prompts and rollouts are as long as the configuration allows, so that rows are full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from flagscale_like.config import RunConfig
from flagscale_like.generation.rollout import GenerationEngine, Prompt, Rollout, Sampling
from flagscale_like.rl.answers import Answer, RewardSource, Score
from flagscale_like.rl.prompts import Row, Words

PROMPTS = 8


class MadeUpWords(Words):
    """A tokenizer without words, which nothing ends."""

    def __init__(self) -> None:
        self.folder, self.tokenizer, self.stop = None, None, ()

    def text_of(self, ids: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
        return ""


def made_up_prompts(config: RunConfig) -> list[Row]:
    """Prompts that fill the room that a row has beside the longest rollout."""
    new = config.required_rl.rollout.max_new_tokens
    room = config.train.seq_length - new
    if config.model.longest_sequence:
        room = min(room, config.model.longest_sequence - new)
    return [Row("", (0,) * max(1, room)) for _ in range(PROMPTS)]


class MadeUpGenerator(GenerationEngine):
    """Draws the longest rollouts, without a model."""

    version, at_once, has_copy = 0, False, False

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Rollout]:
        count = sampling.max_new_tokens
        for prompt in prompts:
            for sample in range(prompt.samples):
                numbers = [-1.0] * count
                yield Rollout(
                    prompt.number, sample, prompt.ids, [0] * count, numbers, list(numbers), "length", self.version
                )

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class MadeUpReward(RewardSource):
    """Likes every second answer, so that each group teaches something."""

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        return [Score(float(number % 2)) for number in range(len(answers))]
