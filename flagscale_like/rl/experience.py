"""Experience: the scored rollouts of an iteration as tensors, with the advantages that the policy learns from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flagscale_like.config import ReinforcementLearning
from flagscale_like.config.rl import GROUPED
from flagscale_like.generation.rollout import Rollout
from flagscale_like.objectives.policy import divergence
from flagscale_like.rl.algorithms import (
    generalized_advantages,
    group_advantages,
    overlong_penalties,
    returns_to_go,
    token_rewards,
    token_weights,
    whiten,
)
from flagscale_like.rl.scoring import Scored, as_matrix


@dataclass
class Experience:
    """n rollouts, the same on every rank; tensors are fp32 [n, t], 0 behind a rollout's last token.

    Attributes:
        mask: 1 at each drawn token.
        policy: what the policy's batches hold, by the names of objectives.policy; `weights` is the loss mask.
        critic: what the critic's hold, by the names of objectives.value; empty where there is none.
        divergence: the mean divergence of a rollout from the reference, in nats, as k1; nan where there is none.
        numbers: what is reported, by name.
    """

    rollouts: list[Rollout]
    mask: Tensor
    policy: dict[str, Tensor]
    critic: dict[str, Tensor] = field(default_factory=dict)
    divergence: float = math.nan
    numbers: dict[str, float] = field(default_factory=dict)

    def rows(self, fields: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """By name, of each rollout the numbers of its drawn tokens."""
        lengths = [len(rollout.ids) for rollout in self.rollouts]
        return {
            name: [row[:length] for row, length in zip(tensor, lengths, strict=True)] for name, tensor in fields.items()
        }

    @property
    def teaches(self) -> bool:
        """Whether there is anything to learn: an advantage, a divergence in the loss, or values."""
        return bool(self.policy["advantages"].any()) or "reference" in self.policy or bool(self.critic)


def appraise(scored: Sequence[Scored], options: ReinforcementLearning, coefficient: float) -> Experience:
    """Make advantages, returns and loss weights of scored rollouts; see rl.algorithms.

    Args:
        coefficient: on the divergence from the reference, now.
    """
    rollouts, drawing = [one.rollout for one in scored], options.rollout
    lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
    width = int(lengths.max()) if len(rollouts) else 1
    mask = (torch.arange(width) < lengths[:, None]).float() if len(rollouts) else torch.zeros(0, 1)
    engine = as_matrix([rollout.raw_logprobs for rollout in rollouts], width)

    def found(name: str) -> Tensor | None:
        if not scored or name not in scored[0].numbers:
            return None
        return as_matrix([one.numbers[name] for one in scored], width)

    old, reference = found("old"), found("reference")
    scores = torch.tensor([one.score.value for one in scored], dtype=torch.float32)
    shaped = scores
    if options.overlong:
        shaped = scores + overlong_penalties(
            lengths, drawing.max_new_tokens, options.overlong.buffer, options.overlong.penalty
        )
    behind, penalties, apart = engine if old is None else old, torch.zeros_like(mask), math.nan
    if reference is not None:
        apart = float((divergence(behind, reference, "k1") * mask).sum(1).mean()) if len(rollouts) else math.nan
        if options.kl.into == "reward":
            penalties = coefficient * divergence(behind, reference, options.kl.estimator) * mask
    groups, values = torch.tensor([one.group for one in scored], dtype=torch.long), found("values")
    advantages, critic = _advantages(options, shaped, groups, penalties, mask, values)
    mean = options.mean or ("rollout" if options.algorithm in ("grpo", "dr_grpo") else "token")
    room = drawing.max_new_tokens if options.algorithm == "dr_grpo" else None
    weights, counts = token_weights(mask, mean, room)
    policy = {"advantages": advantages, "engine": engine, "weights": weights, "counts": counts}
    if options.old == "engine":
        policy["old"] = engine
    elif old is not None:
        policy["old"] = old
    if reference is not None and options.kl.into == "loss":
        policy["reference"] = reference
    experience = Experience(rollouts, mask, policy, critic, apart)
    experience.numbers = _numbers(experience, scores, lengths, coefficient)
    return experience


def _advantages(
    options: ReinforcementLearning,
    scores: Tensor,
    groups: Tensor,
    penalties: Tensor,
    mask: Tensor,
    values: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each drawn token's advantage, [n, t], and what the critic learns from."""
    if options.algorithm in GROUPED:
        own = group_advantages(scores - penalties.sum(1), groups, options.algorithm)
        return own[:, None] * mask, {}
    rewards = token_rewards(scores, penalties, mask)
    if options.algorithm == "reinforce++":  # Hu et al. 2025, equations (3) and (4)
        return whiten(returns_to_go(rewards, mask, options.gamma), mask), {}
    values = torch.zeros_like(mask) if values is None else values * mask
    advantages = generalized_advantages(rewards, values, mask, options.gamma, options.gae_lambda)
    if options.critic.gae_lambda == options.gae_lambda:
        returns = advantages + values
    else:
        returns = generalized_advantages(rewards, values, mask, options.gamma, options.critic.gae_lambda) + values
    return whiten(advantages, mask), {"values": values, "returns": returns}


def _numbers(experience: Experience, scores: Tensor, lengths: Tensor, coefficient: float) -> dict[str, float]:
    rollouts, count = experience.rollouts, len(experience.rollouts)
    if not count:
        return {}
    found = {
        "reward/mean": float(scores.mean()),
        "reward/deviation": float(scores.std()) if count > 1 else 0.0,
        "rollout/length": float(lengths.float().mean()),
        "rollout/longest": float(lengths.max()),
        "rollout/ended": sum(rollout.finish == "stop" for rollout in rollouts) / count,
    }
    if not math.isnan(experience.divergence):
        found |= {"kl/reference": experience.divergence, "kl/coefficient": coefficient}
    if experience.critic:
        values, returns = (experience.critic[name][experience.mask.bool()] for name in ("values", "returns"))
        spread = returns.var() if len(returns) > 1 else returns.new_tensor(0.0)
        left = (returns - values).var() if len(returns) > 1 else spread
        found["value/explained"] = float(1 - left / spread) if spread > 0 else 0.0
    return found
