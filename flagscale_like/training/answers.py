"""What a model makes of each answer: its log-probability, or its rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.order import Row
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.objective import Objective
from flagscale_like.training.row_plan import RowPlan

ROUND = 16  # micro-batches between two signs of life


class Items(Protocol):
    """What is asked for: items that rows are made of, each of one or more answers.

    Attributes:
        sizes: places that each item takes.
    """

    @property
    def sizes(self) -> Sequence[int] | np.ndarray: ...

    def row(self, numbers: Sequence[int], /) -> Row:
        """The row of these items; see data.pairs.pack_answers()."""
        ...


def answer_values(
    engine: Engine, pairs: Items, objective: Objective, beat: Callable[[], None] = lambda: None
) -> np.ndarray | None:
    """What an objective finds of each answer of some pairs; see item_values().

    Returns:
        On rank 0, float32 [2 pairs, ...], chosen and rejected in turn; None on the others.
    """
    values = item_values(engine, pairs, objective, each=2, beat=beat)
    return None if values is None else values.reshape(-1, *values.shape[2:])


def item_values(
    engine: Engine, items: Items, objective: Objective, *, each: int = 1, beat: Callable[[], None] = lambda: None
) -> np.ndarray | None:
    """What an objective finds of each answer, under an engine's weights, on any layout. All ranks call it.

    Args:
        items: all are asked for, once.
        objective: its one sample is by answer: AnswerLogProbabilities or AnswerRewards.
        each: answers of an item.
        beat: called from time to time.

    Returns:
        On rank 0, float32 [items, each, ...]; None on the others.
    """
    ctx, spec, count = engine.ctx, engine.spec, len(items.sizes)
    plan, step = RowPlan.of(items.sizes, spec, ctx.dp), spec.parallel.pp if spec.parallel.vpp > 1 else 1

    found, feed = [], _batches(engine, items, plan, ctx.dp_rank)
    with engine.evaluation():
        for start in range(0, plan.count, ROUND * step):
            beat()
            samples = engine.forward(feed, objective, min(ROUND * step, plan.count - start)).samples
            found += [ctx.platform.to_numpy(samples[objective.metric].float())] if samples else []
    gathered = ctx.gather_to_main((ctx.dp_rank, np.concatenate(found) if found else None))
    if not ctx.is_main:
        return None
    values: np.ndarray | None = None
    for dp_rank, own in gathered:
        if own is not None:
            values = np.full((count, each, *own.shape[1:]), np.nan, np.float32) if values is None else values
            values[plan.order(dp_rank)] = own.reshape(-1, each, *own.shape[1:])
    return values


def own_values(engine: Engine, items: Items, objective: Objective) -> np.ndarray | None:
    """As item_values(), by the one copy of a model whose ranks call it. Others need not, where they share no experts.

    Returns:
        On the copy's last stage, on its first tensor- and context-parallel rank, float32 [items, ...]; None on the others.
    """
    plan = RowPlan.of(items.sizes, engine.spec, 1)
    with engine.evaluation():
        samples = engine.forward(_batches(engine, items, plan, 0), objective, plan.count).samples
    if not samples:
        return None
    own = engine.ctx.platform.to_numpy(samples[objective.metric].float())
    values = np.full((len(items.sizes), *own.shape[1:]), np.nan, np.float32)
    values[plan.order(0)] = own
    return values


def _batches(engine: Engine, items: Items, plan: RowPlan, dp_rank: int) -> Iterator[Batch]:
    for micro_batch in plan.micro_batches(dp_rank):
        yield Batch.of(collate([items.row(row) for row in micro_batch]), engine.ctx.platform.device)
