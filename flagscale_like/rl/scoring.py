"""Scoring: what reward, reference, critic and policy say of rollouts. It begins while the last rollouts are still drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flagscale_like.engine.engine import Engine
from flagscale_like.engine.objective import Objective
from flagscale_like.errors import DataError, UserError
from flagscale_like.generation.rollout import Rollout
from flagscale_like.objectives.policy import TokenLogProbabilities, TokenValues
from flagscale_like.rl.answers import Answer, RewardSource, Score
from flagscale_like.rl.models import Models
from flagscale_like.rl.packs import Deal, packed_batches, places_of, unpack
from flagscale_like.rl.rewards.checked import AskedByMain


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

    `add` takes each as it ends. Once they fill the rows of a pass, the reference scores them, between two tokens of the
    others; and a reward that runs outside of the ranks is asked in a thread, once all rollouts of a prompt are there.
    `finish` scores the rest, and asks the models that need all ranks at once, or the policy's place.

    Args:
        answer_of: the reward's view of a rollout.
        group_of: by the number of a prompt, its group and how many rollouts are drawn of it.
        with_old: whether the policy computes log-probabilities again.
    """

    def __init__(
        self,
        models: Models,
        reward: RewardSource,
        answer_of: Callable[[Rollout], Answer],
        group_of: Callable[[int], tuple[int, int]],
        *,
        with_old: bool,
    ) -> None:
        self.models, self.reward, self.answer_of, self.group_of = models, reward, answer_of, group_of
        ctx, spec = models.policy.ctx, models.policy.spec
        self.ctx, self.with_old = ctx, with_old
        self.is_first = ctx.tp_rank == 0 and ctx.cp_rank == 0 and ctx.is_last_stage  # of the ranks that share a model
        rows = spec.micro_batch_size * max(1, 2 * (spec.parallel.pp - 1))
        # Places that a pass fills: all of one row; of several, what best fit is sure to find room for.
        self.pass_places = spec.seq_length if rows == 1 else 0.9 * rows * spec.seq_length
        self._places = 0  # of the rollouts that the reference has not scored
        self.overlaps = not spec.arch.experts  # whose ranks exchange tokens, and make all passes together
        self.rollouts: list[Rollout] = []
        self.numbers: dict[str, list[Tensor]] = {}
        self._done = 0  # rollouts that the reference has scored
        self._outside = reward.source if isinstance(reward, AskedByMain) else None
        self._waiting: dict[int, list[Rollout]] = {}  # by prompt, where not all of its rollouts are there
        self._asked: list[tuple[list[Rollout], Future[list[Score]]]] = []
        self._pool = ThreadPoolExecutor(1) if self._outside is not None and self.is_first else None

    def add(self, rollout: Rollout) -> None:
        """A rollout has ended."""
        if self.overlaps and self._places + places_of(rollout) > self.pass_places:
            self._score_new()
        self.rollouts.append(rollout)
        self._places += places_of(rollout)
        self._ask(rollout)

    def _ask(self, rollout: Rollout) -> None:
        """Ask the reward about a prompt whose rollouts are all there, on one of the ranks that share them."""
        if self._pool is None:
            return
        own = self._waiting.setdefault(rollout.prompt, [])
        own.append(rollout)
        if len(own) == self.group_of(rollout.prompt)[1]:
            answers = [self.answer_of(one) for one in self._waiting.pop(rollout.prompt)]
            self._asked.append((own, self._pool.submit(self._outside.scores, answers)))

    def _score_new(self) -> None:
        new, reference = self.rollouts[self._done :], self.models.reference
        self._done, self._places = len(self.rollouts), 0
        if reference and not reference.waits:
            with reference.scoring() as engine:
                self._note("reference", engine, TokenLogProbabilities(), new)

    def _note(self, name: str, engine: Engine, objective: Objective, rollouts: Sequence[Rollout]) -> None:
        found = token_numbers(engine, objective, rollouts)
        if found is not None:
            self.numbers.setdefault(name, []).extend(found)

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
        problem, own = None, []
        try:
            own = self._own() if self.is_first else []
        except UserError as error:
            problem = str(error)
        gathered = self.ctx.gather((problem, own))
        if problems := [text for text, _ in gathered if text]:
            raise DataError(problems[0])
        every = sorted(
            (one for _, part in gathered for one in part),
            key=lambda one: (one.group, one.rollout.prompt, one.rollout.sample),
        )
        if self._outside is None and every:
            scores = self.reward.scores([self.answer_of(one.rollout) for one in every])
            for one, score in zip(every, scores, strict=True):
                one.score = score
        return every

    def _own(self) -> list[Scored]:
        """This model's rollouts with what was found of them, in the order in which they ended."""
        scores: dict[tuple[int, int], Score] = {}
        for rollouts, asked in self._asked:
            scores |= {(r.prompt, r.sample): score for r, score in zip(rollouts, asked.result(), strict=True)}
        if self._pool is not None:
            self._pool.shutdown()
            assert len(scores) == len(self.rollouts), f"{len(scores)} scores of {len(self.rollouts)} rollouts"
        return [
            Scored(
                rollout,
                self.group_of(rollout.prompt)[0],
                scores.get((rollout.prompt, rollout.sample), Score(0.0)),
                {name: values[number] for name, values in self.numbers.items()},
            )
            for number, rollout in enumerate(self.rollouts)
        ]


def as_matrix(values: Sequence[Tensor | Sequence[float]], width: int) -> Tensor:
    """Numbers of each drawn token as fp32 [n, width], 0 behind a rollout's last."""
    found = torch.zeros(len(values), width)
    for row, own in enumerate(values):
        found[row, : len(own)] = torch.as_tensor(own, dtype=torch.float32)
    return found
