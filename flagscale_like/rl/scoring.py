"""Scoring: what reward, reference, critic and policy say of rollouts. It begins while the last rollouts are still drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flagscale_like.engine.engine import Engine
from flagscale_like.engine.objective import Objective
from flagscale_like.errors import DataError
from flagscale_like.generation.rollout import Rollout
from flagscale_like.objectives.policy import TokenLogProbabilities, TokenValues
from flagscale_like.rl.answers import Answer, RewardSource, Score
from flagscale_like.rl.models import Models
from flagscale_like.rl.packs import Deal, packed_batches, places_of, unpack


@dataclass
class Scored:
    """A rollout and what was found of it.

    Attributes:
        group: number of the prompt that it answers, the same for all rollouts that are compared.
        numbers: by name, of each drawn token, fp32 [t]: `reference` and `old` log-probabilities, `values`.
    """

    rollout: Rollout
    group: int
    score: Score
    numbers: dict[str, Tensor] = field(default_factory=dict)


def token_numbers(engine: Engine, objective: Objective, rollouts: Sequence[Rollout]) -> list[Tensor] | None:
    """What an objective finds of each drawn token of this data-parallel rank's rollouts. All its ranks call it alike.

    Args:
        objective: TokenLogProbabilities or TokenValues.

    Returns:
        Of each rollout, fp32 [t] on the host, where the model's last stage is; None on the other ranks.
    """
    spec, ctx = engine.spec, engine.ctx
    micro_batches = Deal.of([places_of(rollout) for rollout in rollouts], spec, 1).micro_batches(0)
    if spec.arch.experts:  # the ranks exchange tokens: all need the same number of passes
        step = spec.parallel.pp if spec.parallel.vpp > 1 else 1
        most = max(ctx.gather(len(micro_batches)))
        micro_batches += [[[]] * spec.micro_batch_size] * (-(-most // step) * step - len(micro_batches))
    batches = packed_batches(rollouts, {}, micro_batches, spec, ctx.platform.device)
    with engine.evaluation():
        samples = engine.forward(batches, objective, len(micro_batches)).samples
    if not samples:
        return None
    rows = [row for micro_batch in micro_batches for row in micro_batch]
    found = unpack(samples[objective.metric].float().cpu(), rollouts, rows)
    return [found[number] for number in range(len(rollouts))]


class Scorer:
    """Scores the rollouts of one call of the generation engine.

    `add` takes each as it ends. Once they fill the rows of a pass, reference and reward score them, between two tokens of the
    others; a reward that needs no model is asked in a thread. `finish` scores the rest, and asks the models that are trained:
    their ranks gather parameters over data parallelism, and must do it alike.

    Args:
        answer_of: the reward's view of a rollout.
        group_of: by the number of a prompt, its group.
        with_old: whether the policy computes log-probabilities again.
    """

    def __init__(
        self,
        models: Models,
        reward: RewardSource,
        answer_of: Callable[[Rollout], Answer],
        group_of: Callable[[int], int],
        *,
        with_old: bool,
    ) -> None:
        self.models, self.reward, self.answer_of, self.group_of = models, reward, answer_of, group_of
        policy = models.policy
        self.ctx, self.with_old = policy.ctx, with_old
        # One rank of those that share a model asks the reward, unless that is a model on these ranks itself.
        self.is_collective = getattr(reward, "collective", False)
        self.is_first = policy.ctx.tp_rank == 0 and policy.ctx.cp_rank == 0 and policy.ctx.is_last_stage
        spec = policy.spec
        self.pass_places = 0.9 * spec.seq_length * spec.micro_batch_size * max(1, 2 * (spec.parallel.pp - 1))
        self.overlaps = not spec.arch.experts
        self.rollouts: list[Rollout] = []
        self.numbers: dict[str, list[Tensor]] = {"reference": [], "values": []}
        self._done = 0  # rollouts that reference and reward have got
        self._asked: list[Future[list[Score]]] = []
        self._pool = ThreadPoolExecutor(1)

    def add(self, rollout: Rollout) -> None:
        """A rollout has ended."""
        self.rollouts.append(rollout)
        if self.overlaps and sum(places_of(one) for one in self.rollouts[self._done :]) >= self.pass_places:
            self._score_new()

    def _score_new(self) -> None:
        new, models = self.rollouts[self._done :], self.models
        self._done = len(self.rollouts)
        self._ask(new)
        if models.reference and not models.reference.waits:
            with models.reference.scoring() as engine:
                self._note("reference", engine, TokenLogProbabilities(), new)

    def _note(self, name: str, engine: Engine, objective: Objective, rollouts: Sequence[Rollout]) -> None:
        found = token_numbers(engine, objective, rollouts)
        if found is not None:
            self.numbers.setdefault(name, []).extend(found)

    def _ask(self, rollouts: Sequence[Rollout]) -> None:
        """Ask the reward: in its own time where it needs no model, now where it is one."""
        if not rollouts or not (self.is_collective or self.is_first):
            return
        answers = [self.answer_of(rollout) for rollout in rollouts]
        if self.is_collective:
            done: Future[list[Score]] = Future()
            done.set_result(self.reward.scores(answers))
            self._asked.append(done)
        else:
            self._asked.append(self._pool.submit(self.reward.scores, answers))

    def finish(self) -> list[Scored]:
        """The rollouts of all data-parallel ranks, on every rank in the same order: by group, prompt and sample.

        Raises:
            DataError: on every rank, where the reward failed on one.
        """
        if self._done < len(self.rollouts) or not self._done:
            self._score_new()
        models = self.models
        if models.reference and models.reference.waits:
            with models.reference.scoring() as engine:
                self._note("reference", engine, TokenLogProbabilities(), self.rollouts)
        if models.critic:
            self._note("values", models.critic.engine, TokenValues(), self.rollouts)
        if self.with_old:
            self._note("old", models.policy, TokenLogProbabilities(), self.rollouts)
        problem, scores = None, []
        try:
            scores = [score for asked in self._asked for score in asked.result()]
        except DataError as error:
            problem = str(error)
        self._pool.shutdown()
        gathered = self.ctx.gather((problem, self._own(scores) if self.is_first and not problem else []))
        if problems := [text for text, _ in gathered if text]:
            raise DataError(problems[0])
        every = [one for _, part in gathered for one in part]
        return sorted(every, key=lambda one: (one.group, one.rollout.prompt, one.rollout.sample))

    def _own(self, scores: Sequence[Score]) -> list[Scored]:
        assert len(scores) == len(self.rollouts), (
            f"the reward gave {len(scores)} scores of {len(self.rollouts)} answers"
        )
        named = {name: values for name, values in self.numbers.items() if values}
        return [
            Scored(
                rollout,
                self.group_of(rollout.prompt),
                score,
                {name: values[number] for name, values in named.items()},
            )
            for number, (rollout, score) in enumerate(zip(self.rollouts, scores, strict=True))
        ]


def as_matrix(values: Sequence[Tensor | Sequence[float]], width: int) -> Tensor:
    """Numbers of each drawn token as fp32 [n, width], 0 behind a rollout's last."""
    found = torch.zeros(len(values), width)
    for row, own in enumerate(values):
        found[row, : len(own)] = torch.as_tensor(own, dtype=torch.float32)
    return found
