"""The objective that a run's configuration names."""

from __future__ import annotations

from flagscale_like.config import RunConfig
from flagscale_like.engine.objective import Objective
from flagscale_like.objectives.next_token import NextToken


def objective_of(config: RunConfig, *, packed: bool = False) -> Objective:
    """Make the objective of `config.objective`.

    Args:
        packed: the rows that the run reads are packs of documents; see data.blend.is_packed.
    """
    return NextToken(packed=packed)
