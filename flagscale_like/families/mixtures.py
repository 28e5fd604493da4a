"""Mixtral, Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B), Qwen3-MoE and OLMoE: experts in the place of the FFNs."""

from __future__ import annotations

from typing import Any

from flagscale_like.arch import ModelArch
from flagscale_like.families.family import Family
from flagscale_like.families.features import SCALINGS
from flagscale_like.families.rules import ExpertNames
from flagscale_like.families.settings import Settings, common_config, rope_config

MOST_LAYERS = 10_000


def auxiliary_loss(settings: Settings, default: float) -> dict[str, Any]:
    """How the published code evens out the load: Experts' fields."""
    coefficient = settings.number("router_aux_loss_coef", float, default, zero=True)
    return {"balance": "batch" if coefficient else "none", "coefficient": coefficient}


def layer_count(settings: Settings) -> int:
    """Layers, of a number that a list of them can have.

    Raises:
        ConversionError: there are more.
    """
    layers = settings.number("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise settings.fail(f"num_hidden_layers is {layers}, must be at most {MOST_LAYERS}")
    return layers


def written_loss(arch: ModelArch) -> float:
    """router_aux_loss_coef of a config.json."""
    experts = arch.required_experts
    return experts.coefficient if experts.balances else 0.0


def _read_mixtral(settings: Settings) -> ModelArch:
    settings.require("router_jitter_noise", 0)
    window = settings.number("sliding_window") if settings.get("sliding_window") is not None else None
    experts = {
        "count": settings.number("num_local_experts", default=8),
        "top_k": settings.number("num_experts_per_tok", default=2),
        "ffn_hidden_size": settings.number("intermediate_size"),
        **auxiliary_loss(settings, 0.001),
    }
    return settings.arch("mixtral", position=settings.rope(base=1e6), sliding_window=window, experts=experts)


def _write_mixtral(arch: ModelArch) -> dict[str, Any]:
    return {
        **common_config(arch),
        **rope_config(arch),
        "intermediate_size": arch.required_experts.ffn_hidden_size,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "sliding_window": arch.sliding_window,
        "num_local_experts": arch.required_experts.count,
        "num_experts_per_tok": arch.required_experts.top_k,
        "router_aux_loss_coef": written_loss(arch),
    }


def _qwen_experts(settings: Settings, count: int, top_k: int, size: int) -> dict[str, Any]:
    """Experts' fields. The numbers are transformers' defaults."""
    layers, step = layer_count(settings), settings.number("decoder_sparse_step", default=1)
    listed = settings.get("mlp_only_layers", [])
    if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
        raise settings.fail(f"mlp_only_layers is {listed!r}, must be a list of layers")
    # num_experts, or num_local_experts, as transformers 5 writes it for Qwen3-MoE
    given = "num_experts" if settings.get("num_experts") is not None else "num_local_experts"
    return {
        "count": settings.number(given, default=count),
        "top_k": settings.number("num_experts_per_tok", default=top_k),
        "ffn_hidden_size": settings.number("moe_intermediate_size", default=size),
        "normalize": bool(settings.get("norm_topk_prob", False)),
        "dense_layers": [i for i in range(layers) if i in listed or (i + 1) % step],
        **auxiliary_loss(settings, 0.001),
    }


def _write_qwen(arch: ModelArch) -> dict[str, Any]:
    experts = arch.required_experts
    return {
        **common_config(arch),
        **rope_config(arch),
        "num_key_value_heads": arch.num_query_groups,
        "use_sliding_window": False,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "norm_topk_prob": experts.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
        "router_aux_loss_coef": written_loss(arch),
    }


def _read_qwen2_moe(settings: Settings) -> ModelArch:
    settings.require("use_sliding_window", False)
    settings.require("qkv_bias", True)
    experts = _qwen_experts(settings, 60, 4, 1408)
    experts["shared_ffn_hidden_size"] = settings.number("shared_expert_intermediate_size", default=5632)
    return settings.arch("qwen2_moe", position=settings.rope(), qkv_bias=True, experts={**experts, "shared_gate": True})


def _write_qwen2_moe(arch: ModelArch) -> dict[str, Any]:
    return {**_write_qwen(arch), "shared_expert_intermediate_size": arch.required_experts.shared_ffn_hidden_size}


def _read_qwen3_moe(settings: Settings) -> ModelArch:
    settings.require("use_sliding_window", False)
    settings.require("attention_bias", False)
    experts = _qwen_experts(settings, 128, 8, 768)
    return settings.arch("qwen3_moe", position=settings.rope(), qk_norm=True, experts=experts)


def _write_qwen3_moe(arch: ModelArch) -> dict[str, Any]:
    return {**_write_qwen(arch), "head_dim": arch.head_dim, "attention_bias": False}


def _read_olmoe(settings: Settings) -> ModelArch:
    settings.require("attention_bias", False)
    settings.require("clip_qkv")
    experts = {
        "count": settings.number("num_experts", default=64),
        "top_k": settings.number("num_experts_per_tok", default=8),
        "ffn_hidden_size": settings.number("intermediate_size"),
        "normalize": bool(settings.get("norm_topk_prob", False)),
        **auxiliary_loss(settings, 0.01),
    }
    return settings.arch("olmoe", position=settings.rope(), qk_norm=True, qk_norm_over="projection", experts=experts)


def _write_olmoe(arch: ModelArch) -> dict[str, Any]:
    return {
        **common_config(arch),
        **rope_config(arch),
        "intermediate_size": arch.required_experts.ffn_hidden_size,
        "num_key_value_heads": arch.num_query_groups,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": arch.required_experts.count,
        "num_experts_per_tok": arch.required_experts.top_k,
        "norm_topk_prob": arch.required_experts.normalize,
        "router_aux_loss_coef": written_loss(arch),
    }


_COMMON = frozenset({"rope", "query_groups", "tie_embeddings", "experts"}) | SCALINGS
_SHARED = frozenset({"shared experts", "a gate of the shared experts"})

MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    classifier="MixtralForSequenceClassification",
    supports=_COMMON | {"sliding_window"},
    needs=frozenset({"experts"}),
    read=_read_mixtral,
    write=_write_mixtral,
    experts=ExpertNames(block="block_sparse_moe", gate_up_down=("w1", "w3", "w2")),
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    classifier="Qwen2MoeForSequenceClassification",
    supports=_COMMON | _SHARED | {"qkv_bias", "dense layers"},
    needs=_SHARED | {"experts", "qkv_bias"},
    read=_read_qwen2_moe,
    write=_write_qwen2_moe,
    experts=ExpertNames(shared="shared_expert"),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    classifier="Qwen3MoeForSequenceClassification",
    supports=_COMMON | {"qk_norm", "dense layers"},
    needs=frozenset({"experts", "qk_norm"}),
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    experts=ExpertNames(),
)

OLMOE = Family(
    name="olmoe",
    model_type="olmoe",
    architectures=("OlmoeForCausalLM",),
    supports=_COMMON | {"qk_norm over the projection"},
    needs=frozenset({"experts", "qk_norm over the projection"}),
    read=_read_olmoe,
    write=_write_olmoe,
    experts=ExpertNames(),
)
