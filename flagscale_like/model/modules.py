"""Norm and activation modules, in the shape megatron-core's layer spec asks for."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from flagscale_kernels import rms_norm, swiglu
from flagscale_like.config import KernelChoice


def backend_of(choice: KernelChoice) -> str | None:
    """`kernels:` of the YAML as flagscale_kernels names it: None chooses by the tensor's device."""
    return None if choice == "auto" else choice


def in_backward() -> bool:
    """Whether autograd is running a backward pass: a layer that runs then is recomputed."""
    return torch._C._current_graph_task_id() != -1


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich 2019).

    megatron-core's own wrapper refuses sequence parallelism. The weight is marked `sequence_parallel`, so that
    megatron-core sums its gradient over the tensor-parallel ranks, each of which saw its own part of the sequence.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., h] -> [..., h], rounded as Hugging Face models round."""
        return rms_norm(x, self.weight, self.eps, rounding="hf", backend=self.backend)


class SwiGLU(MegatronModule):
    """silu(gate) * up (Shazeer 2020) on megatron-core's packed [gate; up] projection."""

    def __init__(self, config: TransformerConfig, *, backend: str | None = None) -> None:
        super().__init__(config)
        self.backend = backend

    def forward(self, gate_up: Tensor) -> Tensor:
        """gate_up: [s, b, 2f/tp] -> [s, b, f/tp]."""
        return swiglu(gate_up, backend=self.backend)
