"""Core attention: rotary positions and causal softmax(q kᵀ) v, on q, k, v as megatron-core hands them over.

The rotation happens here and not in megatron-core's rope_utils: q and k are rotated together, from tables that are made
once, and a scheme that needs the unrotated q and k finds them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagscale_like.arch import ModelArch, RopeScaling


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """RoPE's angles a position, base^(-2i/d), scaled for long contexts.

    Returns:
        [head_dim / 2], float32, on the CPU whatever the default device is.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / base**exponent
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: long wavelengths are divided by factor, short ones kept, those between blended linearly.
    wavelength = 2 * math.pi / frequencies
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class RotaryTables:
    """cos and sin of every position, made at first use and shared by the layers of a model chunk."""

    def __init__(self, arch: ModelArch) -> None:
        self._frequencies = inverse_frequencies(arch.head_dim, arch.position.base, arch.position.scaling)
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def get(self, seq_length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [s, 1, 1, d/2], rounded to `dtype` as Hugging Face models round them."""
        key = (seq_length, device, dtype)
        if key not in self._tables:
            positions = torch.arange(seq_length, dtype=torch.float32)
            angles = torch.outer(positions, self._frequencies)[:, None, None, :]
            self._tables[key] = (angles.cos().to(device, dtype), angles.sin().to(device, dtype))
        return self._tables[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE. x: [s, b, n, d]; cos, sin: [s, 1, 1, d/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class CoreAttention(nn.Module):
    """Causal grouped-query attention of this tensor-parallel rank's heads.

    Nothing of size [s, s] is made: torch's scaled_dot_product_attention runs its flash kernel on CPU and CUDA alike.
    """

    def __init__(self, *, tables: RotaryTables, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.tables = tables
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query: [s, b, n/tp, d]; key, value: [s, b, g/tp, d] -> [s, b, n/tp * d]."""
        s, b, n, d = query.shape
        cos, sin = self.tables.get(s, query.device, query.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, n, d] -> [b, n, s, d]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
