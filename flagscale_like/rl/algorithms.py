"""Rewards of tokens, advantages and returns: pure functions of the rollouts of a whole iteration.

Shapes: n rollouts of at most t drawn tokens. [n, t] tensors are fp32; `mask`, [n, t], is 1 at each drawn token, which come
first in a row, and 0 behind them. Every rank computes them from the rollouts of all ranks, so that no layout changes them.
The losses of tokens, which a model differentiates, are in objectives.policy and objectives.value.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GROUP_EPS = 1e-4  # beside a group's standard deviation, as trl has it; the paper has none


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """The reward of each token, [n, t]: minus its penalty, and at the last token the rollout's score (Ziegler et al. 2019,
    equation 2).

    Args:
        scores: [n].
        penalties: [n, t], the coefficient times the divergence from the reference.
    """
    rewards = -penalties * mask
    last = mask.sum(1).long() - 1
    has_tokens = last >= 0
    rewards[has_tokens, last[has_tokens]] += scores[has_tokens]
    return rewards


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, equation 16), [n, t].

        delta_t = r_t + gamma V_(t+1) - V_t,    A_t = delta_t + gamma lambda A_(t+1),    0 behind the last token

    Args:
        values: [n, t], the value of the state in which each token is drawn.
    """
    advantages, last = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    values = values * mask
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * last) * mask[:, t]
        advantages[:, t] = last
    return advantages


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The discounted sum of a token's reward and those after it, [n, t]."""
    return generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and variance 1 over the drawn tokens of all rollouts, and 0 elsewhere.

    The variance is divided by the number of tokens less 1. A single token becomes 0.
    """
    count = mask.sum()
    mean = (x * mask).sum() / count.clamp(min=1)
    variance = ((x - mean).square() * mask).sum() / (count - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def group_advantages(scores: Tensor, groups: Tensor, how: str) -> Tensor:
    """The advantage of each rollout over the others of its prompt, [n].

        grpo     (score - mean) / (standard deviation + 1e-4)     (Shao et al. 2024, section 4.1)
        dr_grpo  score - mean                                     (Liu et al. 2025)
        rloo     score - mean of the group's other scores         (Kool et al. 2019; Ahmadian et al. 2024)

    The standard deviation is divided by the group's size less 1. A rollout that is alone in its group gets 0.

    Args:
        scores: [n].
        groups: int64 [n], equal for the rollouts of a prompt.
    """
    _, index = groups.unique(return_inverse=True)
    sizes = torch.bincount(index).to(scores.dtype)
    means = torch.zeros_like(sizes).index_add_(0, index, scores) / sizes
    centred = scores - means[index]
    centred = torch.where(sizes[index] > 1, centred, 0.0)
    if how == "dr_grpo":
        return centred
    others = (sizes - 1).clamp(min=1)
    if how == "rloo":
        return centred * (sizes / others)[index]
    deviations = (torch.zeros_like(sizes).index_add_(0, index, centred.square()) / others).sqrt()
    return centred / (deviations[index] + GROUP_EPS)


def equal_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Which rollouts belong to a group whose scores are all equal, and which therefore teach nothing, bool [n].

    DAPO (Yu et al. 2025, equation 11) replaces them: dynamic sampling.
    """
    _, index = groups.unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    low = scores.new_full((count,), float("inf")).scatter_reduce_(0, index, scores, "amin")
    high = scores.new_full((count,), float("-inf")).scatter_reduce_(0, index, scores, "amax")
    return (low == high)[index]


def overlong_penalties(lengths: Tensor, room: int, buffer: int, penalty: float) -> Tensor:
    """What a rollout loses for coming near its room, [n], at most 0 (DAPO, Yu et al. 2025, equation 13).

        0 up to room - buffer tokens,   penalty * (room - buffer - length) / buffer behind,   -penalty from `room` on

    Args:
        lengths: drawn tokens, [n].
    """
    return penalty * ((room - buffer - lengths.float()) / buffer).clamp(-1, 0)


def next_coefficient(coefficient: float, found: float, target: float, rollouts: int, horizon: int) -> float:
    """The next factor on the divergence (Ziegler et al. 2019, section 2.2).

        e = clip(found / target - 1, -0.2, 0.2),    coefficient * (1 + e * rollouts / horizon)

    Args:
        found: the mean divergence of a whole rollout, in nats.
        rollouts: that it was measured on.
    """
    error = min(0.2, max(-0.2, found / target - 1))
    return coefficient * (1 + error * rollouts / horizon)


def token_weights(mask: Tensor, mean: Literal["token", "rollout"], room: int | None = None) -> tuple[Tensor, Tensor]:
    """Each token's weight in the loss, and what adds up to the loss's denominator, both [n, t].

    The denominator is one number for the whole batch, over all ranks and micro-batches: how rollouts are dealt to them
    changes nothing.

    Args:
        mean: `token`: the mean over all drawn tokens (Yu et al. 2025, equation 8). `rollout`: the mean over rollouts of the
            mean over their tokens (Shao et al. 2024, equation 3).
        room: with `rollout`, divide each rollout's sum by this number in place of its length (Dr. GRPO, Liu et al. 2025).
    """
    if mean == "token":
        return mask, mask
    first = torch.zeros_like(mask)
    first[:, 0] = mask[:, 0]
    lengths = mask.sum(1, keepdim=True).clamp(min=1) if room is None else float(room)
    return mask / lengths, first
