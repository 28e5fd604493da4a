"""Norm and activation modules, in the shape megatron-core's layer spec asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from flagscale_kernels import rms_norm, swiglu
from flagscale_like.config import KernelChoice


def backend_of(choice: KernelChoice) -> str | None:
    """`kernels:` of the YAML as flagscale_kernels names it: None chooses by the tensor's device."""
    return None if choice == "auto" else choice


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


class OutputLayer(ColumnParallelLinear):
    """Logits over the vocabulary, of which each tensor-parallel rank computes its rows' part.

    The logits of the padded rows are -inf: they take no part in the loss, so that the loss depends on no tp, and their
    weights stay zero.

    Args:
        normalize: scale the rows of the matrix to length 1 first (NormHead: Yang et al. 2023, section 2.4). A row lies on one
            rank, so this needs no communication.
        tied_here: the weight is the embedding's, on this rank; it comes with each call.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        normalize: bool,
        tied_here: bool,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(
            config.hidden_size,
            padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=tied_here,
            tp_group=tp_group,
        )
        self.normalize = normalize
        if normalize:
            # The fusion adds the gradient to weight.main_grad; here it has to pass through the normalisation first.
            self.gradient_accumulation_fusion = False
        first_row = tp_group.rank() * self.output_size_per_partition
        self.rows = min(max(vocab_size - first_row, 0), self.output_size_per_partition)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (s/tp under sequence parallelism) -> logits [s, b, v/tp], and no bias."""
        if self.normalize:
            weight = F.normalize(self.weight, dim=-1)
        logits, bias = super().forward(input_, weight, False)
        if self.rows < self.output_size_per_partition:
            # Outside autograd: the softmax gives these columns probability 0, hence the gradient 0.
            with torch.no_grad():
                logits[..., self.rows :].fill_(float("-inf"))
        return logits, bias
