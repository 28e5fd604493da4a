"""Frequencies and tables for rotary embeddings. The kernels read the tables.

The unscaled inverse frequencies of a rotary dimension r are base^(-2i/r), i = 0 .. r/2 - 1 (Su et al. 2021,
arXiv:2104.09864). A scaling changes them for longer contexts:

* linear: divided by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595).
* ntk: the base becomes base * factor^(r / (r - 2)), which keeps the highest frequency and divides the lowest by `factor`.
* dynamic: ntk with a factor that depends on the sequence's length; no change up to `original_max_positions`.
* yarn: interpolates low frequencies, and scales cos and sin by an attention factor (Peng et al. 2023, arXiv:2309.00071).
* llama3: divides low frequencies by `factor`, with a smooth transition to unchanged high ones (Llama 3.1).

linear, dynamic, yarn and llama3 equal transformers' ROPE_INIT_FUNCTIONS; a test checks it.
"""

import math

import torch
from torch import Tensor

from flagscale_kernels._checks import require

SCALINGS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")


def _inverse_frequencies(dim, base, device):
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    return 1.0 / (base**exponents)


def _yarn(dim, base, factor, original_max_positions, beta_fast, beta_slow, truncate, device):
    def turns_to_dim(turns):
        """The index, a real number, of the frequency that makes `turns` turns over the original context."""
        return dim * math.log(original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns_to_dim(beta_fast), turns_to_dim(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    inv_freq = _inverse_frequencies(dim, base, device)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def _llama3(dim, base, factor, original_max_positions, low_freq_factor, high_freq_factor, device):
    inv_freq = _inverse_frequencies(dim, base, device)
    turns = original_max_positions * inv_freq / (2 * math.pi)  # over the original context
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(turns < low_freq_factor, inv_freq / factor, inv_freq)
    return torch.where((turns >= low_freq_factor) & (turns <= high_freq_factor), blended, scaled)


def rope_frequencies(
    dim: int,
    base: float = 10000.0,
    scaling: str = "none",
    *,
    factor: float = 1.0,
    original_max_positions: int | None = None,
    seq_len: int | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """Return the inverse frequencies, fp32 [dim / 2], and the factor that multiplies cos and sin, 1.0 except for yarn.

    `dim` is the rotary dimension. dynamic, yarn and llama3 need `original_max_positions`, the context length of
    pretraining, in tokens. dynamic scales for sequences of `seq_len` tokens. The other options are named as in Hugging
    Face's `rope_parameters`. Raises ValueError for an unknown scaling, a missing number or one out of range.
    """
    require(scaling in SCALINGS, f"scaling ({scaling!r}) must be one of {SCALINGS}")
    require(dim > 0 and dim % 2 == 0, f"dim ({dim}) must be positive and divisible by 2")
    require(base > 1, f"base ({base}) must be greater than 1")
    require(factor > 0, f"factor ({factor}) must be positive")
    original = original_max_positions or 0
    if scaling in ("dynamic", "yarn", "llama3"):
        require(
            original > 0,
            f"original_max_positions ({original_max_positions}) must be positive for scaling {scaling!r}",
        )
    if scaling == "linear":
        return _inverse_frequencies(dim, base, device) / factor, 1.0
    if scaling in ("ntk", "dynamic"):
        require(dim > 2, f"dim ({dim}) must be greater than 2 for scaling {scaling!r}")
        if scaling == "dynamic":
            length = max(seq_len or original, original)
            stretch = factor * length / original - (factor - 1)
        else:
            stretch = factor
        return _inverse_frequencies(dim, base * stretch ** (dim / (dim - 2)), device), 1.0
    if scaling == "yarn":
        if attention_factor is None:

            def temperature(weight):
                return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

            both = bool(mscale and mscale_all_dim)
            attention_factor = temperature(mscale) / temperature(mscale_all_dim) if both else temperature(1.0)
        inv_freq = _yarn(dim, base, factor, original_max_positions, beta_fast, beta_slow, truncate, device)
        return inv_freq, float(attention_factor)
    if scaling == "llama3":
        require(
            high_freq_factor > low_freq_factor,
            f"high_freq_factor ({high_freq_factor}) must be greater than low_freq_factor ({low_freq_factor})",
        )
        args = (dim, base, factor, original_max_positions, low_freq_factor, high_freq_factor, device)
        return _llama3(*args), 1.0
    return _inverse_frequencies(dim, base, device), 1.0


def rope_tables(inv_freq: Tensor, positions: int | Tensor, *, attention_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 [positions, r / 2]. `positions` is a number of positions from 0 on, or a tensor of them."""
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions, device=inv_freq.device)
    angles = positions.to(torch.float32)[..., None] * inv_freq
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def packed_position_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The position [total] of each token in its sequence of a pack; cu_seqlens is [sequences + 1] and starts with 0.

    Tokens after the last sequence (padding) continue its positions. Does not wait for the device.
    """
    index = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:-1].to(index.dtype).contiguous(), index, right=True)
    return index - cu_seqlens.to(index.dtype)[sequence]
