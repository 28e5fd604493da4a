"""The objective that a run's configuration names."""

from __future__ import annotations

from flagscale_like.config import DirectPreference, RewardModel, RunConfig
from flagscale_like.engine.objective import Objective
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.objectives.preference import Preference
from flagscale_like.objectives.reward import Reward


def objective_of(config: RunConfig, *, packed: bool = False) -> Objective:
    """Make the objective of `config.objective`.

    Args:
        packed: the rows that the run reads are packs of documents; see data.blend.is_packed.
    """
    options = config.objective
    if isinstance(options, DirectPreference):
        return Preference(options)
    if isinstance(options, RewardModel):
        return Reward(options)
    return NextToken(packed=packed, per=options.per)
