"""The losses of pairs: equal to trl's on the same numbers, and to the papers' formulas where trl has none."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flagscale_like.config import DirectPreference, RewardModel
from flagscale_like.data.batch import Batch
from flagscale_like.objectives.preference import AnswerLogProbabilities, Preference
from flagscale_like.objectives.reward import Reward

TRL = json.loads((Path(__file__).parent / "trl_losses.json").read_text())  # written by benchmarks/trl_losses.py
INPUTS = {name: torch.tensor(value) for name, value in TRL["inputs"].items()}
PAIRS, LENGTH = len(INPUTS["margins"]), INPUTS["tokens"].shape[1]


def documents(values):
    """trl's order, all chosen and then all rejected, as ours: chosen and rejected of each pair."""
    return torch.stack(values.chunk(2), dim=1).flatten(0, 1)


def batch(mask, *, weights=None, padding=0):
    """One row of all pairs, with `padding` tokens behind the last; the mask is of [2 p] documents of LENGTH tokens."""
    bounds = torch.arange(0, mask.numel() + 1, LENGTH, dtype=torch.int32)
    bounds[-1] += padding
    tokens = torch.zeros(1, mask.numel() + padding, dtype=torch.int64)
    extras = {
        "weights": torch.ones(PAIRS) if weights is None else torch.tensor(weights),
        "margins": INPUTS["margins"],
        "references": (documents(INPUTS["reference"]) * mask).sum(-1),
    }
    row = F.pad(mask.flatten(), (0, padding))[None]
    lengths = torch.full((len(mask),), LENGTH)
    return Batch(tokens=tokens, labels=tokens, loss_mask=row, documents=bounds, lengths=lengths, extras=extras)


def evaluate(options, *, weights=None, padding=0):
    """(mean loss, its gradient by each token's log-probability in trl's order, sums as means, samples)."""
    logs = documents(INPUTS["tokens"]).requires_grad_()
    found = batch(documents(INPUTS["mask"]), weights=weights, padding=padding)
    output = F.pad(-logs.flatten(), (0, padding), value=9.0)[None]  # what lies in the padding counts nowhere
    loss = Preference(options).loss(output, found)
    (loss.total / loss.count).backward()
    gradient = torch.cat(logs.grad.view(PAIRS, 2, LENGTH).unbind(1))
    means = {name: (value / loss.count).item() for name, value in loss.sums.items()}
    return (loss.total / loss.count).item(), gradient, means, loss.samples


def dpo(**options):
    return DirectPreference(kind="dpo", beta=TRL["beta"], **options)


TRL_DPO = {
    "sigmoid": dpo(),
    "hinge": dpo(loss="hinge"),
    "ipo": dpo(loss="ipo", by_length=True),
    "sigmoid by length": dpo(by_length=True),
    "cdpo": dpo(label_smoothing=0.2),
}


@pytest.mark.parametrize("name", TRL_DPO)
def test_a_preference_loss_and_its_gradient_are_trls(name):
    loss, gradient, _, _ = evaluate(TRL_DPO[name], padding=5)
    assert loss == pytest.approx(TRL["losses"][name]["loss"], rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor(TRL["losses"][name]["gradient"]), rtol=1e-4, atol=1e-6)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_ratios(by_length=False, reference=True):
    """[(chosen, rejected)] of every pair, and the chosen answers' mean log-probability, in plain Python."""
    sides = []
    for tokens, before, mask in zip(*(INPUTS[name].tolist() for name in ("tokens", "reference", "mask")), strict=True):
        own = sum(t * m for t, m in zip(tokens, mask, strict=True))
        ratio = own - sum(r * m for r, m in zip(before, mask, strict=True)) if reference else own
        sides.append((ratio / sum(mask) if by_length else ratio, own / sum(mask)))
    return [(sides[i][0], sides[i + PAIRS][0], sides[i][1]) for i in range(PAIRS)]


def test_simpo_is_the_papers_formula():
    """Meng et al. 2024, equation 6: -log sigmoid(beta / |y+| log pi(y+) - beta / |y-| log pi(y-) - gamma)."""
    loss, _, means, _ = evaluate(dpo(reference="none", by_length=True, margin=0.7))
    pairs = log_ratios(by_length=True, reference=False)
    expected = [-math.log(sigmoid(TRL["beta"] * (chosen - rejected) - 0.7)) for chosen, rejected, _ in pairs]
    assert loss == pytest.approx(sum(expected) / PAIRS, rel=1e-5)
    assert means["rewards/chosen"] == pytest.approx(TRL["beta"] * sum(c for c, _, _ in pairs) / PAIRS, rel=1e-5)


def test_dpo_with_an_offset_and_the_sft_term_is_the_papers_formula():
    """Amini et al. 2024, equation 4, with alpha * margin; Pang et al. 2024, equation 1: alpha / |y+| times the NLL of y+."""
    loss, _, _, _ = evaluate(dpo(pair_margin=1.5, sft=0.4))
    expected = [
        -math.log(sigmoid(TRL["beta"] * (chosen - rejected) - 1.5 * margin)) - 0.4 * mean
        for (chosen, rejected, mean), margin in zip(log_ratios(), INPUTS["margins"].tolist(), strict=True)
    ]
    assert loss == pytest.approx(sum(expected) / PAIRS, rel=1e-5)


def test_what_is_reported_of_pairs():
    loss, _, means, samples = evaluate(dpo())
    pairs = [(TRL["beta"] * chosen, TRL["beta"] * rejected) for chosen, rejected, _ in log_ratios()]
    assert means["rewards/accuracy"] == pytest.approx(sum(c > r for c, r in pairs) / PAIRS)
    assert means["rewards/margin"] == pytest.approx(sum(c - r for c, r in pairs) / PAIRS, rel=1e-4)
    assert means["rewards/rejected"] == pytest.approx(sum(r for _, r in pairs) / PAIRS, rel=1e-4)
    mask, tokens = INPUTS["mask"], INPUTS["tokens"]
    assert means["log-probability/chosen"] == pytest.approx((tokens * mask)[:PAIRS].sum().item() / PAIRS, rel=1e-5)
    assert samples["tokens"].tolist() == [PAIRS]
    assert samples["loss"].item() / PAIRS == pytest.approx(loss, rel=1e-6)


def test_the_weight_of_a_pair_is_a_factor_on_its_loss():
    alone = [evaluate(dpo(), weights=[float(i == j) for j in range(PAIRS)])[0] for i in range(PAIRS)]
    loss, _, means, _ = evaluate(dpo(), weights=[2.0, 0.0, 1.0])
    assert loss == pytest.approx(2 * alone[0] + alone[2], rel=1e-6)
    assert means == evaluate(dpo())[2]  # they are of the pairs as they are


def test_the_reference_is_asked_for_each_answers_log_probability():
    found = batch(documents(INPUTS["mask"]))
    loss = AnswerLogProbabilities().loss(-documents(INPUTS["reference"]).flatten()[None], found)
    torch.testing.assert_close(loss.samples["log-probability"], found.extras["references"])
    assert loss.count == 2 * PAIRS


def reward(options, rewards, *, padding=0):
    """(mean loss, its gradient by the rewards, sums as means): rewards [2 p, k] in trl's order, elsewhere nan."""
    rewards = rewards.clone().requires_grad_()
    k = rewards.shape[-1]
    output = torch.full((2 * PAIRS, LENGTH, k), math.nan)
    output = torch.cat([output[:, 1:], documents(rewards)[:, None]], dim=1).view(1, -1, k)
    output = F.pad(output, (0, 0, 0, padding), value=math.nan)
    loss = Reward(options).loss(output.squeeze(-1) if k == 1 else output, batch(INPUTS["mask"], padding=padding))
    (loss.total / loss.count).backward()
    return (loss.total / loss.count).item(), rewards.grad, {n: (v / loss.count).item() for n, v in loss.sums.items()}


TRL_REWARDS = {
    "reward": RewardModel(kind="reward", margin=0.0),
    "reward with margins": RewardModel(kind="reward"),
    "reward, centred": RewardModel(kind="reward", center=0.1),
}


@pytest.mark.parametrize("name", TRL_REWARDS)
def test_a_reward_loss_and_its_gradient_are_trls(name):
    loss, gradient, means = reward(TRL_REWARDS[name], INPUTS["rewards"][:, None], padding=3)
    assert loss == pytest.approx(TRL["losses"][name]["loss"], rel=1e-5)
    torch.testing.assert_close(gradient[:, 0], torch.tensor(TRL["losses"][name]["gradient"]), rtol=1e-4, atol=1e-6)
    chosen, rejected = INPUTS["rewards"].chunk(2)
    assert means["rewards/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())


def test_heads_have_the_mean_of_their_losses_and_report_how_much_they_disagree():
    options = RewardModel(kind="reward", heads=3, center=0.1)
    rewards = torch.stack([INPUTS["rewards"], 2 * INPUTS["rewards"], -INPUTS["rewards"]], dim=-1)
    loss, gradient, means = reward(options, rewards)
    alone = [reward(TRL_REWARDS["reward, centred"], rewards[:, i : i + 1]) for i in range(3)]
    assert loss == pytest.approx(sum(one[0] for one in alone) / 3, rel=1e-5)
    torch.testing.assert_close(gradient, torch.cat([one[1] for one in alone], dim=1) / 3)
    assert means["rewards/disagreement"] == pytest.approx(rewards.std(-1, correction=0).mean().item(), rel=1e-5)
    assert means["rewards/margin"] == pytest.approx(sum(one[2]["rewards/margin"] for one in alone) / 3, rel=1e-5)
