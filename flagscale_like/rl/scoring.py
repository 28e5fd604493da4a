"""Scoring: what reward, reference, critic and policy say of rollouts. It begins while the last rollouts are still drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flagscale_like.engine.engine import Engine
from flagscale_like.engine.objective import Objective
from flagscale_like.errors import DataError, UserError, required
from flagscale_like.generation.rollout import Rollout
from flagscale_like.objectives.policy import TokenLogProbabilities, TokenValues
from flagscale_like.rl.answers import Answer, RewardSource, Score
from flagscale_like.rl.early import PassRoom, early_form
from flagscale_like.rl.models import Models
from flagscale_like.rl.packs import Deal, packed_batches, places_of, unpack
from flagscale_like.rl.rewards.mixture import WeightedSum


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
    if engine.shared_experts is not None:  # all ranks need the same number of passes
        step = spec.parallel.pp if spec.parallel.vpp > 1 else 1
        most = max(ctx.gather(len(micro_batches)))
        micro_batches += [[[]] * spec.micro_batch_size] * (-(-most // step) * step - len(micro_batches))
    batches = packed_batches(rollouts, {}, micro_batches, spec, ctx.platform.device)
    with engine.evaluation():
        samples = engine.forward(batches, objective, len(micro_batches)).samples
    if not samples:
        return None
    rows = [row for micro_batch in micro_batches for row in micro_batch]
    numbers = torch.from_numpy(ctx.platform.to_numpy(samples[objective.metric].float())).float()
    found = unpack(numbers, rollouts, rows)
    return [found[number] for number in range(len(rollouts))]


class Scorer:
    """Scores the rollouts of one call of the generation engine. All ranks make and call it alike, in Models.evaluation().

    `add` takes each rollout as it ends. Models score them between two tokens of the others, whenever they fill the rows of a
    pass; what the reward does meanwhile is in rl.early. `finish` scores the rest, and asks what needs all ranks at once, or
    the policy's place.

    Args:
        answer_of: the reward's view of a rollout.
        group_of: by the number of a prompt, its group and how many rollouts are drawn of it.
        with_old: whether the policy computes log-probabilities again.
        passes: whether models may make passes before finish(). Those whose copies share experts never do.
    """

    def __init__(
        self,
        models: Models,
        reward: RewardSource,
        answer_of: Callable[[Rollout], Answer],
        group_of: Callable[[int], tuple[int, int]],
        *,
        with_old: bool,
        passes: bool = True,
    ) -> None:
        self.models, self.reward, self.answer_of, self.group_of = models, reward, answer_of, group_of
        ctx, spec = models.policy.ctx, models.policy.spec
        self.ctx, self.with_old = ctx, with_old
        self.passes = passes and models.policy.shared_experts is None
        self.room = PassRoom(spec)
        self.rollouts: list[Rollout] = []
        self.numbers: dict[str, list[Tensor]] = {}
        self._done: int | None = None  # rollouts that the models have scored; None before their first pass
        self.sources = _named_sources(reward)
        forms = {
            name: early_form(source, answer_of, lambda prompt: group_of(prompt)[1], is_first=ctx.speaks, passes=passes)
            for name, source in self.sources.items()
        }
        self.early = {name: form for name, form in forms.items() if form is not None}

    def add(self, rollout: Rollout) -> None:
        """A rollout has ended."""
        if self.room.is_full(places_of(rollout)) and self.passes:
            self._score_new()
        self.rollouts.append(rollout)
        for source in self.early.values():
            source.add(rollout)

    def _score_new(self) -> None:
        """A pass of each model that needs no other's place."""
        new, models = self.rollouts[self._done or 0 :], self.models
        self._done = len(self.rollouts)
        if models.reference and not models.reference.waits:
            self._note_reference(new)
        if models.critic:
            self._note("values", models.critic.engine, TokenValues(), new)
        if self.with_old:
            self._note("old", models.policy, TokenLogProbabilities(), new)

    def _note_reference(self, rollouts: Sequence[Rollout]) -> None:
        with required(self.models.reference, "reference").scoring() as engine:
            self._note("reference", engine, TokenLogProbabilities(), rollouts)

    def _note(self, name: str, engine: Engine, objective: Objective, rollouts: Sequence[Rollout]) -> None:
        found = token_numbers(engine, objective, rollouts)
        if found is None and self.ctx.speaks:  # a rehearsed rank, in the place of one that is not there
            found = [torch.zeros(len(rollout.ids)) for rollout in rollouts]
        if found is not None:
            self.numbers.setdefault(name, []).extend(found)

    def finish(self) -> list[Scored]:
        """The rollouts of all data-parallel ranks, on every rank in the same order: by group, prompt and sample.

        Raises:
            DataError: on every rank, where the reward failed on one.
        """
        if self._done is None or self._done < len(self.rollouts):
            self._score_new()
        if self.models.reference and self.models.reference.waits:
            self._note_reference(self.rollouts)
        problem, own = None, []
        try:
            own = self._own()
        except UserError as error:
            problem = str(error)
        if problems := [text for text in self.ctx.gather(problem) if text]:
            raise DataError(problems[0])
        every = sorted(
            (one for part in self.ctx.gather_models(own) for one in part),
            key=lambda one: (one[0].group, one[0].rollout.prompt, one[0].rollout.sample),
        )
        scored = [one for one, _ in every]
        if scored:
            self._give_scores(scored, [scores for _, scores in every])
        return scored

    def _own(self) -> list[tuple[Scored, dict[str, Score]]]:
        """This model's rollouts on its first rank, with what was found of them, in the order in which they ended."""
        early = {name: source.finish() for name, source in self.early.items()}
        if not self.ctx.speaks:
            return []
        found = []
        for number, rollout in enumerate(self.rollouts):
            numbers = {name: values[number] for name, values in self.numbers.items()}
            scored = Scored(rollout, self.group_of(rollout.prompt)[0], Score(0.0), numbers)
            key = rollout.prompt, rollout.sample
            found.append((scored, {name: scores[key] for name, scores in early.items()}))
        return found

    def _give_scores(self, scored: Sequence[Scored], early: Sequence[Mapping[str, Score]]) -> None:
        """Ask the sources that have no early form, and give each rollout its score. All ranks call it alike."""
        late = [name for name in self.sources if name not in self.early]
        answers = [self.answer_of(one.rollout) for one in scored] if late else []
        found = {
            name: source.scores(answers) if name in late else [scores[name] for scores in early]
            for name, source in self.sources.items()
        }
        scores = self.reward.mixed(found) if isinstance(self.reward, WeightedSum) else found[""]
        for one, score in zip(scored, scores, strict=True):
            one.score = score


def _named_sources(reward: RewardSource) -> dict[str, RewardSource]:
    """The sources of a mixture by their names; another reward by the empty one."""
    if isinstance(reward, WeightedSum):
        return {name: source for name, (_, source) in reward.sources.items()}
    return {"": reward}


def as_matrix(values: Sequence[Tensor | Sequence[float]], width: int) -> Tensor:
    """Numbers of each drawn token as fp32 [n, width], 0 behind a rollout's last."""
    found = torch.zeros(len(values), width)
    for row, own in enumerate(values):
        found[row, : len(own)] = torch.as_tensor(own, dtype=torch.float32)
    return found
