"""Llama 1, 2, 3 and models of the same maths."""

from __future__ import annotations

from typing import Any

from flagscale_like.arch import ModelArch
from flagscale_like.families.weight_map import QKV, Direct, GatedMLP, PaddedVocab, Rule

MODEL_TYPE = "llama"


def rules(arch: ModelArch) -> list[Rule]:
    """Every tensor of the model, in the order of the layers."""
    found: list[Rule] = [PaddedVocab("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))]
    for i in range(arch.num_layers):
        core, hf = f"decoder.layers.{i}.", f"model.layers.{i}."
        found += [
            Direct(core + "input_layernorm.weight", (hf + "input_layernorm.weight",)),
            QKV(core + "self_attention.linear_qkv.weight", tuple(f"{hf}self_attn.{x}_proj.weight" for x in "qkv")),
            Direct(core + "self_attention.linear_proj.weight", (hf + "self_attn.o_proj.weight",)),
            Direct(core + "pre_mlp_layernorm.weight", (hf + "post_attention_layernorm.weight",)),
            GatedMLP(core + "mlp.linear_fc1.weight", (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight")),
            Direct(core + "mlp.linear_fc2.weight", (hf + "mlp.down_proj.weight",)),
        ]
    found.append(Direct("decoder.final_layernorm.weight", ("model.norm.weight",)))
    if not arch.tie_embeddings:
        found.append(PaddedVocab("output_layer.weight", ("lm_head.weight",)))
    return found


def hf_config(arch: ModelArch) -> dict[str, Any]:
    """config.json, in transformers 5's terms."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.position.base}
    scaling = arch.position.scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= scaling.model_dump(exclude={"kind", "factor"})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings or 2048,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.position.base,
        "rope_parameters": rope,
        "tie_word_embeddings": arch.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": arch.init_std,
        "use_cache": True,
    }
