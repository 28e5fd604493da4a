"""Qwen2 and Qwen2.5 have a bias on q, k and v. Qwen3 has a norm on each head of q and k instead."""

from __future__ import annotations

from typing import Any

from flagscale_like.arch import ModelArch
from flagscale_like.families.family import Family
from flagscale_like.families.features import SCALINGS
from flagscale_like.families.settings import Settings, common_config, rope_config


def _window(settings: Settings) -> int | None:
    """The sliding window, where all layers have it.

    Raises:
        ConversionError: only some layers have it.
    """
    layers = settings.number("num_hidden_layers")
    if settings.get("use_sliding_window", False):
        # transformers: layers from max_window_layers on have the window. layer_types says it layer by layer.
        full = min(settings.values.get("max_window_layers", 28), layers)
        kinds = settings.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    else:
        kinds = settings.get("layer_types") or ["full_attention"]
    if len(set(kinds)) > 1:
        sliding = sum(kind == "sliding_attention" for kind in kinds)
        raise settings.fail(f"{sliding} of {layers} layers have a sliding window; supported: all of them, or none")
    return settings.number("sliding_window") if kinds[0] == "sliding_attention" else None


def _write(arch: ModelArch) -> dict[str, Any]:
    window = arch.sliding_window
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        **common_config(arch),
        **rope_config(arch),
        "num_key_value_heads": arch.num_query_groups,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": arch.num_layers if window is None else 0,
        "layer_types": [kind] * arch.num_layers,
    }


def _read_qwen2(settings: Settings) -> ModelArch:
    return settings.arch("qwen2", position=settings.rope(), qkv_bias=True, sliding_window=_window(settings))


def _read_qwen3(settings: Settings) -> ModelArch:
    settings.require("attention_bias", False)
    # transformers' default: 128 channels a head, not hidden_size / num_attention_heads.
    head_dim = settings.number("head_dim", default=128)
    return settings.arch(
        "qwen3", position=settings.rope(), qk_norm=True, head_dim=head_dim, sliding_window=_window(settings)
    )


def _write_qwen3(arch: ModelArch) -> dict[str, Any]:
    return {**_write(arch), "head_dim": arch.head_dim, "attention_bias": False}


_COMMON = {"rope", "query_groups", "sliding_window", "tie_embeddings", "bidirectional attention"} | SCALINGS

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    classifier="Qwen2ForSequenceClassification",
    supports=frozenset({*_COMMON, "qkv_bias"}),
    needs=frozenset({"qkv_bias"}),
    read=_read_qwen2,
    write=_write,
)

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    classifier="Qwen3ForSequenceClassification",
    supports=frozenset({*_COMMON, "qk_norm"}),
    needs=frozenset({"qk_norm"}),
    read=_read_qwen3,
    write=_write_qwen3,
)
