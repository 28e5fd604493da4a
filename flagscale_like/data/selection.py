"""Dynamic data selection: adapts the weights of the data sources during training, and draws the samples by these weights.

The weights are computed in float64 from losses or scores that are reduced over all ranks, without random numbers. All ranks
therefore have the same weights, and a run that resumes from a checkpoint draws the same samples as an uninterrupted run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flagscale_like.config import Selection, Train
from flagscale_like.data.draws import DrawState, draw
from flagscale_like.data.order import Row, Samples
from flagscale_like.errors import DataError

STATE_KEYS = ("log_weights", "credits", "drawn", "losses", "scores", "errors")
# A log-weight is at most this far below the largest one, so that a source that scored low for long can recover.
MAX_LOG_WEIGHT_GAP = 5.0


class Mixture:
    """The weights of the sources, their updates, and the draw of the samples.

    The weights are updated by exponentiated gradient (Hedge; or EXP3, Auer et al. 2002, if a source's loss is known only when
    it is drawn). After each interval of steps, every source gets a score between -1 and 1, rate * score is added to its
    log-weight, and

        weight = (1 - floor) * softmax(log prior + log-weight) + floor / sources.

    The scores of the rules `progress` and `loss` (Albalak et al. 2023) are computed from the training losses:

        progress: score_i = (average of past losses_i - loss_i) / weight_i        loss: score_i = loss_i

    The division by the weight is EXP3's: a source that is rarely drawn has fewer steps in which its loss can fall. The scores
    of the rule `target` are passed to `change`. Scores are averaged over time and divided by the largest one. With
    `progress`, the standard error of the interval's loss is first subtracted from the magnitude of the score; otherwise noise
    would set the weights when no source makes progress.

    Args:
        options: data.selection of the configuration.
        prior: the initial weights; they need not add up to 1.
    """

    def __init__(self, options: Selection, prior: Sequence[float]) -> None:
        self.options = options
        self.prior = [weight / math.fsum(prior) for weight in prior]
        count = len(self.prior)
        self.log_weights = [0.0] * count
        self.credits = [0.0] * count
        self.drawn = [0] * count
        self.losses: list[float | None] = [None] * count  # averages over past intervals
        self.scores: list[float | None] = [None] * count  # averages over past intervals
        self.errors: list[float | None] = [None] * count  # standard errors of the scores
        self._totals, self._steps = _no_totals(count), 0
        self.plan: list[tuple[int, int]] = []

    @property
    def weights(self) -> list[float]:
        """The weight of each source; they add up to 1."""
        raw = [p * math.exp(g) for p, g in zip(self.prior, self.log_weights, strict=True)]
        total, floor = math.fsum(raw), self.options.floor
        return [(1 - floor) * r / total + floor / len(raw) for r in raw]

    def draw(self, samples: int) -> None:
        """Draw the samples of the next step into `plan`: (source, index in the source), in the order of the global batch.

        Each sample comes from the source that is furthest behind its weight. The number of samples of each source therefore
        differs from its share by less than one sample.
        """
        self.plan = list(itertools.islice(draw(self.weights, self.credits, self.drawn), samples))

    def draw_state(self, consumed: int, train: Train) -> DrawState:
        """The state from which the samples after `consumed` ones are drawn, up to the next change of the weights."""
        until = consumed
        for _ in range(self.steps_left):
            until += train.batch_size_at(until)
        return DrawState(consumed, self.weights, list(self.credits), list(self.drawn), until)

    @property
    def steps_left(self) -> int:
        """Steps until the next change of the weights."""
        return self.options.interval - self._steps

    def note(self, totals: Sequence[Sequence[float]]) -> bool:
        """Add the losses of one step to the interval's sums. Non-finite losses of a source are left out.

        Args:
            totals: [3, sources], reduced over all ranks: the sum of the samples' losses, the sum of their squares, and the
                number of samples.

        Returns:
            Whether the interval is over, so that `change` is due.
        """
        for source, values in enumerate(zip(*totals, strict=True)):
            if all(map(math.isfinite, values)):
                for row, value in zip(self._totals, values, strict=True):
                    row[source] += value
        self._steps += 1
        return self._steps >= self.options.interval

    def change(self, scores: Sequence[float | None] | None = None) -> dict[int, float]:
        """Update the weights at the end of an interval.

        Args:
            scores: the score of each source under the rule `target`; None for a source without a score.

        Returns:
            The mean loss of each source in the interval, without the sources that were not drawn.
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
                elif options.rule == "progress" and past is not None and count >= 2:  # one loss has no standard error
                    score = (past - loss) / weights[source]
                    error = math.sqrt(max(0.0, square - total * loss) / (count - 1) / count) / weights[source]
            self.scores[source] = _average(self.scores[source], score, keep)
            self.errors[source] = _average(self.errors[source], error, keep)
            self.losses[source] = _average(past, loss, keep)
        largest = max((abs(score) for score in self.scores if score is not None), default=0.0)
        if largest > 0:
            steps = (_excess(s or 0.0, e or 0.0) / largest for s, e in zip(self.scores, self.errors, strict=True))
            raised = [g + options.rate * step for g, step in zip(self.log_weights, steps, strict=True)]
            self.log_weights = [max(g - max(raised), -MAX_LOG_WEIGHT_GAP) for g in raised]
        self._totals, self._steps = _no_totals(len(weights)), 0
        return losses

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint stores, as JSON types; copies, because training continues during the write."""
        totals = [list(row) for row in self._totals]
        return {**{name: list(getattr(self, name)) for name in STATE_KEYS}, "totals": totals, "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the values that `state` returned.

        Raises:
            DataError: the state has another number of sources.
        """
        count = len(self.prior)
        if len(state["drawn"]) != count:
            raise DataError(
                f"the checkpoint's selection has {len(state['drawn'])} sources, data.sources lists {count}: continue with "
                "the same sources, or start a new run from these weights with checkpoint.load"
            )
        for name in STATE_KEYS:
            if name in state:  # checkpoints of earlier versions have no errors
                setattr(self, name, list(state[name]))
        self._totals = [list(row) for row in state.get("totals", _no_totals(count))]
        self._steps = int(state.get("steps", 0))


def _no_totals(sources: int) -> list[list[float]]:
    return [[0.0] * sources for _ in range(3)]


def _excess(score: float, error: float) -> float:
    """The amount by which the magnitude of a score exceeds its error, with the sign of the score; 0 if it does not."""
    return math.copysign(max(0.0, abs(score) - error), score)


def _average(past: float | None, new: float | None, keep: float) -> float | None:
    """The exponential moving average: keep * past + (1 - keep) * new. If one value is None, the other one."""
    if past is None or new is None:
        return new if past is None else past
    return keep * past + (1 - keep) * new


class SourcesDataset(Samples):
    """The datasets of all sources, indexed by (source, index). As in BlendedDataset, `dataset_id` is a sample's source."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = list(datasets)  # each of one source: data.blend.AnySource

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, index: tuple[int, int]) -> Row:
        source, number = index
        dataset = self.datasets[source]
        return {**dataset[number % len(dataset)], "dataset_id": source}


class MixtureSampler:
    """Yields the micro-batches of one data-parallel rank from the mixture's plan of the current step.

    As in MicroBatchSampler, consecutive micro-batches go to consecutive ranks.
    """

    def __init__(self, mixture: Mixture, micro_batch_size: int, dp_rank: int, dp: int) -> None:
        self.mixture, self.micro_batch_size, self.dp_rank, self.dp = mixture, micro_batch_size, dp_rank, dp

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        while True:
            plan = self.mixture.plan
            for start in range(self.dp_rank * self.micro_batch_size, len(plan), self.dp * self.micro_batch_size):
                yield plan[start : start + self.micro_batch_size]


def losses_by_source(samples: Mapping[str, Tensor], sources: int) -> Tensor:
    """Add up the losses of this rank's samples of a step by source.

    Args:
        samples: `loss` [n], the sum of the loss over each sample's tokens; `tokens` [n], the number of these tokens;
            `source` [n], the number of the sample's source.

    Returns:
        [3, sources] float64: the sum of the samples' mean losses, the sum of their squares, and the number of samples.
    """
    tokens = samples["tokens"]
    means = samples["loss"] / tokens.clamp(min=1)
    rows = torch.stack([means, means.square(), (tokens != 0).float()]).double()  # [3, n]
    totals = torch.zeros(3, sources, dtype=torch.float64, device=rows.device)
    return totals.index_add_(1, samples["source"].to(rows.device, non_blocking=True), rows)
