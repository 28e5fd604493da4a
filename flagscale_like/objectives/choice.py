"""The objective that a run's configuration names."""

from __future__ import annotations

from flagscale_like.config import Contrastive, DirectPreference, RewardModel, RunConfig
from flagscale_like.engine.objective import BatchObjective, Objective
from flagscale_like.objectives.contrastive import ContrastiveLoss
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.objectives.preference import Preference
from flagscale_like.objectives.reward import Reward


def objective_of(config: RunConfig, *, packed: bool = False) -> Objective | BatchObjective:
    """Make the objective of `config.objective`.

    Args:
        packed: the rows that the run reads are packs of documents; see data.blend.is_packed.
    """
    options = config.objective
    if isinstance(options, DirectPreference):
        return Preference(options)
    if isinstance(options, RewardModel):
        return Reward(options)
    if isinstance(options, Contrastive):
        return ContrastiveLoss(options)
    return NextToken(packed=packed, per=options.per)
