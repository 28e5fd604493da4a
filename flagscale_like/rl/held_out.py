"""Evaluation of a policy on held-out prompts: it answers them, and the run's reward scores the answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from flagscale_like.config import RunConfig
from flagscale_like.engine.asleep import TrainingMemory
from flagscale_like.engine.engine import Engine
from flagscale_like.figures import short
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Rollout, Sampling
from flagscale_like.rl.answers import Answer, Score, means_of_parts
from flagscale_like.rl.drawing import drawn
from flagscale_like.rl.iteration_log import part_name
from flagscale_like.rl.prompts import Row, Words
from flagscale_like.training.evaluation import Measured


class HeldOut:
    """Answers held-out prompts with the policy as it is. All ranks call it alike.

    The draws are seeded by prompt and sample as those of training are, and take no number from its generators: a run trains
    bit for bit the same with and without it. The scores are those of rl.reward, before the guard and all shaping.

    Args:
        engine: the policy.
        scores_of: the run's reward.
        rows: the prompts; the data-parallel ranks share them.
        asleep: what sleeps while answers are drawn; see rl.drawing.
        beat: told of each answer.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        words: Words,
        scores_of: Callable[[Sequence[Answer]], list[Score]],
        rows: Sequence[Row],
        *,
        asleep: Sequence[TrainingMemory] = (),
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        drawing, options = config.required_rl.rollout, config.required_rl.evaluation
        self.ctx, self.words, self.scores_of, self.rows, self.beat = engine.ctx, words, scores_of, rows, beat
        self.samples, self.asleep = options.samples, asleep
        # With the trainer's weights in place, whatever draws the rollouts.
        self.generator = OwnEngine(
            engine, rows=drawing.rows, room=config.train.seq_length, decode=words.tokenizer.decode
        )
        self.sampling = Sampling(
            max_new_tokens=drawing.max_new_tokens,
            temperature=options.temperature,
            stop=words.stop,
            stop_strings=drawing.stop_strings,
            seed=config.train.seed,
        )

    def __call__(self, split: str) -> Measured:
        """The mean reward of the answers, and how long they are.

        Raises:
            DataError: the reward failed on an answer.
        """
        rollouts = self._drawn()
        stop_strings = self.sampling.stop_strings
        answers = [self.words.answer(self.rows[rollout.prompt], rollout, stop_strings) for rollout in rollouts]
        scores = self.scores_of(answers)
        values = [score.value for score in scores]
        found = {
            "eval/reward": statistics.fmean(values),
            "eval/deviation": statistics.pstdev(values),
            "eval/length": statistics.fmean(len(rollout.ids) for rollout in rollouts),
            "eval/ended": statistics.fmean(rollout.finish == "stop" for rollout in rollouts),
            **{f"eval/{part_name(name)}": mean for name, mean in means_of_parts(scores).items()},
        }
        parts = "".join(f" | {name} {short(value)}" for name, value in found.items())
        return Measured(found, f"{len(answers)} answers to held-out prompts{parts}")

    def _drawn(self) -> list[Rollout]:
        """The rollouts of all ranks, on every rank in the same order."""
        own = list(enumerate(self.rows))[self.ctx.dp_rank :: self.ctx.dp]
        prompts = [Prompt(row.ids, number, self.samples) for number, row in own]
        rollouts = []
        self.beat()
        for rollout in drawn(self.generator, prompts, self.sampling, asleep=self.asleep):
            self.beat()
            rollouts.append(rollout)
        every = [rollout for part in self.ctx.gather(rollouts) for rollout in part]
        return sorted(every, key=lambda rollout: (rollout.prompt, rollout.sample))
