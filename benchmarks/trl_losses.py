"""Ask trl for the losses of some pairs, and write what it answers to tests/objectives/trl_losses.json.

The tests compare with that file, so that they need no trl. Install it where this is run: pip install trl==1.16.0
    python benchmarks/trl_losses.py
"""

import importlib.metadata
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

OUT = Path(__file__).parents[1] / "tests" / "objectives" / "trl_losses.json"
PAIRS, LENGTH, BETA = 3, 7, 0.3
DPO = {
    "sigmoid": ("sigmoid", 0.0),
    "hinge": ("hinge", 0.0),
    "ipo": ("ipo", 0.0),
    "sigmoid by length": ("sigmoid_norm", 0.0),
    "cdpo": ("aot", 0.2),  # of one pair at a time, there is nothing to sort: it is cDPO's formula
}


def stub(**more):
    """What the trainers' loss functions read of a trainer."""
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x}
    own = {
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(device="cpu", **same),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**own | more)


def dpo(kind, smoothing, tokens, reference, mask):
    """trl's mean loss and its gradient by each token's log-probability; [2 p, s] of all chosen, then all rejected."""
    tokens = tokens.clone().requires_grad_()
    like = {name: torch.zeros_like(tokens) for name in ("entropy", "mean_logits", "is_top1")}
    like["is_top1"] = like["is_top1"].bool()
    trainer = stub(
        ld_alpha=None,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    half = len(tokens) // 2
    sums = (reference * mask).sum(-1)
    inputs = {
        "input_ids": torch.zeros(len(tokens), LENGTH + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(tokens), LENGTH + 1),
        "completion_mask": torch.cat([torch.zeros(len(tokens), 1), mask], -1),
        "ref_chosen_logps": sums[:half],
        "ref_rejected_logps": sums[half:],
    }
    loss = DPOTrainer._compute_loss(
        trainer, lambda **_: SimpleNamespace(log_probs=tokens * mask, **like), inputs, False
    )
    loss.backward()
    return {"loss": loss.item(), "gradient": tokens.grad.tolist()}


def dpo_one_by_one(kind, smoothing, tokens, reference, mask):
    """The mean of the pairs' losses, each computed alone."""
    half = len(tokens) // 2
    found = [dpo(kind, smoothing, tokens[i::half], reference[i::half], mask[i::half]) for i in range(half)]
    gradient = torch.zeros_like(tokens)
    for i, one in enumerate(found):
        gradient[i::half] = torch.tensor(one["gradient"]) / half
    return {"loss": sum(one["loss"] for one in found) / half, "gradient": gradient.tolist()}


def reward(rewards, margins, center):
    """trl's mean loss and its gradient by the rewards, [2 p] of all chosen, then all rejected."""
    rewards = rewards.clone().requires_grad_()
    trainer = stub(args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {"attention_mask": torch.ones(len(rewards), LENGTH)} | ({"margin": margins} if margins is not None else {})

    def model(**_):
        return SimpleNamespace(logits=rewards[:, None])

    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": rewards.grad.tolist()}


def main():
    generator = torch.Generator().manual_seed(1)
    tokens, reference = (-3 * torch.rand(2 * PAIRS, LENGTH, generator=generator) for _ in range(2))
    mask = (torch.rand(2 * PAIRS, LENGTH, generator=generator) < 0.6).float()
    rewards, margins = torch.randn(2 * PAIRS, generator=generator), torch.rand(PAIRS, generator=generator)
    inputs = {"tokens": tokens, "reference": reference, "mask": mask, "rewards": rewards, "margins": margins}
    losses = {name: dpo_one_by_one(*kind, tokens, reference, mask) for name, kind in DPO.items()}
    cases = {"reward": (None, None), "reward with margins": (margins, None), "reward, centred": (margins, 0.1)}
    losses |= {name: reward(rewards, *case) for name, case in cases.items()}
    found = {
        "trl": importlib.metadata.version("trl"),
        "beta": BETA,
        "inputs": {name: value.tolist() for name, value in inputs.items()},
        "losses": losses,
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {OUT}: " + ", ".join(f"{name} {value['loss']:.4f}" for name, value in losses.items()))


if __name__ == "__main__":
    main()
