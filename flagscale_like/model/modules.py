"""Norm and activation modules, in the shape megatron-core's layer spec asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich 2019).

    megatron-core's own wrapper refuses sequence parallelism. The weight is marked `sequence_parallel`, so that
    megatron-core sums its gradient over the tensor-parallel ranks, each of which saw its own part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., h] -> [..., h]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class SwiGLU(MegatronModule):
    """silu(gate) * up (Shazeer 2020) on megatron-core's packed [gate; up] projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    def forward(self, gate_up: Tensor) -> Tensor:
        """gate_up: [s, b, 2f/tp] -> [s, b, f/tp]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
