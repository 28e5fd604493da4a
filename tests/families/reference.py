"""Decoders that transformers does not ship, written from the papers' formulas: no fused parts, every matrix in full.

Baichuan (Yang et al. 2023, "Baichuan 2"; Press et al. 2022 for ALiBi) and Aquila2. Names are those of the published
checkpoints.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


class Reference:
    """fp32 logits from a Hugging Face state dict and its config.json."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in weights.items()}

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * self.weights[name]

    def rotate(self, x):
        """x [n, s, d]: channels i and i + d/2 are one complex number, turned by position * base^(-2i/d)."""
        s, d = x.shape[-2:]
        angles = torch.arange(s).double()[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag), dim=-1)

    def slopes(self, heads):
        """Press et al. 2022 as its released code computes them, recursively."""
        if heads & (heads - 1) == 0:
            start = 2 ** (-(2 ** -(heads.bit_length() - 1 - 3)))
            return [start * start**i for i in range(heads)]
        below = 2 ** (heads.bit_length() - 1)
        return self.slopes(below) + self.slopes(2 * below)[0::2][: heads - below]

    def attention(self, x, prefix):
        heads = self.config["num_attention_heads"]
        groups = self.config.get("num_key_value_heads", heads)
        s, h = x.shape
        d = h // heads
        if prefix + "W_pack.weight" in self.weights:
            q, k, v = (x @ self.weights[prefix + "W_pack.weight"].T).chunk(3, dim=-1)
        else:
            q, k, v = (x @ self.weights[f"{prefix}{name}_proj.weight"].T for name in "qkv")
        q, k, v = (t.view(s, -1, d).transpose(0, 1) for t in (q, k, v))
        distance = (torch.arange(s)[:, None] - torch.arange(s)).double()
        bias = torch.zeros(heads, s, s).double()
        if self.config.get("position_embedding") == "alibi":
            bias = -torch.tensor(self.slopes(heads)).double()[:, None, None] * distance
        else:
            q, k = self.rotate(q), self.rotate(k)
        out = []
        for head in range(heads):
            group = head * groups // heads
            scores = q[head] @ k[group].T / d**0.5 + bias[head]
            out.append(scores.masked_fill(distance < 0, float("-inf")).softmax(-1) @ v[group])
        return torch.cat(out, dim=-1) @ self.weights[prefix + "o_proj.weight"].T

    def mlp(self, x, prefix):
        gate, up = (x @ self.weights[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up"))
        return (gate * gate.sigmoid() * up) @ self.weights[prefix + "down_proj.weight"].T

    def logits(self, ids):
        """ids [b, s] -> [b, s, v]"""
        rows = []
        for row in ids:
            x = self.weights["model.embed_tokens.weight"][row]
            for i in range(self.config["num_hidden_layers"]):
                layer = f"model.layers.{i}."
                x = x + self.attention(self.norm(x, layer + "input_layernorm.weight"), layer + "self_attn.")
                x = x + self.mlp(self.norm(x, layer + "post_attention_layernorm.weight"), layer + "mlp.")
            head = self.weights["lm_head.weight"]
            if self.config.get("norm_head"):
                head = head / head.pow(2).sum(-1, keepdim=True).sqrt()
            rows.append(self.norm(x, "model.norm.weight") @ head.T)
        return torch.stack(rows).float()


def make_folder(folder: Path, config: dict, dtype: torch.dtype, seed: int = 0) -> None:
    """A Hugging Face folder of random weights under the published names, with the inv_freq that old code saved."""
    h, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    groups = config.get("num_key_value_heads", config["num_attention_heads"])
    kv = h // config["num_attention_heads"] * groups
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,), "lm_head.weight": (v, h)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        if config["model_type"] == "baichuan":
            shapes[layer + "self_attn.W_pack.weight"] = (3 * h, h)
        else:
            sizes = {"q": h, "k": kv, "v": kv}
            shapes |= {f"{layer}self_attn.{name}_proj.weight": (size, h) for name, size in sizes.items()}
        shapes |= {
            layer + "self_attn.o_proj.weight": (h, h),
            layer + "mlp.gate_proj.weight": (f, h),
            layer + "mlp.up_proj.weight": (f, h),
            layer + "mlp.down_proj.weight": (h, f),
            layer + "input_layernorm.weight": (h,),
            layer + "post_attention_layernorm.weight": (h,),
        }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = ((1 + 0.3 * noise) if len(shape) == 1 else 0.2 * noise).to(dtype)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
