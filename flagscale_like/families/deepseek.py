"""DeepSeek-V2 (V2-Lite) and DeepSeek-V3 (R1): multi-head latent attention, and experts beside shared ones.

V2 scores experts by softmax, V3 by sigmoid with a bias that training sets. The layers for multi-token prediction, which V3's
folders hold behind the decoder's, are left out.
"""

from __future__ import annotations

from typing import Any

from flagscale_like.arch import ModelArch
from flagscale_like.families.family import Family
from flagscale_like.families.features import SCALINGS
from flagscale_like.families.mixtures import layer_count
from flagscale_like.families.rules import ExpertNames
from flagscale_like.families.settings import Settings, common_config, rope_config

EPSILON = 1e-6  # of the norms of the latent vectors in transformers, whatever rms_norm_eps is


def _latent(settings: Settings) -> dict[str, Any]:
    settings.require("attention_bias", False)
    for key in ("rope_scaling", "rope_parameters"):
        scaling = settings.get(key, {})
        kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
        if kind not in (None, "default", "yarn") and scaling.get("mscale_all_dim"):
            raise settings.fail(f"{key} of type {kind!r} has mscale_all_dim, supported: with type yarn")
    if settings.number("rms_norm_eps", float, EPSILON) != EPSILON:
        raise settings.fail(
            f"rms_norm_eps is {settings.get('rms_norm_eps')!r}, supported: {EPSILON}, which transformers gives the norms of "
            "the latent vectors whatever it is"
        )
    heads, groups = settings.number("num_attention_heads"), settings.get("num_key_value_heads")
    if groups not in (None, heads):
        raise settings.fail(f"num_key_value_heads is {groups!r}, must be num_attention_heads ({heads})")
    # A missing rank is transformers' default; null is none.
    rank = settings.values.get("q_lora_rank", 1536)
    rank = rank if rank is None else settings.number("q_lora_rank", default=1536)
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {"q_lora_rank": rank, **{name: settings.number(name) for name in names}}


def _experts(settings: Settings, *, shared: int, dense: int, scale: float) -> dict[str, Any]:
    """Experts' fields that both versions read alike. The numbers are transformers' defaults."""
    settings.require("moe_layer_freq", 1)
    settings.require("ep_size", 1)
    size, shared = (
        settings.number("moe_intermediate_size"),
        settings.number("n_shared_experts", default=shared, zero=True),
    )
    coefficient = settings.number("aux_loss_alpha", float, 0.001, zero=True)
    dense = settings.number("first_k_dense_replace", default=dense, zero=True)
    return {
        "count": settings.number("n_routed_experts"),
        "top_k": settings.number("num_experts_per_tok"),
        "ffn_hidden_size": size,
        "shared_ffn_hidden_size": shared * size,
        "scale": settings.number("routed_scaling_factor", float, scale),
        "dense_layers": list(range(min(dense, layer_count(settings)))),
        "balance": ("sequence" if settings.get("seq_aux", True) else "batch") if coefficient else "none",
        "coefficient": coefficient,
    }


def _read_v2(settings: Settings) -> ModelArch:
    settings.require("topk_method", "greedy", "group_limited_greedy")
    settings.require("scoring_func", "softmax")
    settings.require("norm_topk_prob", False)
    settings.require("mlp_bias", False)
    experts = {**_experts(settings, shared=2, dense=0, scale=1.0), "score": "softmax", "normalize": False}
    if settings.get("topk_method", "greedy") != "greedy" and settings.number("n_group", default=1) > 1:
        experts |= {"groups": settings.number("n_group"), "top_groups": settings.number("topk_group")}
        experts["group_score"] = "max"
    return settings.arch(
        "deepseek_v2", position=settings.rope(), latent_attention=_latent(settings), experts=experts, head_dim=0
    )


def _read_v3(settings: Settings) -> ModelArch:
    settings.require("topk_method", "noaux_tc")
    settings.require("scoring_func", "sigmoid")
    settings.require("rope_interleave", True)
    experts = {
        **_experts(settings, shared=1, dense=3, scale=2.5),
        "score": "sigmoid",
        "normalize": bool(settings.get("norm_topk_prob", True)),
        "bias": True,
        "groups": settings.number("n_group", default=8),
        "top_groups": settings.number("topk_group", default=4),
    }
    return settings.arch(
        "deepseek_v3", position=settings.rope(), latent_attention=_latent(settings), experts=experts, head_dim=0
    )


def _write(arch: ModelArch) -> dict[str, Any]:
    experts, latent = arch.required_experts, arch.required_latent_attention
    shared = experts.shared_ffn_hidden_size
    # Several shared experts are one FFN here; its width is told as a multiple of an expert's.
    return {
        **common_config(arch),
        **rope_config(arch),
        **latent.model_dump(),
        "num_key_value_heads": arch.num_attention_heads,
        "head_dim": latent.qk_rope_head_dim,
        "attention_bias": False,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "n_shared_experts": shared // experts.ffn_hidden_size,
        "routed_scaling_factor": experts.scale,
        "first_k_dense_replace": len(experts.dense_layers),
        "moe_layer_freq": 1,
        "norm_topk_prob": experts.normalize,
        "aux_loss_alpha": experts.coefficient if experts.balances else 0.0,
        "seq_aux": experts.balance == "sequence",
        "scoring_func": experts.score,
    }


def _write_v2(arch: ModelArch) -> dict[str, Any]:
    experts = arch.required_experts
    method = {"topk_method": "group_limited_greedy" if experts.groups > 1 else "greedy"}
    groups = {"n_group": experts.groups, "topk_group": experts.top_groups}
    return {**_write(arch), **method, **groups, "mlp_bias": False}


def _write_v3(arch: ModelArch) -> dict[str, Any]:
    return {
        **_write(arch),
        "topk_method": "noaux_tc",
        "n_group": arch.required_experts.groups,
        "topk_group": arch.required_experts.top_groups,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


_COMMON = (
    frozenset(
        {
            "rope",
            "tie_embeddings",
            "latent_attention",
            "experts",
            "shared experts",
            "groups of experts",
            "scaled weights of experts",
            "dense layers",
        }
    )
    | SCALINGS
)
_NEEDED = frozenset({"latent_attention", "experts", "shared experts"})

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    classifier="DeepseekV2ForSequenceClassification",
    supports=_COMMON,
    needs=_NEEDED,
    read=_read_v2,
    write=_write_v2,
    experts=ExpertNames(),
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    classifier="DeepseekV3ForSequenceClassification",
    supports=_COMMON | {"sigmoid scores", "a bias of the router"},
    needs=_NEEDED | {"sigmoid scores", "a bias of the router"},
    read=_read_v3,
    write=_write_v3,
    experts=ExpertNames(),
)
