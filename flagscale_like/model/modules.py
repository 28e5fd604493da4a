"""Norm and activation modules, in the shape megatron-core's layer spec asks for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from flagscale_kernels import rms_norm, swiglu
from flagscale_like.config import KernelChoice


def backend_of(choice: KernelChoice) -> str | None:
    """`kernels:` of the YAML as flagscale_kernels names it: None chooses by the tensor's device."""
    return None if choice == "auto" else choice


def mark(parameter: nn.Parameter, **attributes: Any) -> None:
    """Give a parameter attributes that megatron-core reads."""
    for name, value in attributes.items():
        setattr(parameter, name, value)


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
        mark(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., h] -> [..., h], rounded as Hugging Face models round."""
        return rms_norm(x, self.weight, self.eps, rounding="hf", backend=self.backend)


class ProjectionNorm(nn.Module):
    """RMSNorm over the channels of all heads of q, or of k, together (OLMoE, Muennighoff et al. 2024).

    Each tensor-parallel rank has its own heads' channels and weights, and the ranks add up their sums of squares.

    Args:
        hidden_size: channels of a head.
        heads: of all tensor-parallel ranks together.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        heads: int,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.backend, self.tp = eps, backend, config.tensor_model_parallel_size
        self.channels = heads * hidden_size
        self.weight = nn.Parameter(torch.ones(self.channels // self.tp, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, n/tp, d] -> [s, b, n/tp, d]."""
        rows = x.flatten(-2)
        if self.tp == 1:
            normed = rms_norm(rows, self.weight, self.eps, rounding="hf", backend=self.backend)
        else:
            normed = _CutNorm.apply(rows, self.weight, self.channels, self.eps, get_tensor_model_parallel_group())
        return normed.view(x.shape)


class _CutNorm(torch.autograd.Function):
    """RMSNorm whose channels are cut over the ranks of a group. Saves x and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, channels: int, eps: float, group: dist.ProcessGroup) -> Tensor:
        ctx.channels, ctx.group = channels, group
        squares = x.float().square().sum(-1, keepdim=True)
        dist.all_reduce(squares, group=group)
        scale = torch.rsqrt(squares / channels + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x.float() * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grads[0].float()
        of_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.float()
        shared = (grad * normed).sum(-1, keepdim=True)
        dist.all_reduce(shared, group=ctx.group)
        of_x = scale * (grad - normed * shared / ctx.channels)
        return of_x.to(x.dtype), of_weight, None, None, None


class SwiGLU(MegatronModule):
    """silu(gate) * up (Shazeer 2020) on megatron-core's packed [gate; up] projection."""

    def __init__(self, config: TransformerConfig, *, backend: str | None = None) -> None:
        super().__init__(config)
        self.backend = backend

    def forward(self, gate_up: Tensor) -> Tensor:
        """gate_up: [s, b, 2f/tp] -> [s, b, f/tp]."""
        return swiglu(gate_up, backend=self.backend)
