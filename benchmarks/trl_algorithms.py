"""Ask trl for advantages and losses of some rollouts, and write what it answers to tests/rl/trl_algorithms.json.

The tests compare with that file, so that they need no trl. trl computes most of this inside its trainers' long methods: their
own lines are taken out of the installed source and run on our inputs. 1.12.0 is the last version with a PPO trainer:
    pip install trl==1.12.0
    python benchmarks/trl_algorithms.py
"""

import importlib.metadata
import inspect
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl.experimental.ppo.ppo_trainer import PPOTrainer, masked_mean, masked_whiten
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import nanstd

OUT = Path(__file__).parents[1] / "tests" / "rl" / "trl_algorithms.json"
ROLLOUTS, TOKENS, GROUP = 8, 7, 4
GAMMA, LAMBDA, LOW, HIGH, DUAL, VALUE_CLIP = 0.98, 0.9, 0.2, 0.28, 1.5, 0.2


def lines(function, first, last):
    """The lines of a function's source from the one that begins with `first` to the one that begins with `last`."""
    source = inspect.getsource(function).splitlines()
    starts = [number for number, line in enumerate(source) if line.strip().startswith(first)]
    stop = next(number for number in range(starts[0], len(source)) if source[number].strip().startswith(last))
    return textwrap.dedent("\n".join(source[starts[0] : stop + 1]))


def run(function, first, last, **names):
    """The names after these lines ran."""
    exec(lines(function, first, last), names)
    return names


def ppo(x):
    mask = x["mask"].bool()
    args = SimpleNamespace(gamma=GAMMA, lam=LAMBDA, cliprange=LOW, cliprange_value=VALUE_CLIP)
    values, rewards = x["values"] * x["mask"], x["rewards"] * x["mask"]
    names = {"args": args, "torch": torch, "masked_whiten": masked_whiten, "masked_mean": masked_mean}
    found = run(
        PPOTrainer.train,
        "lastgaelam = 0",
        "returns = advantages + values",
        **names,
        responses=x["mask"],
        values=values,
        rewards=rewards,
    )
    gae = found["advantages"] * x["mask"]
    white = masked_whiten(gae, mask) * x["mask"]
    new, now = x["new"].clone().requires_grad_(), x["values now"].clone().requires_grad_()
    micro = {
        "micro_batch_inds": slice(None),
        "padding_mask": ~mask,
        "padding_mask_p1": ~mask,
        "vpred": now,
        "mb_values": values,
        "mb_return": (gae + values).detach(),
        "new_logprobs": new,
        "mb_logprobs": x["old"],
        "mb_advantage": white.detach(),
    }
    found = run(PPOTrainer.train, "vpredclipped = torch.clamp(", "pg_loss = masked_mean", **names, **micro)
    (found["pg_loss"] + found["vf_loss"]).backward()
    kinds = {}
    for kind in ("k1", "k3"):
        names = {"args": SimpleNamespace(kl_estimator=kind), "logprobs": x["old"], "ref_logprobs": x["reference"]}
        kinds[kind] = run(PPOTrainer.train, "logr = ref_logprobs", "kl = ", **names)["kl"]
    return {
        "gae": gae,
        "white": white,
        "policy": found["pg_loss"],
        "policy gradient": new.grad,
        "value": found["vf_loss"],
        "value gradient": now.grad,
        **kinds,
    }


def grpo_advantages(x, scale):
    """Of GRPO, or of Dr. GRPO where `scale` is none."""
    trainer = SimpleNamespace(scale_rewards=scale)
    source = "mean_grouped_rewards = torch.nanmean"
    names = {"rewards": x["scores"], "num_generations": GROUP, "self": trainer, "torch": torch, "nanstd": nanstd}
    return run(GRPOTrainer._generate_and_score_completions, source, "advantages = advantages / (std", **names)[
        "advantages"
    ]


def rloo_advantages(x):
    names = {"rewards": x["scores"], "num_generations": GROUP, "torch": torch, "nanstd": nanstd}
    return run(RLOOTrainer._generate_and_score_completions, "grouped_", "advantages = rewards - base", **names)[
        "advantages"
    ]


def grpo_loss(x, kind, beta, delta=None):
    """The loss and its gradient by each token's log-probability."""
    new = x["new"].clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        loss_type=kind,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=TOKENS,
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda v: v, reduce=lambda v, reduction: v),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(ROLLOUTS, 2, dtype=torch.long),
        "prompt_mask": torch.ones(ROLLOUTS, 2, dtype=torch.long),
        "completion_ids": torch.zeros(ROLLOUTS, TOKENS, dtype=torch.long),
        "completion_mask": x["mask"],
        "advantages": x["advantages"],
        "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["reference"],
        "num_items_in_batch": x["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return {"loss": loss.detach(), "gradient": new.grad}


def plain(value):
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def main():
    g = torch.Generator().manual_seed(3)
    shape = (ROLLOUTS, TOKENS)
    lengths = torch.tensor([7, 3, 1, 5, 7, 2, 6, 4])
    x = {
        "mask": (torch.arange(TOKENS) < lengths[:, None]).float(),
        "old": -torch.rand(shape, generator=g) * 3,
        "rewards": torch.randn(shape, generator=g),
        "values": torch.randn(shape, generator=g),
        "values now": torch.randn(shape, generator=g),
        "scores": torch.randn(ROLLOUTS, generator=g),
        "advantages": torch.randn(ROLLOUTS, generator=g),
    }
    x["new"] = x["old"] + 0.5 * torch.randn(shape, generator=g)
    x["reference"] = x["old"] + 0.3 * torch.randn(shape, generator=g)
    asked = {"ppo": ppo(x), "grpo": grpo_advantages(x, "group"), "dr_grpo": grpo_advantages(x, "none")}
    asked["rloo"] = rloo_advantages(x)
    asked["losses"] = {kind: grpo_loss(x, kind, 0.04) for kind in ("grpo", "dapo", "dr_grpo")}
    asked["losses"]["dual"] = grpo_loss(x, "dapo", 0.0, DUAL)
    settings = {"gamma": GAMMA, "lambda": LAMBDA, "low": LOW, "high": HIGH, "dual": DUAL, "value": VALUE_CLIP}
    found = {
        "trl": importlib.metadata.version("trl"),
        "group": GROUP,
        "settings": settings,
        "inputs": x,
        "trl's": asked,
    }
    OUT.write_text(json.dumps(plain(found)) + "\n")


if __name__ == "__main__":
    main()
