"""Dynamic data selection in the loop: it plans each step's samples, collects losses by source, and changes the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flagscale_like.config import Data, RunConfig
from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.blend import is_packed
from flagscale_like.data.order import Samples
from flagscale_like.data.pretrain import build_target, micro_batch_count
from flagscale_like.data.selection import Mixture, SourcesDataset, losses_by_source
from flagscale_like.engine.engine import Engine, Outputs
from flagscale_like.engine.shards import loss_scaler_state, set_loss_scaler_state
from flagscale_like.errors import DataError, required
from flagscale_like.objectives.choice import objective_of
from flagscale_like.runtime.reduction import Value
from flagscale_like.training.parts import Part, Report, Step
from flagscale_like.training.plan import StepPlan


class SourceSelection(Part):
    """Lets the weights of the data sources follow the model.

    What was drawn stays drawn: a run that goes back goes on with the data that follows.

    Args:
        train_data: from `data.pretrain.build_datasets`.
        saved: state.json of the checkpoint that the run goes on from.
    """

    name = "selection"

    def __init__(self, config: RunConfig, engine: Engine, train_data: SourcesDataset, saved: Mapping[str, Any]) -> None:
        self.names, self.ctx = config.data.source_names, engine.ctx
        selection = required(config.data.selection, "data.selection")
        self.mixture = Mixture(selection, [source.weight for source in config.data.sources])
        self._target = TargetAlignment(config, engine, train_data) if selection.rule == "target" else None
        _check_sources(saved, self.names)

    def before(self, plan: StepPlan) -> None:
        """Plan the samples of the step."""
        self.mixture.draw(plan.batch_size)

    def contribute(self, outputs: Outputs) -> Mapping[str, Value]:
        """This rank's losses of the step by source."""
        count = len(self.names)
        if not outputs.samples:
            return {"selection": [0.0] * (3 * count)}
        return {"selection": losses_by_source(outputs.samples, count).flatten()}

    def after(self, step: Step, report: Report) -> None:
        """Note the losses; at the end of an interval, change the weights and report them."""
        count, summed = len(self.names), step.facts.sums["selection"]
        if not self.mixture.note([summed[row * count : (row + 1) * count] for row in range(3)]):
            return
        scores = self._target.measure(self.mixture.drawn) if self._target else None
        losses = self.mixture.change(scores)
        report.numbers(step.plan.step, self._readings(losses, scores))

    def _readings(self, losses: Mapping[int, float], scores: Sequence[float | None] | None) -> dict[str, float]:
        mixture, names = self.mixture, self.names
        readings = {f"selection/loss/{names[i]}": loss for i, loss in losses.items()}
        readings |= {f"selection/weight/{n}": w for n, w in zip(names, mixture.weights, strict=True)}
        readings |= {f"selection/samples/{n}": float(c) for n, c in zip(names, mixture.drawn, strict=True)}
        if scores is not None:
            readings |= {f"selection/alignment/{n}": s for n, s in zip(names, scores, strict=True) if s is not None}
        return readings

    def state(self) -> dict[str, Any]:
        return self.mixture.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self.mixture.load(dict(state))


def _check_sources(saved: Mapping[str, Any], names: list[str]) -> None:
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

    def __init__(self, config: RunConfig, engine: Engine, train_data: SourcesDataset) -> None:
        self.config, self.engine, self.data = config, engine, train_data
        selection = required(config.data.selection, "data.selection")
        self.count = micro_batch_count(config, engine.ctx, selection.probe_samples)
        self.target = build_target(config, engine.ctx, self.count * config.train.micro_batch_size * engine.ctx.dp)
        self.objective = objective_of(config, packed=is_packed(train_data))
        self.shards = [s for s in engine.owned if s.counts and s.trained]

    def measure(self, drawn: Sequence[int]) -> list[float | None]:
        """The cosine of every source; None where a gradient is not finite.

        All ranks call it; parameters, optimizer state and the fp16 loss scale stay as they are.

        Args:
            drawn: samples that each source has given: the next ones are looked at.
        """
        scale = loss_scaler_state(self.engine.optimizer)
        wanted = [g.clone() for g in self._gradient(self.target, 0)]
        sums = [_dot(wanted, wanted)]
        for source, dataset in enumerate(self.data.datasets):
            found = self._gradient(dataset, drawn[source])
            sums += [_dot(found, wanted), _dot(found, found)]
        set_loss_scaler_state(self.engine.optimizer, scale)
        length, *products = self.engine.ctx.sum(sums)
        return [cosine(product, length, own) for product, own in zip(products[::2], products[1::2], strict=True)]

    def _gradient(self, dataset: Samples, first: int) -> list[Tensor]:
        self.engine.forward_backward(self._batches(dataset, first), self.objective, self.count)
        return [required(shard.main.grad, "grad") for shard in self.shards]

    def _batches(self, dataset: Samples, first: int) -> Iterator[Batch]:
        ctx, size = self.engine.ctx, self.config.train.micro_batch_size
        for turn in range(self.count):
            start = first + (turn * ctx.dp + ctx.dp_rank) * size
            rows = [dataset[(start + row) % len(dataset)] for row in range(size)]
            yield Batch.of(collate(rows), ctx.platform.device)


def cosine(product: float, *squares: float) -> float | None:
    """Of two vectors, from their product and the squares of their lengths."""
    if not all(map(math.isfinite, (product, *squares))):
        return None
    length = math.sqrt(math.prod(squares))
    return product / length if length > 0 else 0.0


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((torch.dot(x.view(-1), y.view(-1)).double() for x, y in zip(a, b, strict=True)), torch.zeros(())))
