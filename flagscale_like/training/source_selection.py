"""Dynamic data selection in the loop: plans each step's samples, collects losses by source, changes the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from flagscale_like.checkpoint.store import loss_scaler_state, set_loss_scaler_state
from flagscale_like.config import Data
from flagscale_like.data.pretrain import build_target
from flagscale_like.data.selection import Mixture, SourceLosses, SourcesDataset
from flagscale_like.errors import DataError
from flagscale_like.training.run import Run
from flagscale_like.training.shards import owned_shards
from flagscale_like.training.step import Watch, make_gradients, micro_batch_count


class SourceSelection:
    """What the loop asks of data selection, at the beginning and at the end of a step; all of it nothing where it is off.

    Args:
        train_data: from `data.pretrain.build_datasets`.
    """

    def __init__(self, run: Run, train_data: Dataset) -> None:
        self.run, options = run, run.config.data.selection
        self.mixture: Mixture | None = None
        self.watch: Watch | None = None
        if options is None:
            return
        assert isinstance(train_data, SourcesDataset)
        sources = run.config.data.sources
        self.names = run.config.data.source_names
        self.mixture = Mixture(options, [source.weight for source in sources])
        self._losses = SourceLosses(len(sources))
        self.watch = self._losses.watch
        self._target = TargetAlignment(run, train_data) if options.rule == "target" else None
        _check_sources(run.saved, self.names)
        # What was drawn is drawn: a run that goes back goes on with the data that follows.
        run.keep("selection", self.mixture, goes_back=False)

    def begin(self, batch_size: int) -> None:
        """Plan a step of `batch_size` samples."""
        if self.mixture is not None:
            self.mixture.draw(batch_size)

    def flags(self) -> list[float]:
        """This rank's losses of the step by source, for the reduction that the step makes anyway."""
        ctx = self.run.ctx
        return self._losses.take(counts=ctx.is_last_stage and ctx.tp_rank == 0) if self.mixture else []

    def end(self, summed: Sequence[float]) -> dict[str, float]:
        """Take the ranks' `flags`, added up; returns what to report, which is something whenever the weights change."""
        mixture = self.mixture
        if mixture is None:
            return {}
        count = len(self.names)
        if not mixture.note([summed[row * count : (row + 1) * count] for row in range(3)]):
            return {}
        scores = self._target.measure(mixture.drawn) if self._target else None
        losses = mixture.change(scores)
        readings = {f"selection/loss/{self.names[i]}": loss for i, loss in losses.items()}
        readings |= {f"selection/weight/{n}": w for n, w in zip(self.names, mixture.weights, strict=True)}
        readings |= {f"selection/samples/{n}": float(c) for n, c in zip(self.names, mixture.drawn, strict=True)}
        if scores is not None:
            readings |= {
                f"selection/alignment/{n}": s for n, s in zip(self.names, scores, strict=True) if s is not None
            }
        return readings


def _check_sources(saved: dict[str, Any], names: list[str]) -> None:
    """What is saved of selection goes by the order of the sources.

    Raises:
        DataError: the checkpoint's were others, or in another order.
    """
    if "selection" not in saved:
        return
    before = Data.model_validate(saved["config"]["data"]).source_names
    if before != names:
        raise DataError(
            f"the checkpoint's selection is of the sources {', '.join(before)}; data.sources lists {', '.join(names)}: "
            "go on with the same ones in the same order, or begin anew with checkpoint.load"
        )


class TargetAlignment:
    """How well each source's gradient points along the target's: the cosine between them.

    A step along a source's gradient g changes the target's loss by -lr * <g, g_target> to first order, so that this is the
    loss difference on the target that a step on the source would make, for the step's length (Fan et al. 2023, DoGE, use the
    same product). Each gradient is made by the usual schedule on the usual layout and lies, reduced, with the optimizer's
    shards: the products are added up over the ranks, and no gradient is gathered.
    """

    def __init__(self, run: Run, train_data: SourcesDataset) -> None:
        self.run, self.data = run, train_data
        config, ctx = run.config, run.ctx
        self.count = micro_batch_count(config, ctx, config.data.selection.probe_samples)
        self.target = build_target(config, ctx, self.count * config.train.micro_batch_size * ctx.dp)
        self.shards = [s for s in owned_shards(run.models, run.optimizer, ctx) if s.counts]

    def measure(self, drawn: Sequence[int]) -> list[float | None]:
        """The cosine of every source; None where a gradient is not finite.

        All ranks call it; parameters, optimizer state and the fp16 loss scale stay as they are.

        Args:
            drawn: samples that each source has given: the next ones are looked at.
        """
        scale = loss_scaler_state(self.run.optimizer)
        wanted = [g.clone() for g in self._gradient(self.target, 0)]
        sums = [_dot(wanted, wanted)]
        for source, dataset in enumerate(self.data.datasets):
            found = self._gradient(dataset, drawn[source])
            sums += [_dot(found, wanted), _dot(found, found)]
        set_loss_scaler_state(self.run.optimizer, scale)
        length, *products = self.run.ctx.sum(sums)
        return [_cosine(product, length, own) for product, own in zip(products[::2], products[1::2], strict=True)]

    def _gradient(self, dataset: Dataset, first: int) -> list[Tensor]:
        run, config = self.run, self.run.config
        make_gradients(run.chunks, run.optimizer, config, self._batches(dataset, first), self.count)
        return [shard.main.grad for shard in self.shards]

    def _batches(self, dataset: Dataset, first: int) -> Iterator[dict[str, Tensor]]:
        ctx, size = self.run.ctx, self.run.config.train.micro_batch_size
        for turn in range(self.count):
            start = first + (turn * ctx.dp + ctx.dp_rank) * size
            rows = [dataset[(start + row) % len(dataset)] for row in range(size)]  # type: ignore[arg-type]
            batch = default_collate([{k: row[k] for k in ("tokens", "labels", "loss_mask")} for row in rows])
            yield {name: value.to(ctx.platform.device) for name, value in batch.items()}


def _cosine(product: float, *squares: float) -> float | None:
    """Of two vectors, from their product and the squares of their lengths."""
    if not all(map(math.isfinite, (product, *squares))):
        return None
    length = math.sqrt(math.prod(squares))
    return product / length if length > 0 else 0.0


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((torch.dot(x.view(-1), y.view(-1)).double() for x, y in zip(a, b, strict=True)), torch.zeros(())))
