"""Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").

The exact gradient of a loss over the vectors of a whole global batch, for micro-batches of any size:

    1. forward only: the vectors v of this rank's micro-batches
    2. the loss L of the whole batch, and g = dL/dv
    3. forward and backward of <v, g> of each micro-batch: its gradient by the weights w is dL/dv dv/dw

Passes 1 and 3 are megatron-core's schedules. Step 2 is in the loss function of the first micro-batch of pass 3, which
therefore needs no pass 1 of its own: where there is one micro-batch, there is one pass. Each data-parallel rank computes the
loss of its own queries against the vectors of all ranks, and the ranks' gradients are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import BatchObjective, Cut, Loss, VectorObjective
from flagscale_like.errors import required
from flagscale_like.runtime.parallel import ParallelContext


class VectorsOf:
    """As an objective, what another one makes of the output: its vectors are the samples, [d, h]."""

    metric = "vectors"
    sums: tuple[str, ...] = ()

    def __init__(self, objective: VectorObjective) -> None:
        self._objective, self.packed = objective, objective.packed
        self.cut: Cut = objective.cut

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The other one's."""
        return self._objective.inputs(batch)

    def row_counts(self, batch: Batch) -> Tensor:
        """The other one's."""
        return self._objective.row_counts(batch)

    def vectors(self, output: Tensor, batch: Batch) -> Tensor:
        """The other one's."""
        return self._objective.vectors(output, batch)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """No loss: the total is there because the schedule wants a number."""
        found = self.vectors(output, batch)
        return Loss(found.sum(), self.row_counts(batch).sum(), samples={self.metric: found})


class GlobalBatch:
    """The micro-batches of a step on this rank, and what the loss reads of the other data-parallel ranks.

    Attributes:
        counts: documents of each data-parallel rank.

    Raises:
        ConfigError: on every rank, where the objective refuses the batch.
    """

    def __init__(self, objective: BatchObjective, batches: Sequence[Batch], ctx: ParallelContext) -> None:
        self.objective, self.batches, self.ctx = objective, batches, ctx
        self.documents = [len(batch.bounds()) - 1 for batch in batches]
        self.counts = self._exchange(sum(self.documents))
        objective.check(self.counts)

    def _exchange(self, own: int) -> list[int]:
        """The counts of all data-parallel ranks. The host waits for them, before the passes of the step begin."""
        if self.ctx.dp == 1:
            return [own]
        mine = torch.tensor([own]).to(self.ctx.platform.device)
        counts = mine.new_empty(self.ctx.dp)
        dist.all_gather_into_tensor(counts, mine, group=self.ctx.groups.dp)
        return counts.tolist()

    def loss(self, vectors: Tensor, *, gradient: bool) -> tuple[Loss, Tensor | None]:
        """The loss of this rank's part of the batch, and the gradient of the whole batch's loss by this rank's vectors.

        Args:
            vectors: of this rank, fp32 [d, h].
        """
        objective, ctx = self.objective, self.ctx
        extras = {name: torch.cat([b.extras[name] for b in self.batches]) for name in objective.shared or ()}
        if ctx.dp == 1 or objective.shared is None:
            return objective.batch_loss(self.batches, vectors, extras, 0, gradient=gradient)
        extras = {name: self._gathered(value) for name, value in extras.items()}
        first = sum(self.counts[: ctx.dp_rank])
        found, grad = objective.batch_loss(self.batches, self._gathered(vectors), extras, first, gradient=gradient)
        if grad is not None:
            dist.all_reduce(grad, group=ctx.groups.dp)
            grad = grad[first : first + len(vectors)]
        return found, grad

    def _gathered(self, own: Tensor) -> Tensor:
        """[d, ...] of every data-parallel rank, of which each has another d, one after another: [D, ...]."""
        most, ranks = max(self.counts), self.ctx.dp
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        found = own.new_empty(ranks * most, *own.shape[1:])
        dist.all_gather_into_tensor(found, padded, group=self.ctx.groups.dp)
        return torch.cat([part[:count] for part, count in zip(found.split(most), self.counts, strict=True)])


class ForwardPass(VectorsOf):
    """Forward only: the vectors of all micro-batches; the last one has the loss of the batch, the others have none."""

    def __init__(self, whole: GlobalBatch) -> None:
        super().__init__(whole.objective)
        self.metric, self.sums, self.whole = whole.objective.metric, whole.objective.sums, whole
        self._found: list[Tensor] = []

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """The loss of the whole batch, or 0."""
        self._found.append(self.vectors(output, batch))
        if len(self._found) < len(self.whole.batches):
            return _no_loss(self.row_counts(batch).sum(), self.sums)
        return replace(self.whole.loss(torch.cat(self._found), gradient=False)[0], count=self.row_counts(batch).sum())


class SecondPass(VectorsOf):
    """Forward and backward: <vector, gradient> of each micro-batch. The first one has the loss of the batch.

    Args:
        known: the first pass's vectors of each micro-batch, [d, h], without the first micro-batch or with it; empty on other
            stages than the last.
    """

    def __init__(self, whole: GlobalBatch, known: list[Tensor]) -> None:
        super().__init__(whole.objective)
        self.metric, self.sums, self.whole = whole.objective.metric, whole.objective.sums, whole
        self._known = known
        self._gradients: Iterator[Tensor] | None = None  # of the micro-batches that follow

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """A number whose value is the loss of the batch, or 0, and whose gradient is that of <vector, gradient>."""
        vectors = self.vectors(output, batch)
        begins, count = self._gradients is None, self.row_counts(batch).sum()
        found = self._begin(vectors.detach()) if begins else _no_loss(count, self.sums)
        pull = (vectors * next(required(self._gradients, "gradients"))).sum().double()
        return replace(found, total=pull + (found.total.double() - pull).detach(), count=count)

    def _begin(self, first: Tensor) -> Loss:
        whole = self.whole
        is_known = len(self._known) == len(whole.batches)
        own = torch.cat(self._known if is_known else [first, *self._known])
        found, gradient = whole.loss(own, gradient=True)
        self._gradients = iter(required(gradient, "gradient").split(whole.documents))
        return found


def _no_loss(count: Tensor, sums: Sequence[str]) -> Loss:
    zero = torch.zeros_like(count)
    return Loss(zero, count, sums=dict.fromkeys(sums, zero))
