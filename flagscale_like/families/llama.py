"""Llama 1, 2, 3 and SmolLM2; Mistral and Aquila2, which compute the same under other names."""

from __future__ import annotations

from typing import Any

from flagscale_like.arch import ModelArch
from flagscale_like.families.family import Family
from flagscale_like.families.features import SCALINGS
from flagscale_like.families.settings import Settings, common_config, rope_config


def _read_llama(settings: Settings) -> ModelArch:
    settings.require("attention_bias", False)
    settings.require("mlp_bias", False)
    return settings.arch("llama", position=settings.rope())


def _write_llama(arch: ModelArch) -> dict[str, Any]:
    return {
        **common_config(arch),
        **rope_config(arch),
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _read_mistral(settings: Settings) -> ModelArch:
    # A missing window is transformers' default; null is none.
    window = settings.values.get("sliding_window", 4096)
    if window is not None:
        window = settings.number("sliding_window", default=4096)
    return settings.arch("mistral", position=settings.rope(), sliding_window=window)


def _write_mistral(arch: ModelArch) -> dict[str, Any]:
    return {
        **common_config(arch),
        **rope_config(arch),
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "sliding_window": arch.sliding_window,
    }


def _read_aquila(settings: Settings) -> ModelArch:
    return settings.arch("aquila", position=settings.rope())


def _write_aquila(arch: ModelArch) -> dict[str, Any]:
    # Its code is that of Llama as of transformers 4.31, which has two kinds of scaling, named by `type`.
    rope = rope_config(arch, type_key="type")
    return {**common_config(arch), **rope, "num_key_value_heads": arch.num_query_groups}


LLAMA = Family(
    name="llama",
    model_type="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),  # the second in folders of the first Llama
    classifier="LlamaForSequenceClassification",
    supports=frozenset({"rope", "query_groups", "tie_embeddings", "bidirectional attention"}) | SCALINGS,
    read=_read_llama,
    write=_write_llama,
)

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    classifier="MistralForSequenceClassification",
    supports=frozenset({"rope", "query_groups", "sliding_window", "tie_embeddings", "bidirectional attention"})
    | SCALINGS,
    read=_read_mistral,
    write=_write_mistral,
)

AQUILA = Family(
    name="aquila",
    model_type="aquila",
    architectures=("AquilaForCausalLM", "AquilaModel"),
    supports=frozenset({"rope", "query_groups", "linear RoPE scaling", "dynamic RoPE scaling"}),
    read=_read_aquila,
    write=_write_aquila,
)
