"""The guard on exploration as a part of a run: it guards the scores of an iteration, and keeps what is outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from flagscale_like.checkpoint.opened import open_adapted
from flagscale_like.config import RunConfig
from flagscale_like.config.rewards import Mixture, model_in
from flagscale_like.errors import ConfigError
from flagscale_like.generation.rollout import Rollout
from flagscale_like.rl.answers import Answer
from flagscale_like.rl.guard import Candidates, Guard, Place, Why, shares
from flagscale_like.rl.scoring import Scored
from flagscale_like.rl.validation import NAME, Validation
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.parts import Part, Report
from flagscale_like.training.plan import Progress


class Guarding(Part):
    """Guards scores.

    Args:
        candidates: where rollouts outside are kept; None on all ranks but the first.
        progress: where the run stands. What a run kept after the step that it goes on from is dropped.
        blind: why the log-probabilities under the reference are not known when rollouts are guarded; empty where they are.
    """

    def __init__(self, guard: Guard, candidates: Candidates | None, progress: Progress, *, blind: str = "") -> None:
        self.guard, self.candidates, self.progress, self.blind = guard, candidates, progress, blind
        self._why: list[tuple[Why, ...]] = []

    def begin(self, report: Report) -> None:
        """Say what is inside."""
        (low, high), bound = self.guard.bounds, self.guard.kl_bound
        surprise = self.guard.surprise_bound
        limits = f"scores from {low:.3f} to {high:.3f}"
        limits += f", up to {bound:.1f} nats from the reference" if bound is not None else ""
        limits += f", up to {surprise:.2f} nats of surprise a token" if surprise is not None else ""
        report.say(f"the guard ({self.guard.options.action}) is on: {limits}; validated on {self.guard.record}")
        if self.guard.options.kl == "validated" and bound is None:
            report.say(
                "outside.kl validated bounds nothing: no log-ratios of validated answers are known, as in a first round"
            )
        if self.guard.options.surprise < 1 and (self.blind or surprise is None):
            why = self.blind or "the reward model's record has none: `score --keep --reference` adds it"
            report.say(f"the guard does not look at the surprise of rollouts: {why}")
        self.after_rewind()

    def after_rewind(self) -> None:
        """The run stands at an earlier step than it did."""
        if self.candidates is not None:
            self.candidates.go_back(self.progress.step)

    def apply(self, step: int, scored: Sequence[Scored], answer_of: Callable[[Rollout], Answer]) -> list[Scored]:
        """The rollouts with guarded scores. All ranks call it alike."""
        found = self.guard.apply([one.score for one in scored], [_place(one) for one in scored])
        self._why += found.why
        if self.candidates is not None:
            answers = [answer_of(one.rollout) for one in scored]
            self.candidates.add(step, answers, [one.score for one in scored], found.why)
        return [replace(one, score=score) for one, score in zip(scored, found.scores, strict=True)]

    def pop(self) -> dict[str, float]:
        """What is reported of the rollouts since the last call."""
        why, self._why = self._why, []
        return shares(why)


def _place(scored: Scored) -> Place:
    """Where a rollout lies; what is not known where its log-probabilities under the reference are not."""
    if "reference" not in scored.numbers:
        return Place()
    reference = float(scored.numbers["reference"].sum())
    return Place(kl=sum(scored.rollout.raw_logprobs) - reference, surprise=-reference / len(scored.rollout.ids))


def build_guarding(config: RunConfig, ctx: ParallelContext, progress: Progress, notes: list[str]) -> Guarding | None:
    """The guard of a run; None where rl.outside.action is off.

    Args:
        notes: gets what is to be said where there is none.

    Raises:
        CheckpointError: the reward model has no record of what it was validated on, or one of other weights.
    """
    rl = config.required_rl
    options, reward, kl = rl.outside, rl.reward, rl.kl
    if rl.guard == "off":
        return None
    model = model_in(reward)
    if model is None or model.path is None:
        raise ConfigError("rl.outside guards a reward model, and rl.reward names none: give rl.reward.path")
    opened = open_adapted(Path(model.path), adapter=Path(model.adapter) if model.adapter else None)
    if options.action is None and not (Path(opened.source.folder) / NAME).is_file():
        notes.append(
            f"the guard on exploration is off: {opened.source.folder} has no {NAME}: `score --keep` makes one, and "
            "rl.outside.action off leaves this line out"
        )
        return None
    options = options.model_copy(update={"action": rl.guard})
    part = (model.name, model.weight) if isinstance(reward, Mixture) else None
    candidates = Candidates(RunFolder(config.run_dir).outside, options.keep) if ctx.is_main else None
    blind = "rl.kl.coefficient 0 keeps no reference" if not kl.coefficient else ""
    blind = "rl.staleness 1 measures the reference after the guard" if rl.staleness else blind
    guard = Guard(options, Validation.read(opened.source), part=part)
    return Guarding(guard, candidates, progress, blind=blind)
