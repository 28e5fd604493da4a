"""Tiny Hugging Face folders of every family, and the logits that transformers, or our reference, gives for them."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from tests.families.reference import Reference, make_folder

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "vocab_size": 130,
    "max_position_embeddings": 64,
    "num_attention_heads": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name -> config class and what differs from SHAPE
SHIPPED = {
    "llama": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "smollm2": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 7, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen2-window": (
        "Qwen2Config",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
FOUR = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 2, "num_experts": 4}
LATENT = {
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "rope_parameters": YARN,
}
# Families with a mixture of experts, likewise.
MIXTURES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": 7}),
    "qwen2_moe": ("Qwen2MoeConfig", {**FOUR, "shared_expert_intermediate_size": 32}),
    "qwen2_moe-step": (
        "Qwen2MoeConfig",
        {
            **FOUR,
            "shared_expert_intermediate_size": 32,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**FOUR, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "olmoe": ("OlmoeConfig", {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2-lite": ("DeepseekV2Config", {**LATENT, "q_lora_rank": None, "n_shared_experts": 2}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **LATENT,
            "q_lora_rank": 28,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": 28, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
}

PLAIN = {**SHAPE, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
ALIBI = {key: value for key, value in PLAIN.items() if key != "max_position_embeddings"} | {"model_max_length": 64}
CUSTOM = {
    "aquila": {
        **PLAIN,
        "model_type": "aquila",
        "architectures": ["AquilaForCausalLM"],
        "num_key_value_heads": 2,
    },
    "baichuan-7b": {**PLAIN, "model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"]},
    "baichuan-13b": {
        **ALIBI,
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "position_embedding": "alibi",
        "norm_head": False,
    },
    "baichuan2-7b": {
        **PLAIN,
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "norm_head": True,
    },
    "baichuan2-13b": {
        **ALIBI,
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "position_embedding": "alibi",
        "norm_head": True,
    },
}
SHIPPED |= MIXTURES
ALL = [*SHIPPED, *CUSTOM]
DENSE = [name for name in ALL if name not in MIXTURES]


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the tiny model `name` under `folder`; returns its own folder."""
    out = folder / name
    if name in CUSTOM:
        make_folder(out, CUSTOM[name], dtype)
        return out
    class_name, changes = SHIPPED[name]
    config = getattr(transformers, class_name)(**{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(out)
    return out


@torch.no_grad()
def reference_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits [b, s, v] of a folder that make() wrote."""
    config = json.loads((folder / "config.json").read_text())
    if folder.name in CUSTOM:
        return Reference(config, load_file(folder / "model.safetensors")).logits(ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(ids).logits


def ids() -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
