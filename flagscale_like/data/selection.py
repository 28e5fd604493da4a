"""Dynamic data selection: weights of the sources that follow the model, and the draw of samples by them.

Everything is a function of the losses or scores that the ranks have reduced, in float64, and of nothing random: all ranks
hold the same mixture, and one that is restored from a checkpoint draws what the first would have drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flagscale_like.config import Selection, Train
from flagscale_like.data.draws import DrawState, draw
from flagscale_like.errors import DataError

KEPT = ("log_weights", "credits", "drawn", "losses", "scores", "errors")
# A log-weight falls no further below the largest: a source that was bad for long comes back in reasonable time.
MAX_LOG_WEIGHT_GAP = 5.0


class Mixture:
    """The sources' weights, how they change, and which sample is drawn next.

    Weights follow the exponentiated gradient (Hedge, and EXP3 where a source is seen only when it is drawn: Auer et al.
    2002): after each interval every source gets a score between -1 and 1, its log-weight grows by rate * score, and

        weight = (1 - floor) * softmax(log prior + log-weight) + floor / sources.

    Scores of the rules `progress` and `loss` (Albalak et al. 2023) come from the losses of the training itself:

        progress_i = (average of past losses_i - loss_i) / weight_i        loss_i = loss_i

    The division is EXP3's: what is seldom drawn has little occasion to get better. Scores of the rule `target` are given to
    `change`. All are averaged over time and divided by the largest; of progress, no more counts than what exceeds the
    standard error of an interval's loss: once no source makes any, chance would decide.

    Args:
        prior: weights to begin with; they need not add up to 1.
    """

    def __init__(self, options: Selection, prior: Sequence[float]) -> None:
        self.options = options
        self.prior = [weight / math.fsum(prior) for weight in prior]
        count = len(self.prior)
        self.log_weights = [0.0] * count
        self.credits = [0.0] * count
        self.drawn = [0] * count
        self.losses: list[float | None] = [None] * count  # averages of past intervals
        self.scores: list[float | None] = [None] * count
        self.errors: list[float | None] = [None] * count  # of the scores
        self._totals, self._steps = _no_totals(count), 0
        self.plan: list[tuple[int, int]] = []

    @property
    def weights(self) -> list[float]:
        """They add up to 1."""
        raw = [p * math.exp(g) for p, g in zip(self.prior, self.log_weights, strict=True)]
        total, floor = math.fsum(raw), self.options.floor
        return [(1 - floor) * r / total + floor / len(raw) for r in raw]

    def draw(self, samples: int) -> None:
        """Plan a step: `plan` becomes (source, index in the source) of its samples, in the order of the global batch.

        Each sample goes to the source that is furthest behind its weight, so that shares are kept within one sample.
        """
        self.plan = list(itertools.islice(draw(self.weights, self.credits, self.drawn), samples))

    def draw_state(self, consumed: int, train: Train) -> DrawState:
        """What the samples from position `consumed` on are drawn by, until the weights are due to change."""
        until = consumed
        for _ in range(self.steps_left):
            until += train.batch_size_at(until)
        return DrawState(consumed, self.weights, list(self.credits), list(self.drawn), until)

    @property
    def steps_left(self) -> int:
        """Steps until the weights change."""
        return self.options.interval - self._steps

    def note(self, totals: Sequence[Sequence[float]]) -> bool:
        """Take a step's losses; says whether the weights are due to change.

        Args:
            totals: [3, sources], over all ranks: the sum of the samples' losses, of their squares, and the number of samples.
        """
        for source, values in enumerate(zip(*totals, strict=True)):
            if all(map(math.isfinite, values)):
                for row, value in zip(self._totals, values, strict=True):
                    row[source] += value
        self._steps += 1
        return self._steps >= self.options.interval

    def change(self, scores: Sequence[float | None] | None = None) -> dict[int, float]:
        """Change the weights after an interval; returns each source's mean loss in it.

        Args:
            scores: of the rule `target`; None for a source of which none could be taken.
        """
        options, weights, keep = self.options, self.weights, self.options.memory
        losses: dict[int, float] = {}
        for source, (total, square, count) in enumerate(zip(*self._totals, strict=True)):
            past, loss, error = self.losses[source], None, None
            score = scores[source] if scores is not None else None
            if count:
                loss = losses[source] = total / count
                if options.rule == "loss":
                    score = loss
                elif options.rule == "progress" and past is not None and count >= 2:  # one has no standard error
                    score = (past - loss) / weights[source]
                    error = math.sqrt(max(0.0, square - total * loss) / (count - 1) / count) / weights[source]
            self.scores[source] = _average(self.scores[source], score, keep)
            self.errors[source] = _average(self.errors[source], error, keep)
            self.losses[source] = _average(past, loss, keep)
        largest = max((abs(score) for score in self.scores if score is not None), default=0.0)
        if largest > 0:
            steps = (_beyond(s or 0.0, e or 0.0) / largest for s, e in zip(self.scores, self.errors, strict=True))
            raised = [g + options.rate * step for g, step in zip(self.log_weights, steps, strict=True)]
            self.log_weights = [max(g - max(raised), -MAX_LOG_WEIGHT_GAP) for g in raised]
        self._totals, self._steps = _no_totals(len(weights)), 0
        return losses

    def state(self) -> dict[str, Any]:
        """What later draws depend on, JSON-able; a copy, because it is written while training goes on."""
        totals = [list(row) for row in self._totals]
        return {**{name: list(getattr(self, name)) for name in KEPT}, "totals": totals, "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what state() returned.

        Raises:
            DataError: it is of another number of sources.
        """
        count = len(self.prior)
        if len(state["drawn"]) != count:
            raise DataError(
                f"the checkpoint's selection is of {len(state['drawn'])} sources, data.sources lists {count}: "
                "go on with the same ones, or begin anew with checkpoint.load"
            )
        for name in KEPT:
            if name in state:  # older ones have no errors
                setattr(self, name, list(state[name]))
        self._totals = [list(row) for row in state.get("totals", _no_totals(count))]
        self._steps = int(state.get("steps", 0))


def _no_totals(sources: int) -> list[list[float]]:
    return [[0.0] * sources for _ in range(3)]


def _beyond(score: float, error: float) -> float:
    """What of a score exceeds its error, with its sign."""
    return math.copysign(max(0.0, abs(score) - error), score)


def _average(past: float | None, new: float | None, keep: float) -> float | None:
    if past is None or new is None:
        return new if past is None else past
    return keep * past + (1 - keep) * new


class SourcesDataset(Dataset):
    """One dataset a source, indexed by (source, index); a sample says which source it is of, as megatron-core's blends do."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = list(datasets)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        source, index = key
        dataset = self.datasets[source]
        return {**dataset[index % len(dataset)], "dataset_id": source}  # type: ignore[arg-type]


class MixtureSampler:
    """Micro-batches of one data-parallel rank from the plan of the step at hand; the ranks take turns, as everywhere."""

    def __init__(self, mixture: Mixture, micro_batch_size: int, dp_rank: int, dp: int) -> None:
        self.mixture, self.micro_batch_size, self.dp_rank, self.dp = mixture, micro_batch_size, dp_rank, dp

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        while True:
            plan = self.mixture.plan
            for start in range(self.dp_rank * self.micro_batch_size, len(plan), self.dp * self.micro_batch_size):
                yield plan[start : start + self.micro_batch_size]


def losses_by_source(samples: Mapping[str, Tensor], sources: int) -> Tensor:
    """The losses of a step's samples, added up by source.

    Args:
        samples: `loss` and `tokens` [n], of each sample the sum over its tokens and their number, and `source` [n].

    Returns:
        [3, sources] float64, as `Mixture.note` takes it: the sum of the samples' mean losses, of their squares, and the
        number of samples.
    """
    tokens = samples["tokens"]
    means = samples["loss"] / tokens.clamp(min=1)
    rows = torch.stack([means, means.square(), (tokens != 0).float()]).double()  # [3, n]
    totals = torch.zeros(3, sources, dtype=torch.float64, device=rows.device)
    return totals.index_add_(1, samples["source"].to(rows.device, non_blocking=True), rows)
