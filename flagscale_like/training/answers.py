"""What a model makes of each answer of some pairs: its log-probability, or its rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.pairs import PairRows
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.objective import Objective
from flagscale_like.training.row_plan import RowPlan

ROUND = 16  # micro-batches between two signs of life


def answer_values(
    engine: Engine, pairs: PairRows, objective: Objective, beat: Callable[[], None] = lambda: None
) -> np.ndarray | None:
    """What an objective finds of each answer, under an engine's weights, on any layout. All ranks call it.

    Args:
        pairs: all are asked for, once.
        objective: its one sample is by answer: AnswerLogProbabilities or AnswerRewards.
        beat: called from time to time.

    Returns:
        On rank 0, float32 [2 pairs, ...], chosen and rejected in turn; None on the others.
    """
    ctx, spec = engine.ctx, engine.spec
    plan, step = RowPlan.of(pairs.sizes, spec, ctx), spec.parallel.pp if spec.parallel.vpp > 1 else 1

    def batches() -> Iterator[Batch]:
        for micro_batch in plan.micro_batches(ctx.dp_rank):
            yield Batch.of(collate([pairs.row(row) for row in micro_batch]), ctx.platform.device)

    found, feed = [], batches()
    with engine.evaluation():
        for start in range(0, plan.count, ROUND * step):
            beat()
            samples = engine.forward(feed, objective, min(ROUND * step, plan.count - start)).samples
            found += [samples[objective.metric].float().cpu().numpy()] if samples else []
    gathered = ctx.gather_to_main((ctx.dp_rank, np.concatenate(found) if found else None))
    if not ctx.is_main:
        return None
    values: np.ndarray | None = None
    for dp_rank, own in gathered:
        if own is not None:
            values = np.full((len(pairs.sizes), 2, *own.shape[1:]), np.nan, np.float32) if values is None else values
            values[plan.order(dp_rank)] = own.reshape(-1, 2, *own.shape[1:])
    return values.reshape(-1, *values.shape[2:])
