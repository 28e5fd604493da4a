"""What of an architecture not every family has, and what a config.json says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flagscale_like.arch import SCALING_FIELDS, Experts, ModelArch

# What not every family with experts has.
EXPERT_FEATURES: dict[str, Callable[[Experts], bool]] = {
    "shared experts": lambda experts: experts.shared_ffn_hidden_size > 0,
    "a gate of the shared experts": lambda experts: experts.shared_gate,
    "sigmoid scores": lambda experts: experts.score == "sigmoid",
    "a bias of the router": lambda experts: experts.bias,
    "groups of experts": lambda experts: experts.groups > 1,
    "scaled weights of experts": lambda experts: experts.scale != 1.0,
    "dense layers": lambda experts: bool(experts.dense_layers),
}


def features(arch: ModelArch) -> set[str]:
    """The parts of the architecture that not every family has.

    Returns:
        names of ModelArch's fields that are on, the kind of the position and of its scaling, and `query_groups` where there
        are fewer KV heads than query heads; and those of EXPERT_FEATURES.
    """
    used = {name for name in ("qkv_bias", "norm_head", "tie_embeddings", "latent_attention") if getattr(arch, name)}
    if arch.qk_norm:
        used.add("qk_norm" if arch.qk_norm_over == "head" else "qk_norm over the projection")
    if arch.experts is not None:
        used.add("experts")
        used |= {name for name, is_on in EXPERT_FEATURES.items() if is_on(arch.experts)}
    used.add(arch.position.kind)
    if arch.position.scaling is not None:
        used.add(f"{arch.position.scaling.kind} RoPE scaling")
    if arch.sliding_window is not None:
        used.add("sliding_window")
    if arch.attention == "bidirectional":
        used.add("bidirectional attention")
    if arch.num_query_groups != arch.num_attention_heads:
        used.add("query_groups")
    return used


# The features of a family whose code takes RoPE's parameters from transformers.
SCALINGS = frozenset(f"{kind} RoPE scaling" for kind in SCALING_FIELDS)

# Fields that no config.json has: how weights were drawn, and what the family is called here.
NOT_EXPRESSED = ("family", "init_std", "output_init_std", "norm_init")
# Those of ModelArch.experts: how the load is evened out in training.
EXPERTS_NOT_EXPRESSED = ("balance", "coefficient", "bias_rate", "z_loss")


def expressed(arch: ModelArch) -> dict[str, Any]:
    """What a config.json says of a model: ModelArch's fields that change what it computes.

    Returns:
        values by the name of the field, those of a group under `group.name`.
    """
    values = arch.model_dump(exclude={*NOT_EXPRESSED, "experts"})
    if arch.experts is not None:
        own = arch.experts.model_dump(exclude=set(EXPERTS_NOT_EXPRESSED))
        values |= {f"experts.{name}": value for name, value in own.items()}
        if not arch.experts.dense_layers:
            del values["ffn_hidden_size"]  # of dense layers, of which there are none
    return values
