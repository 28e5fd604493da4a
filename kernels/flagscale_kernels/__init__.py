"""Triton kernels for training language models, each with a PyTorch path for the CPU. Importing needs no GPU."""

from flagscale_kernels._checks import stand_for_cuda
from flagscale_kernels.cross_entropy import cross_entropy, cross_entropy_reference
from flagscale_kernels.flash_attention import attention_reference, flash_attention, flash_attention_backward
from flagscale_kernels.geglu import geglu, geglu_reference
from flagscale_kernels.layer_norm import layer_norm, layer_norm_reference
from flagscale_kernels.linear_cross_entropy import fused_linear_cross_entropy, linear_cross_entropy_reference
from flagscale_kernels.piecewise_attention import piecewise_attention, piecewise_attention_backward, piecewise_reference
from flagscale_kernels.rms_norm import rms_norm, rms_norm_reference, rms_norm_residual
from flagscale_kernels.rope import apply_rope, apply_rope_thd, rope, rope_reference
from flagscale_kernels.rope_frequencies import packed_position_ids, rope_frequencies, rope_tables
from flagscale_kernels.swiglu import swiglu, swiglu_reference
from flagscale_kernels.token_permutation import (
    collect_reference,
    collect_tokens,
    spread_reference,
    spread_tokens,
    token_order,
)

__all__ = [
    "apply_rope",
    "apply_rope_thd",
    "attention_reference",
    "collect_reference",
    "collect_tokens",
    "cross_entropy",
    "cross_entropy_reference",
    "flash_attention",
    "flash_attention_backward",
    "fused_linear_cross_entropy",
    "geglu",
    "geglu_reference",
    "layer_norm",
    "layer_norm_reference",
    "linear_cross_entropy_reference",
    "packed_position_ids",
    "piecewise_attention",
    "piecewise_attention_backward",
    "piecewise_reference",
    "rms_norm",
    "rms_norm_reference",
    "rms_norm_residual",
    "rope",
    "rope_frequencies",
    "rope_reference",
    "rope_tables",
    "spread_reference",
    "spread_tokens",
    "stand_for_cuda",
    "swiglu",
    "swiglu_reference",
    "token_order",
]
