"""Reversible rules between Hugging Face tensors and megatron-core's, on full (not sharded) tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flagscale_like.arch import ModelArch


@dataclass(frozen=True)
class Direct:
    """The same matrix under two names."""

    core: str
    hf: tuple[str, ...]

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        return (tensor,)

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        return tensors[0]


@dataclass(frozen=True)
class PaddedVocab(Direct):
    """A matrix with a row a token: megatron-core pads the rows, Hugging Face does not."""

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        return (tensor[: arch.vocab_size],)

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        rows = arch.padded_vocab_size() - tensors[0].shape[0]
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, rows))


@dataclass(frozen=True)
class QKV(Direct):
    """q, k, v <-> linear_qkv, whose rows are, a KV group at a time, [its queries, its key, its value]."""

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        g, d = arch.num_query_groups, arch.head_dim
        queries = arch.num_attention_heads // g
        grouped = tensor.view(g, queries + 2, d, *tensor.shape[1:])  # [(n + 2g)d, h] -> [g, n/g + 2, d, h]
        q, k, v = grouped.split((queries, 1, 1), dim=1)
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part in (q, k, v))

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        g, d = arch.num_query_groups, arch.head_dim
        rest = tensors[0].shape[1:]
        grouped = [part.view(g, -1, d, *rest) for part in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)


@dataclass(frozen=True)
class GatedMLP(Direct):
    """gate, up <-> linear_fc1 = [gate; up]."""

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        return tensor.chunk(2)

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        return torch.cat(tensors)


Rule = Direct
