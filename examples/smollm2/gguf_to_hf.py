"""Converts a GGUF file of a Llama-like model to a Hugging Face folder: weights, dequantized to fp32, and tokenizer.

GGUF orders the rows of q and k by interleaved rotary pairs (0, 1), (2, 3), ...; Hugging Face rotates the channels i and
i + d/2 together. `rotate_half_order` reorders the rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL = 3  # the value of tokenizer.ggml.token_type for special tokens


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor: model.layers.3.self_attn.q_proj.weight for blk.3.attn_q.weight."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from interleaved pairs to first halves followed by second halves.

    Args:
        weight: [n * d, h], n heads of d rows.
        heads: n.

    Returns:
        [n * d, h].
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # [n, d/2, 2, h]
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def convert(gguf: Path, out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer files to the new folder `out`.

    Raises:
        ValueError: the architecture of the GGUF file is not llama.
    """
    reader = GGUFReader(str(gguf))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{gguf}: the architecture is {fields['general.architecture']!r}, this converter reads llama")
    heads, groups = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = rotate_half_order(values, heads if ".attn_q." in tensor.name else groups)
        weights[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values))
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "hidden_act": "silu",
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(fields, out)


def write_tokenizer(fields: dict, out: Path) -> None:
    """Write SmolLM's byte-level BPE tokenizer. The token <|endoftext|> ends a document, as in the model's pretraining."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[0],
        "eos_token": tokens[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
