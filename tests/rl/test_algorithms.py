"""Advantages and losses of rollouts: equal to trl's on the same numbers, and to the formulas written out token by token."""

import json
import math
from pathlib import Path

import pytest
import torch

from flagscale_like.config import Clip
from flagscale_like.objectives.policy import divergence, policy_losses, truncated_weights
from flagscale_like.objectives.value import value_losses
from flagscale_like.rl.algorithms import (
    equal_groups,
    generalized_advantages,
    group_advantages,
    next_coefficient,
    overlong_penalties,
    returns_to_go,
    token_rewards,
    token_weights,
    whiten,
)

RECORD = json.loads(
    (Path(__file__).parent / "trl_algorithms.json").read_text()
)  # written by benchmarks/trl_algorithms.py
TRL, SETTINGS, GROUP = RECORD["trl's"], RECORD["settings"], RECORD["group"]
X = {name: torch.tensor(value) for name, value in RECORD["inputs"].items()}
MASK = X["mask"]
GROUPS = torch.arange(len(MASK)) // GROUP
CLIP = Clip(low=SETTINGS["low"], high=SETTINGS["high"])


def close(found, wanted):
    torch.testing.assert_close(found.detach(), torch.as_tensor(wanted), rtol=1e-5, atol=1e-6)


def advantages():
    gae = generalized_advantages(X["rewards"] * MASK, X["values"], MASK, SETTINGS["gamma"], SETTINGS["lambda"])
    return gae, whiten(gae, MASK)


def test_ppo_is_trls():
    gae, white = advantages()
    close(gae, TRL["ppo"]["gae"])
    close(white, TRL["ppo"]["white"])
    new, now = X["new"].clone().requires_grad_(), X["values now"].clone().requires_grad_()
    values = X["values"] * MASK
    policy, _ = policy_losses(new, X["old"], white, Clip(low=SETTINGS["low"], high=SETTINGS["low"]))
    value, _ = value_losses(now, values, gae + values, SETTINGS["value"])
    means = [(losses * MASK).sum() / MASK.sum() for losses in (policy, value)]
    sum(means).backward()
    for name, mean, by in (("policy", means[0], new), ("value", means[1], now)):
        close(mean, TRL["ppo"][name])
        close(by.grad, TRL["ppo"][f"{name} gradient"])
    for kind in ("k1", "k3"):
        close(divergence(X["old"], X["reference"], kind), TRL["ppo"][kind])


@pytest.mark.parametrize("how", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_are_trls(how):
    close(group_advantages(X["scores"], GROUPS, how), TRL[how])
    order = torch.tensor([5, 0, 6, 1, 2, 7, 4, 3])  # a group's rollouts need not lie together
    close(group_advantages(X["scores"][order], GROUPS[order], how), torch.tensor(TRL[how])[order])


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "dual"])
def test_a_group_loss_and_its_gradient_are_trls(name):
    mean, room = ("rollout", MASK.shape[1]) if name == "dr_grpo" else ("rollout" if name == "grpo" else "token", None)
    clip = CLIP.model_copy(update={"dual": SETTINGS["dual"] if name == "dual" else None})
    new = X["new"].clone().requires_grad_()
    losses, _ = policy_losses(new, X["old"], X["advantages"][:, None].expand_as(MASK), clip)
    losses = losses + (0.0 if name == "dual" else 0.04) * divergence(new, X["reference"], "k3")
    weights, counts = token_weights(MASK, mean, room)
    loss = (losses * weights).sum() / counts.sum()
    loss.backward()
    close(loss, TRL["losses"][name]["loss"])
    close(new.grad, TRL["losses"][name]["gradient"])


def test_advantages_are_the_literal_sums():
    """Equations (16) and (2) as they are printed, one token at a time."""
    gamma, lam = 0.9, 0.7
    rewards, values = token_rewards(X["scores"], 0.1 * X["rewards"], MASK), X["values"]
    found = generalized_advantages(rewards, values, MASK, gamma, lam)
    to_go = returns_to_go(rewards, MASK, gamma)
    for i, row in enumerate(MASK):
        n = int(row.sum())
        r = [-0.1 * float(X["rewards"][i, t]) + (float(X["scores"][i]) if t == n - 1 else 0.0) for t in range(n)]
        v = [float(value) for value in values[i, :n]] + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            literal = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert float(found[i, t]) == pytest.approx(literal, abs=1e-5)
            assert float(to_go[i, t]) == pytest.approx(sum(gamma**k * r[t + k] for k in range(n - t)), abs=1e-5)
        assert not found[i, n:].any()
        assert not to_go[i, n:].any()
    white = whiten(found, MASK)[MASK.bool()]
    assert float(white.mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.var()) == pytest.approx(1, abs=1e-5)


def test_losses_are_the_literal_formulas():
    """PPO's equation (7), the dual clip's (6), and the value loss, one token at a time."""
    clip = Clip(low=0.1, high=0.3, dual=1.4)
    losses, decided = policy_losses(X["new"], X["old"], X["advantages"][:, None].expand_as(MASK), clip)
    values, bounded = value_losses(X["values now"], X["values"], X["rewards"], 0.2)
    for i in range(len(MASK)):
        for t in range(MASK.shape[1]):
            r, a = math.exp(float(X["new"][i, t] - X["old"][i, t])), float(X["advantages"][i])
            gain = min(r * a, min(max(r, 0.9), 1.3) * a)
            gain = max(gain, 1.4 * a) if a < 0 else gain
            assert float(losses[i, t]) == pytest.approx(-gain, abs=1e-5)
            assert bool(decided[i, t]) == (not math.isclose(gain, r * a, rel_tol=1e-5))
            v, old, target = (float(X[name][i, t]) for name in ("values now", "values", "rewards"))
            near = old + min(max(v - old, -0.2), 0.2)
            literal = 0.5 * max((v - target) ** 2, (near - target) ** 2)
            assert float(values[i, t]) == pytest.approx(literal, abs=1e-5)
            assert bool(bounded[i, t]) == ((near - target) ** 2 > (v - target) ** 2)
    close(
        value_losses(X["values now"], X["values"], X["rewards"], None)[0], 0.5 * (X["values now"] - X["rewards"]) ** 2
    )
    weights = truncated_weights(X["old"], X["new"], 1.2)
    literal = [min(math.exp(a - b), 1.2) for a, b in zip(X["old"].flatten(), X["new"].flatten(), strict=True)]
    close(weights.flatten(), torch.tensor(literal))


def test_groups_of_any_size_and_what_teaches_nothing():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 7.0, 7.0, 7.0])
    groups = torch.tensor([4, 4, 9, 9, 2, 0, 0, 0])
    assert equal_groups(scores, groups).tolist() == [False, False, True, True, True, True, True, True]
    assert group_advantages(scores, groups, "rloo").tolist() == [-2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    root = math.sqrt(2)
    wanted = [-1 / (root + 1e-4), 1 / (root + 1e-4)]
    assert group_advantages(scores, groups, "grpo")[:2].tolist() == pytest.approx(wanted, rel=1e-5)
    assert not group_advantages(torch.empty(0), torch.empty(0, dtype=torch.long), "grpo").numel()
    assert not equal_groups(torch.empty(0), torch.empty(0, dtype=torch.long)).numel()


def test_overlong_shaping_and_the_controller():
    lengths = torch.tensor([3, 6, 7, 9, 10, 12])
    assert overlong_penalties(lengths, 10, 4, 2.0).tolist() == [0, 0, -0.5, -1.5, -2, -2]
    assert next_coefficient(0.1, 12.0, 6.0, 64, 1280) == pytest.approx(0.1 * (1 + 0.2 * 0.05))
    assert next_coefficient(0.1, 5.4, 6.0, 64, 1280) == pytest.approx(0.1 * (1 - 0.1 * 0.05))
    assert next_coefficient(0.1, -9.0, 6.0, 64, 1280) == pytest.approx(0.1 * (1 - 0.2 * 0.05))


def test_an_empty_rollout_breaks_nothing():
    mask = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    rewards = token_rewards(torch.tensor([5.0, 3.0]), torch.zeros(2, 2), mask)
    assert rewards.tolist() == [[0, 0], [3, 0]]
    assert whiten(rewards, mask).tolist() == [[0, 0], [0, 0]]
    for mean in ("token", "rollout"):
        weights, counts = token_weights(mask, mean)
        assert (float(weights.sum()), float(counts.sum())) == (1, 1)
