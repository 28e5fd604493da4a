"""The mean loss of a model on held-out data, and of each source of a blend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flagscale_like.data.batch import Batch
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.objective import BatchObjective, Objective
from flagscale_like.figures import fixed, short
from flagscale_like.runtime.reduction import NamedSum
from flagscale_like.training.step_log import SHOWN_SUMS, Named


@dataclass(frozen=True)
class Measured:
    """What an evaluation reports, the same on every rank.

    Attributes:
        numbers: for the records, by name.
        line: for people.
    """

    numbers: dict[str, float]
    line: str


@dataclass(frozen=True)
class Evaluation:
    """Means over what was read, the same on every rank.

    Attributes:
        loss: total over count, in the objective's unit: nats a token. nan where nothing counted.
        count: tokens that counted.
        by_source: the loss of the samples of each source, of the sources that were read.
        means: the objective's sums over count, by name.
    """

    loss: float
    count: int
    by_source: dict[str, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)

    def measured(self, objective: Named, split: str) -> Measured:
        """What is reported of a split."""
        metric = f"{objective.metric} {split}"
        by_source = {f"{metric}/{source}": value for source, value in self.by_source.items()}
        means = {f"{name} {split}": value for name, value in self.means.items()}
        parts = "".join(f" | {name} {short(self.means[name])}" for name in objective.sums[:SHOWN_SUMS])
        parts += "".join(f" | {source} {fixed(value)}" for source, value in self.by_source.items())
        return Measured({metric: self.loss, **by_source, **means}, f"{split} loss {fixed(self.loss)}{parts}")


def evaluate(
    engine: Engine,
    objective: Objective | BatchObjective,
    batches: Iterator[Batch],
    *,
    steps: int,
    micro_batches: int,
    sources: Sequence[str] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run `steps` times `micro_batches` on each data-parallel rank, forward only. All ranks call it.

    Args:
        sources: names by the number in Batch.source.
        on_step: called before each step.
    """
    device = engine.ctx.platform.device
    sums: dict[str, Tensor | float] = dict.fromkeys(("total", "count", *objective.sums), 0.0)
    by_source = torch.zeros(2, len(sources), dtype=torch.float64, device=device)
    with engine.evaluation():
        for _ in range(steps):
            on_step()
            outputs = engine.forward(batches, objective, micro_batches)
            sums = {name: value + outputs.sums[name] for name, value in sums.items()}
            if "source" in outputs.samples:
                values = torch.stack((outputs.samples["loss"], outputs.samples["tokens"])).double()  # [2, n]
                by_source.index_add_(1, outputs.samples["source"].to(device), values)
    reduced = NamedSum(engine.ctx)({**sums, "source losses": by_source[0], "source tokens": by_source[1]})
    pairs = zip(sources, reduced["source losses"], reduced["source tokens"], strict=True)
    read = {name: loss / tokens for name, loss, tokens in pairs if tokens}
    count = reduced["count"]
    means = {name: reduced[name] / count if count else math.nan for name in ("total", *objective.sums)}
    return Evaluation(means.pop("total"), int(count), read, means)
