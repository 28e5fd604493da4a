"""Dynamic data selection: weights of the sources that follow the model, and the draw of samples by them.

Everything is a function of the losses or scores that the ranks have reduced, in float64, and of nothing random: all ranks
hold the same mixture, and one that is restored from a checkpoint draws what the first would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flagscale_like.config import Selection
from flagscale_like.errors import DataError

MOST_BEHIND = 5.0  # of a log-weight: a source that was bad for long can come back in reasonable time


class Mixture:
    """The sources' weights, how they change, and which sample is drawn next.

    Weights follow the exponentiated gradient (Hedge, and EXP3 where a source is seen only when it is drawn: Auer et al.
    2002): after each interval every source gets a score between -1 and 1, its log-weight grows by rate * score, and

        weight = (1 - floor) * softmax(log prior + log-weight) + floor / sources.

    Scores of the rules `progress` and `loss` (Albalak et al. 2023) come from the losses of the training itself:

        progress_i = (average of past losses_i - loss_i) / weight_i        loss_i = loss_i

    The division is EXP3's: what is seldom drawn has little occasion to get better. Scores of the rule `target` are given to
    `change`. All are averaged over time and divided by the largest.

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
        self._sums, self._tokens, self._steps = [0.0] * count, [0.0] * count, 0
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
        weights, self.plan = self.weights, []
        for _ in range(samples):
            self.credits = [credit + weight for credit, weight in zip(self.credits, weights, strict=True)]
            source = max(range(len(weights)), key=self.credits.__getitem__)
            self.credits[source] -= 1.0
            self.plan.append((source, self.drawn[source]))
            self.drawn[source] += 1

    def note(self, sums: Sequence[float], tokens: Sequence[float]) -> bool:
        """Take a step's losses; says whether the weights are due to change.

        Args:
            sums, tokens: for each source the sum of its tokens' losses, and their number, over all ranks.
        """
        for source, (total, count) in enumerate(zip(sums, tokens, strict=True)):
            if math.isfinite(total):
                self._sums[source] += total
                self._tokens[source] += count
        self._steps += 1
        return self._steps >= self.options.interval

    def change(self, scores: Sequence[float] | None = None) -> dict[int, float]:
        """Change the weights after an interval; returns each source's mean loss in it.

        Args:
            scores: of the rule `target`.
        """
        weights, keep = self.weights, self.options.memory
        losses = {i: s / t for i, (s, t) in enumerate(zip(self._sums, self._tokens, strict=True)) if t}
        for source in range(len(weights)):
            past, loss = self.losses[source], losses.get(source)
            score = scores[source] if scores is not None else None
            if scores is None and loss is not None:
                if self.options.rule == "loss":
                    score = loss
                elif past is not None:
                    score = (past - loss) / weights[source]
            self.scores[source] = _average(self.scores[source], score, keep)
            self.losses[source] = _average(past, loss, keep)
        largest = max((abs(score) for score in self.scores if score is not None), default=0.0)
        if largest > 0:
            raised = [g + self.options.rate * (s or 0.0) / largest for g, s in zip(self.log_weights, self.scores)]
            self.log_weights = [max(g - max(raised), -MOST_BEHIND) for g in raised]
        self._sums, self._tokens, self._steps = [0.0] * len(weights), [0.0] * len(weights), 0
        return losses

    def state(self) -> dict[str, Any]:
        """What later draws depend on, JSON-able; a copy, because it is written while training goes on."""
        names = ("log_weights", "credits", "drawn", "losses", "scores", "_sums", "_tokens")
        return {**{name.strip("_"): list(getattr(self, name)) for name in names}, "steps": self._steps}

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
        for name in ("log_weights", "credits", "drawn", "losses", "scores"):
            setattr(self, name, list(state[name]))
        self._sums, self._tokens, self._steps = list(state["sums"]), list(state["tokens"]), int(state["steps"])


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


class SourceLosses:
    """Adds up the losses of a step by source, on the rank that computes them."""

    def __init__(self, sources: int) -> None:
        self.sources = sources
        self._sums: Tensor | None = None

    def watch(self, batch: dict[str, Tensor], losses: Tensor) -> None:
        """Take a micro-batch. batch["source"]: [b]; losses: [b, s]."""
        mask = batch["loss_mask"]
        rows = torch.stack([(losses.detach().float() * mask).sum(dim=1), mask.sum(dim=1)]).double()  # [2, b]
        if self._sums is None:
            self._sums = torch.zeros(2, self.sources, dtype=torch.float64, device=rows.device)
        self._sums.index_add_(1, batch["source"].to(rows.device, non_blocking=True), rows)

    def take(self, *, counts: bool) -> list[float]:
        """[sum of each source, tokens of each source] since the last call; zeros where another rank counts them."""
        sums, self._sums = self._sums, None
        return sums.flatten().tolist() if counts and sums is not None else [0.0] * (2 * self.sources)
