"""RlRun: reinforcement learning as a loop of three verbs over models that lie side by side. One SPMD program, no scheduler.

rollouts = run.generate()
experience = run.score(rollouts)
run.update(experience)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flagscale_like.generation.rollout import GenerationEngine, Rollout
from flagscale_like.rl.answers import RewardSource
from flagscale_like.training.loop import Learned, Updates, run_steps
from flagscale_like.training.plan import Progress, StepPlan
from flagscale_like.training.run import Run


class RlRun:
    """Iterations of a run: each draws rollouts, scores them and learns from them. All ranks call every method alike.

    Args:
        run: policy, store, parts, guard and report of the run; its steps are the iterations.
        generator: draws the rollouts.
        reward: scores them. It may be replaced between two calls of iterate().
    """

    def __init__(self, run: Run, generator: GenerationEngine, reward: RewardSource) -> None:
        self.run, self.generator, self.reward = run, generator, reward
        self._updates = Updates(run)

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.run.progress

    def iterate(self, count: int | None = None) -> Progress:
        """Make `count` iterations, or all that are left; fewer where a rank is asked to stop. It saves and reports."""
        until = None if count is None else self.progress.step + count
        run_steps(self.run, self._iteration, until=until)
        return self.progress

    def save(self) -> None:
        """Begin a checkpoint of everything that the run needs to go on."""
        self.run.save()

    def _iteration(self, plan: StepPlan) -> Learned:
        return self.update(self.score(self.generate()))

    def generate(self) -> Iterator[Rollout]:
        """Draw the iteration's rollouts; each comes as it ends."""
        raise NotImplementedError

    def score(self, rollouts: Iterator[Rollout]) -> Any:
        """Score rollouts while others are still drawn."""
        raise NotImplementedError

    def update(self, experience: Any) -> Learned:
        """Learn from scored rollouts."""
        raise NotImplementedError
