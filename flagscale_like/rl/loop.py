"""RlRun: reinforcement learning as a loop of three verbs over models that lie side by side. One SPMD program, no scheduler.

scored = run.score(run.generate(asks))
experience = run.appraise(scored)
run.update(experience)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flagscale_like.config import RunConfig
from flagscale_like.data.batch import Batch
from flagscale_like.engine.asleep import TrainingMemory
from flagscale_like.engine.engine import Engine
from flagscale_like.generation.rollout import GenerationEngine, Prompt, Rollout, Sampling
from flagscale_like.objectives.policy import PolicyLoss, PolicyOptions
from flagscale_like.objectives.value import ValueLoss
from flagscale_like.rl.algorithms import next_coefficient
from flagscale_like.rl.answers import Answer, RewardSource, Score, means_of_parts
from flagscale_like.rl.apart import DrawnApart
from flagscale_like.rl.drawing import drawn
from flagscale_like.rl.experience import Experience, appraise
from flagscale_like.rl.generators import load_weights
from flagscale_like.rl.guarding import Guarding
from flagscale_like.rl.iteration_log import part_name
from flagscale_like.rl.models import Models
from flagscale_like.rl.packs import Deal, packed_batches, places_of
from flagscale_like.rl.phases import Phases
from flagscale_like.rl.prompts import Prompts, Row, Words
from flagscale_like.rl.scoring import Scored, Scorer
from flagscale_like.rl.state import RlState
from flagscale_like.rl.updates import CriticUpdates, together
from flagscale_like.training.loop import Learned, Updates, run_steps
from flagscale_like.training.plan import Progress, StepPlan
from flagscale_like.training.run import Run


@dataclass(frozen=True)
class Ask:
    """A prompt that rollouts are asked for.

    Attributes:
        number: of this ask; no other of the run has it, and the draws are seeded by it.
        group: number of the ask that the rollouts belong to; its own, or that of the one that it makes up for.
        samples: rollouts.
    """

    number: int
    group: int
    row: Row
    samples: int


class RlRun:
    """Iterations of a run: each draws rollouts, scores them and learns from them. All ranks call every method alike.

    Args:
        run: policy, store, parts, guard and report of the run; its steps are the iterations.
        models: policy, critic and reference.
        generator: draws the rollouts.
        reward: scores them. It may be replaced between two calls of iterate().
        prompts: what is asked for.
        words: the policy's tokenizer.
        state: what the run keeps beside its models; a part of the run.
        numbers: takes what an iteration reports, by name.
        guarding: the guard on exploration; None where there is none.

    Attributes:
        asleep: what sleeps while these ranks draw.
    """

    def __init__(  # the nouns of the loop
        self,
        run: Run,
        models: Models,
        generator: GenerationEngine,
        reward: RewardSource,
        *,
        prompts: Prompts,
        words: Words,
        state: RlState,
        numbers: Callable[[dict[str, float]], None],
        guarding: Guarding | None = None,
    ) -> None:
        self.run, self.models, self.generator, self.reward = run, models, generator, reward
        self.prompts, self.words, self.state, self._numbers = prompts, words, state, numbers
        self.guarding, self.options, self.phases = guarding, run.config.required_rl, Phases()
        drawing = self.options.rollout
        self.sampling = Sampling(
            max_new_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            top_k=drawing.top_k,
            stop=words.stop,
            stop_strings=drawing.stop_strings,
            seed=run.config.train.seed,
        )
        # With one update in an iteration, the pass that learns gives the old log-probabilities itself.
        updates = self.options.epochs * self.options.minibatches
        self.with_old = self.options.old == "trainer" and (updates > 1 or self.options.staleness > 0)
        self._updates = Updates(run)
        self._critic = CriticUpdates(models.critic.engine, run.config) if models.critic else None
        self._asks: dict[int, Ask] = {}
        self.asleep = [TrainingMemory(engine) for engine in models.trained] if drawing.training_sleeps else []

    @property
    def config(self) -> RunConfig:
        return self.run.config

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

    def close(self) -> None:
        """Let ranks that only draw end; the run is over."""
        self.state.collect()
        if isinstance(self.generator, DrawnApart):
            self.generator.close()

    def _iteration(self, plan: StepPlan) -> Learned:
        if not self.options.staleness:
            return self.update(self.appraise(self.draw()), plan)
        self.state.collect()
        scored = self.draw() if self.state.waiting is None else self.state.waiting
        self._draw_ahead()
        return self.update(self.appraise(self.measure(scored)), plan)

    def _draw_ahead(self) -> None:
        """Draw what is learned from when the weights have changed once: now, or on other ranks while these learn."""
        if not isinstance(self.generator, DrawnApart):
            self.state.waiting = self.draw()
            return
        asks = self._new_asks()
        under_way = self.generate(asks)
        self.state.waiting, self.state.under_way = None, lambda: self.draw(asks, under_way)

    # Rollouts

    def _new_asks(self) -> list[Ask]:
        """The next prompts, as many as an iteration needs."""
        samples = self.options.rollout.samples
        wanted = self.config.train.global_batch_size // samples
        self._asks = {}
        return [Ask(number, number, row, samples) for number, row in self.prompts.take(wanted)]

    def draw(self, asks: list[Ask] | None = None, under_way: Iterator[Rollout] | None = None) -> list[Scored]:
        """Draw and score the rollouts of an iteration. What is left out is made up for, as often as rl.max_refills allows.

        Args:
            asks, under_way: what is drawn already; without them, the next prompts are asked for.
        """
        asks = self._new_asks() if asks is None else asks
        wanted, kept = len(asks), {}  # by group
        left_out, scores = {"rollout/rejected": 0, "rollout/equal-groups": 0}, []
        for turn in range(1 + self._refills):
            rollouts = under_way if under_way is not None and not turn else self.generate(asks)
            for one in self.score(rollouts):
                scores.append(one.score)
                if one.score.rejected:
                    left_out["rollout/rejected"] += 1
                else:
                    kept.setdefault(one.group, []).append(one)
            if self.options.dynamic_sampling:
                equal = [group for group, members in kept.items() if len(members) > 1 and _all_equal(members)]
                left_out["rollout/equal-groups"] += len(equal)
                for group in equal:
                    del kept[group]
            if turn == self._refills or not (asks := self._refill(asks, kept, wanted)):
                break
        self._numbers({name: float(count) for name, count in left_out.items()})
        self._numbers({part_name(name): mean for name, mean in means_of_parts(scores).items()})
        if self.guarding is not None:
            self._numbers(self.guarding.pop())
        return [one for group in sorted(kept) for one in kept[group]]

    @property
    def _refills(self) -> int:
        """How often an iteration draws again."""
        options = self.options
        again = [options.max_refills] if options.dynamic_sampling else []
        again += [options.outside.refill] if options.outside.action == "reject" else []
        return max(again, default=0)

    def _refill(self, asks: Sequence[Ask], kept: dict[int, list[Scored]], wanted: int) -> list[Ask]:
        """What is asked for next: other rollouts of prompts that lack some, and new prompts for groups that were left out."""
        samples, again = self.options.rollout.samples, []
        for ask in asks:
            lacking = samples - len(kept.get(ask.group, ()))
            dropped = self.options.dynamic_sampling and ask.group not in kept
            if lacking and not dropped:
                ((number, _),) = self.prompts.take(1)  # its number alone: the prompt is asked again
                again.append(Ask(number, ask.group, ask.row, lacking))
        groups = set(kept) | {ask.group for ask in again}
        fresh = self.prompts.take(wanted - len(groups)) if self.options.dynamic_sampling else []
        return again + [Ask(number, number, row, samples) for number, row in fresh]

    def generate(self, asks: Sequence[Ask]) -> Iterator[Rollout]:
        """Draw rollouts of this data-parallel rank's share of the prompts; each comes as it ends."""
        self._asks |= {ask.number: ask for ask in asks}
        version = self.progress.step
        with self.phases.phase("generate"):
            self.run.watchdog.beat(version, "drawing rollouts")
            own = asks[self.run.ctx.dp_rank :: self.run.ctx.dp]
            rollouts = drawn(
                self.generator,
                [Prompt(ask.row.ids, ask.number, ask.samples) for ask in own],
                self.sampling,
                load=lambda: load_weights(self.generator, self.models.policy, version),
                asleep=() if isinstance(self.generator, DrawnApart) else self.asleep,
            )
        return self._taken(rollouts, version)

    def _taken(self, rollouts: Iterator[Rollout], version: int) -> Iterator[Rollout]:
        self.run.watchdog.beat(self.progress.step, "drawing rollouts", slow=self.generator.at_once)
        while True:
            with self.phases.phase("generate"):
                rollout = next(rollouts, None)
            if rollout is None:
                return
            self.run.watchdog.beat(self.progress.step, "drawing rollouts")
            assert rollout.version == version, f"drawn by weights {rollout.version}, not {version}"
            self.phases.tokens["generate"] += len(rollout.ids)
            yield rollout

    def score(self, rollouts: Iterator[Rollout]) -> list[Scored]:
        """Score rollouts while others are still drawn; all ranks get those of all.

        Raises:
            DataError: on every rank, where the reward failed.
        """
        stale = self.options.staleness > 0
        models = Models(self.models.policy) if stale else self.models
        scorer = Scorer(
            models,
            self.reward,
            self._answer,
            lambda prompt: (self._asks[prompt].group, self._asks[prompt].samples),
            with_old=self.with_old and not stale,
            passes=not self.generator.has_copy,
        )
        with models.evaluation():
            for rollout in rollouts:
                with self.phases.phase("score"):
                    scorer.add(rollout)
                self.phases.tokens["score"] += places_of(rollout)
            with self.phases.phase("score"):
                self.run.watchdog.beat(self.progress.step, "scoring rollouts")
                found = scorer.finish()
        return found if self.guarding is None else self.guarding.apply(self.progress.step + 1, found, self._answer)

    def measure(self, scored: Sequence[Scored]) -> list[Scored]:
        """Rollouts that waited, with what reference, critic and policy say of them now."""
        own = scored[self.run.ctx.dp_rank :: self.run.ctx.dp]
        known = {(one.rollout.prompt, one.rollout.sample): one for one in scored}
        groups = {one.rollout.prompt: (one.group, 0) for one in scored}
        scorer = Scorer(self.models, _NoReward(), _no_answer, groups.__getitem__, with_old=self.with_old)
        with self.phases.phase("score"), self.models.evaluation():
            for one in own:
                scorer.add(one.rollout)
                self.phases.tokens["score"] += places_of(one.rollout)
            found = scorer.finish()
        for one in found:
            one.score = known[one.rollout.prompt, one.rollout.sample].score
        return found

    def _answer(self, rollout: Rollout) -> Answer:
        return self.words.answer(self._asks[rollout.prompt].row, rollout, self.sampling.stop_strings)

    def appraise(self, scored: Sequence[Scored]) -> Experience:
        """The advantages of scored rollouts."""
        experience = appraise(scored, self.options, self.state.coefficient)
        self._numbers(experience.numbers)
        return experience

    # Learning

    def update(self, experience: Experience, plan: StepPlan) -> Learned:
        """Learn from an iteration's rollouts: `epochs` times `minibatches` optimizer steps of policy and critic."""
        options, in_loss = self.options, self.options.kl.into == "loss" and self.models.reference is not None
        objective = PolicyLoss(
            PolicyOptions(
                clip=options.clip,
                cap=options.importance_cap if options.old == "trainer" else None,
                coefficient=self.state.coefficient if in_loss else None,
                estimator=options.kl.estimator,
            )
        )
        value_loss = ValueLoss(options.clip.value)
        learned: list[Learned] = []
        with self.phases.phase("update"):
            for members in self._parts(experience, plan.step):
                self.run.watchdog.beat(self.progress.step, "learning")
                learned.append(self._learn(experience, members, objective))
                if self._critic is not None and not learned[-1].stops:
                    self._critic(
                        *self._batches(experience, members, experience.critic, self._critic.engine), value_loss
                    )
                if learned[-1].stops:
                    break
            if not learned:
                learned.append(self._updates.nothing(objective))
                why = "all of their scores are equal" if experience.rollouts else "none is left"
                self.run.reporter.say(
                    f"step {plan.step} | nothing to learn from the rollouts: {why}; no update was made"
                )
        if self._critic is not None:
            self._numbers(self._critic.pop())
        self._steer(experience)
        whole = together(learned)
        self._numbers(whole.numbers | self.phases.pop())
        return whole.learned

    def _parts(self, experience: Experience, step: int) -> Iterator[np.ndarray]:
        """The numbers of the rollouts of each optimizer step. Nothing is learned where nothing teaches."""
        if not experience.rollouts or not experience.teaches:
            return
        for epoch in range(self.options.epochs):
            key = np.array([self.config.train.seed, step, epoch], dtype=np.uint32)
            order = np.random.RandomState(key).permutation(len(experience.rollouts))
            parts = [part for part in np.array_split(order, self.options.minibatches) if len(part)]
            yield from map(np.sort, parts)

    def _learn(self, experience: Experience, members: np.ndarray, objective: PolicyLoss) -> Learned:
        batches, count = self._batches(experience, members, experience.policy, self.models.policy, weights="weights")
        self.phases.tokens["update"] += sum(places_of(experience.rollouts[number]) for number in members)
        return self._updates(batches, objective, count)

    def _batches(
        self,
        experience: Experience,
        members: np.ndarray,
        fields: Mapping[str, Tensor],
        engine: Engine,
        *,
        weights: str | None = None,
    ) -> tuple[Iterator[Batch], int]:
        """This rank's micro-batches of some rollouts, and how many there are: the same number on every rank."""
        rollouts = [experience.rollouts[number] for number in members]
        deal = Deal.of([places_of(rollout) for rollout in rollouts], engine.spec, engine.ctx.dp)
        own = {name: [rows[number] for number in members] for name, rows in experience.rows(fields).items()}
        micro_batches = deal.micro_batches(engine.ctx.dp_rank)
        device = engine.ctx.platform.device
        return packed_batches(rollouts, own, micro_batches, engine.spec, device, weights=weights), len(micro_batches)

    def _steer(self, experience: Experience) -> None:
        """Move the coefficient towards its target."""
        kl, found = self.options.kl, experience.divergence
        if kl.target is not None and np.isfinite(found):
            rollouts = len(experience.rollouts)
            self.state.coefficient = next_coefficient(self.state.coefficient, found, kl.target, rollouts, kl.horizon)


def _no_answer(rollout: Rollout) -> Any:
    """_NoReward reads no answers."""
    return None


class _NoReward(RewardSource):
    """Scores what is scored already."""

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        return [Score(0.0)] * len(answers)


def _all_equal(members: Sequence[Scored]) -> bool:
    return len({one.score.value for one in members}) == 1
