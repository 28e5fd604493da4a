"""Reversible rules between Hugging Face tensors and megatron-core's. Tensors are whole, not sharded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flagscale_like.arch import ModelArch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Direct:
    """The same tensor under two names. Subclasses rearrange its rows.

    Attributes:
        core: megatron-core's name, layers counted over the whole model.
        shape: megatron-core's shape, the vocabulary padded for tp 1.
        hf: names of the Hugging Face tensors that hold the same weights.
        expert: of matrices that megatron-core's tensor stacks over experts, the number of the one that this rule is about;
            `shape` is then this matrix's. A conversion so holds one expert's matrices at a time. None for a whole tensor.
    """

    core: str
    shape: Shape
    hf: tuple[str, ...]
    expert: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        """One tensor for each name in `hf`; views where that is possible."""
        return (tensor,)

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        """The inverse of to_hf(), bit for bit."""
        return tensors[0]

    def hf_shapes(self, arch: ModelArch) -> tuple[Shape, ...]:
        """Shapes of the tensors in `hf`."""
        return tuple(tuple(t.shape) for t in self.to_hf(torch.empty(self.shape, device="meta"), arch))

    def row_sources(self, arch: ModelArch) -> Tensor | None:
        """Where each row of megatron-core's tensor comes from: 1 + its row in the tensors of `hf`, one below the other; 0 for
        padding. [rows]. None: the rule does more than to rearrange rows.
        """
        counts = [shape[0] for shape in self.hf_shapes(arch)]
        numbers = torch.arange(1, sum(counts) + 1)
        try:
            found = self.to_core(numbers.unsqueeze(1).split(counts), arch)
        except RuntimeError:  # it needs the columns
            return None
        rearranged = found.shape == (self.shape[0], 1) and torch.equal(found[found > 0].sort().values, numbers)
        return found.flatten() if rearranged else None


Rule = Direct


@dataclass(frozen=True)
class Exact(Direct):
    """A tensor that an export writes in its own dtype, whatever that of the weights is."""


@dataclass(frozen=True)
class PaddedVocab(Direct):
    """A matrix with one row for each token of the vocabulary: megatron-core pads the rows, Hugging Face does not."""

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        return (tensor[: arch.vocab_size],)

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        padding = self.shape[0] - tensors[0].shape[0]
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, padding)) if padding else tensors[0]


@dataclass(frozen=True)
class QKV(Direct):
    """q, k, v <-> linear_qkv, whose rows are [queries, key, value] of one KV group after the other. Biases likewise."""

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        g, d, rest = arch.num_query_groups, arch.head_dim, tensor.shape[1:]
        queries = arch.num_attention_heads // g
        grouped = tensor.view(g, queries + 2, d, *rest)  # [(n + 2g)d, h] -> [g, n/g + 2, d, h]
        return tuple(part.reshape(-1, *rest) for part in grouped.split((queries, 1, 1), dim=1))

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        g, d, rest = arch.num_query_groups, arch.head_dim, tensors[0].shape[1:]
        grouped = [part.view(g, -1, d, *rest) for part in tensors]  # [g, n/g, d, h], [g, 1, d, h], [g, 1, d, h]
        return torch.cat(grouped, dim=1).view(-1, *rest)


@dataclass(frozen=True)
class PackedQKV(QKV):
    """W_pack = [q; k; v] <-> linear_qkv."""

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        return (torch.cat(super().to_hf(tensor, arch)),)

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        q, kv = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
        return super().to_core(tensors[0].split((q, kv, kv)), arch)


@dataclass(frozen=True)
class GatedMLP(Direct):
    """gate, up <-> linear_fc1 = [gate; up]."""

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        return tensor.chunk(2)

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        return torch.cat(tensors)


@dataclass(frozen=True)
class RotaryLast(Direct):
    """Rows [latent; of each head the channels without a position; those that rotate, in pairs of neighbours] <-> ours.

    DeepSeek rotates channels 2i and 2i + 1 of a head's last ones together. Ours are a head's first ones, and channel i
    rotates with channel i + rotary / 2. Both q and k are rearranged alike, so that their products are the same.

    Attributes:
        heads: of the matrix; the part of k that all heads share is one head.
        rotary: channels of a head that rotate.
        latent: rows before the heads, which stay where they are.
    """

    heads: int = 1
    rotary: int = 0
    latent: int = 0

    def to_hf(self, tensor: Tensor, arch: ModelArch) -> tuple[Tensor, ...]:
        """[latent + n (r + d), in]; see Direct."""
        latent, by_head = self._split(tensor)
        rotary, rest = by_head[:, : self.rotary], by_head[:, self.rotary :]
        pairs = rotary.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return (torch.cat((latent, torch.cat((rest, pairs), dim=1).flatten(0, 1))),)

    def to_core(self, tensors: tuple[Tensor, ...], arch: ModelArch) -> Tensor:
        latent, by_head = self._split(tensors[0])
        plain = by_head.shape[1] - self.rotary
        rest, pairs = by_head[:, :plain], by_head[:, plain:]
        rotary = pairs.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat((latent, torch.cat((rotary, rest), dim=1).flatten(0, 1)))

    def _split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The rows before the heads, and the others as [heads, channels, in]."""
        return tensor[: self.latent], tensor[self.latent :].unflatten(0, (self.heads, -1))
