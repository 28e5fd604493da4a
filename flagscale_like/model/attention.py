"""Core attention: positions (RoPE, ALiBi) and causal softmax(q kᵀ) v, on q, k, v as megatron-core hands them over.

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


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slope of each head (Press et al. 2022).

    For 2^k heads the geometric series that starts at, and has the ratio, 2^(-8 / heads). Other counts take the series of
    the largest power of two below, and fill up with every second slope of the series of twice as many.

    Returns:
        [num_heads], float32, on the CPU.
    """

    def series(heads: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)]

    power = 1 << (num_heads.bit_length() - 1)
    slopes = series(power) + series(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


# Queries a call in windowed attention: the mask is [QUERY_BLOCK, QUERY_BLOCK + window], whatever the sequence.
QUERY_BLOCK = 512


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    slopes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal softmax(q kᵀ * scale - slope * distance) v, on torch's scaled_dot_product_attention.

    Nothing of size [s, s] is made. ALiBi needs no bias matrix: the softmax of a query does not change when a number is
    added to its whole row, so -slope * (i - j) is as good as slope * j, which is a product of one more channel: k has
    slope * j there, and q has 1. Its rounding is that of a fp32 score of size slope * s.

    Args:
        q: [b, n, s, d]; k, v: [b, g, s, d].
        softmax_scale: 1 / sqrt(d) where it is left out.
        slopes: [n], ALiBi's; needs g = n.
        window: keys a query sees, itself counted.

    Returns:
        [b, n, s, d].
    """
    s, d = q.shape[2], q.shape[3]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    gqa = q.shape[1] != k.shape[1]
    if slopes is not None:
        q, k, v = _with_alibi_channels(q, k, v, slopes / scale)
    if window is None or window >= s:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        return out[..., :d]
    parts, masks = [], {}
    for start in range(0, s, QUERY_BLOCK):
        stop, first = min(start + QUERY_BLOCK, s), max(start - window + 1, 0)
        shape = (stop - start, stop - first)
        if shape not in masks:  # the blocks in the middle of the sequence share one
            row = torch.arange(start, stop, device=q.device)[:, None]
            column = torch.arange(first, stop, device=q.device)
            masks[shape] = (column <= row) & (column > row - window)
        keys = slice(first, stop)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, keys], v[:, :, keys], attn_mask=masks[shape], scale=scale, enable_gqa=gqa
            )
        )
    return torch.cat(parts, dim=2)[..., :d]


def _with_alibi_channels(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append the channels whose product is slope * j: one in fp32; in half precision three, which add up to its 24 bits.

    Zeros pad to a multiple of 8 channels, in v too, for the flash kernels.
    """
    rest = slopes[:, None].to(k.device) * torch.arange(k.shape[2], dtype=torch.float32, device=k.device)  # [n, s]
    channels = []
    for _ in range(1 if k.dtype == torch.float32 else 3):
        channels.append(rest.to(k.dtype))
        rest = rest - channels[-1].float()
    count, d = len(channels), k.shape[-1]
    padding = -(d + count) % 8
    biases = torch.stack(channels, dim=-1).expand(k.shape[0], -1, -1, -1)  # [b, n, s, 1 or 3]
    q = torch.cat((q, q.new_ones(*q.shape[:-1], count), q.new_zeros(*q.shape[:-1], padding)), dim=-1)
    k = torch.cat((k, biases, k.new_zeros(*k.shape[:-1], padding)), dim=-1)
    return q, k, F.pad(v, (0, count + padding))


class CoreAttention(nn.Module):
    """Causal grouped-query attention of this tensor-parallel rank's heads, with RoPE or ALiBi, in a window or not.

    Args:
        tables: RoPE's; None with ALiBi.
    """

    def __init__(
        self,
        *,
        arch: ModelArch,
        tables: RotaryTables | None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.tables = tables
        self.softmax_scale = softmax_scale
        self.window = arch.sliding_window
        self.slopes = None
        if arch.position.kind == "alibi":
            tp = pg_collection.tp
            self.slopes = alibi_slopes(arch.num_attention_heads).chunk(tp.size())[tp.rank()]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query: [s, b, n/tp, d]; key, value: [s, b, g/tp, d] -> [s, b, n/tp * d]."""
        s, b, n, d = query.shape
        if self.tables is not None:
            cos, sin = self.tables.get(s, query.device, query.dtype)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, n, d] -> [b, n, s, d]
        if self.slopes is not None and n != k.shape[1]:
            k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
        out = causal_attention(q, k, v, softmax_scale=self.softmax_scale, slopes=self.slopes, window=self.window)
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
