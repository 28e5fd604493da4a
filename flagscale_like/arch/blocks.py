"""Blocks: the halves of a decoder layer, each with its parameters and FLOPs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from flagscale_like.arch.position import Position
from flagscale_like.arch.table import Parameter, Role


class Block(ABC):
    """One half of a layer: an attention or a feed-forward part. Subclasses are frozen dataclasses.

    What else depends on the kind of a block looks its class up: module specs (model.layer_spec), Hugging Face names
    (families.family), saved activations (planner.saved).
    """

    @abstractmethod
    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        """Those of the block in layer `layer`, in megatron-core's order."""

    @property
    def matrix_parameters(self) -> int:
        """Elements of the weight matrices that a token is multiplied with."""
        return sum(p.numel for p in self.parameters(0) if p.role.is_layer_matrix)

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """FLOPs of the matrix products of one token's forward pass: 2 per matrix parameter.

        Args:
            causal: count the keys that a token sees; otherwise attention is counted in full.
        """
        return 2.0 * self.matrix_parameters


@dataclass(frozen=True, kw_only=True)
class AttentionBlock(Block):
    """The attention half of a layer.

    Attributes:
        position: how it receives the order of the tokens.
    """

    position: Position


def groups_on(groups: int, tp: int) -> int:
    """KV groups that each tensor-parallel rank computes. Where there are fewer groups than ranks, several ranks share one."""
    return max(1, groups // tp)


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention(AttentionBlock):
    """Grouped-query attention (Ainslie et al. 2023). The fields are ModelArch's."""

    hidden_size: int
    heads: int
    groups: int
    head_dim: int
    qkv_bias: bool
    qk_norm: bool
    qk_norm_over: str
    sliding_window: int | None
    position: Position
    causal: bool

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        at, h, d = f"decoder.layers.{layer}.self_attention.", self.hidden_size, self.head_dim
        rows = (self.heads + 2 * self.groups) * d
        found = [
            Parameter(at + "linear_proj.weight", (h, self.heads * d), Role.ATTENTION_OUT, 1, layer=layer),
            Parameter(at + "linear_qkv.weight", (rows, h), Role.ATTENTION_IN, 0, layer=layer),
        ]
        if self.qkv_bias:
            found.append(Parameter(at + "linear_qkv.bias", (rows,), Role.BIAS, 0, layer=layer))
        if self.qk_norm:
            whole = self.qk_norm_over == "projection"
            for norm, heads in (("q_layernorm", self.heads), ("k_layernorm", self.groups)):
                shape, cut = ((heads * d,), 0) if whole else ((d,), None)
                found.append(Parameter(f"{at}{norm}.weight", shape, Role.HEAD_NORM, cut, layer=layer))
        return tuple(found)

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        keys = counted_keys(seq_length, self.sliding_window) * (0.5 if causal and self.causal else 1.0)
        return super().flops_per_token(seq_length, causal=causal) + 4.0 * self.heads * self.head_dim * keys


@dataclass(frozen=True, kw_only=True)
class GatedFeedForward(Block):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)). Gate and up are one matrix, [gate; up]."""

    hidden_size: int
    ffn_hidden_size: int

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        at, h, f = f"decoder.layers.{layer}.mlp.", self.hidden_size, self.ffn_hidden_size
        return (
            Parameter(at + "linear_fc1.weight", (2 * f, h), Role.FFN_IN, 0, blocks=2, layer=layer),
            Parameter(at + "linear_fc2.weight", (h, f), Role.FFN_OUT, 1, layer=layer),
        )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer: two residual branches, each a norm and a block."""

    hidden_size: int
    attention: AttentionBlock
    feed_forward: Block

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        """Those of layer `layer`, in megatron-core's order."""
        at = f"decoder.layers.{layer}."
        return (
            Parameter(at + "input_layernorm.weight", (self.hidden_size,), Role.NORM, None, layer=layer),
            *self.attention.parameters(layer),
            Parameter(at + "pre_mlp_layernorm.weight", (self.hidden_size,), Role.NORM, None, layer=layer),
            *self.feed_forward.parameters(layer),
        )

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """See Block.flops_per_token()."""
        blocks = (self.attention, self.feed_forward)
        return sum(block.flops_per_token(seq_length, causal=causal) for block in blocks)


def counted_keys(seq_length: int, window: int | None) -> float:
    """Keys a query is counted with where attention is counted in full: seq_length, or twice the mean that a window leaves.

    With causal attention a query sees half as many on average, and kernels that skip masked tiles compute half as many.
    """
    window = min(window or seq_length, seq_length)
    return window * (2 - window / seq_length)
