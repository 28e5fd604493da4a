"""Multi-head latent attention: its configuration, and the attention block that it makes of a layer."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from pydantic import Field, model_validator

from flagscale_like.arch.base import Frozen
from flagscale_like.arch.blocks import AttentionBlock, counted_keys
from flagscale_like.arch.position import Position
from flagscale_like.arch.table import Parameter, Role


class LatentAttention(Frozen):
    """Multi-head latent attention (DeepSeek-V2, 2024): k and v of all heads are projections of one vector a token.

    The fields have Hugging Face's names.

    Attributes:
        q_lora_rank: channels of the vector that q is a projection of; without it, q is a projection of the hidden state.
        kv_lora_rank: channels of the vector that k and v are projections of.
        qk_nope_head_dim: channels of a head of q and k that have no position.
        qk_rope_head_dim: channels of a head of q and k that RoPE rotates. Those of k are the same for all heads.
        v_head_dim: channels of a head of v; at most those of q.
    """

    q_lora_rank: int | None = Field(default=None, gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> LatentAttention:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"latent_attention.qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: it is rotated")
        if self.v_head_dim > self.head_dim:
            raise ValueError(
                f"latent_attention.v_head_dim ({self.v_head_dim}) exceeds the channels of a head of q "
                f"({self.head_dim}: qk_nope_head_dim + qk_rope_head_dim)"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Channels of a head of q and k."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class MultiLatentAttention(AttentionBlock):
    """Multi-head latent attention. A head's first channels of q and k are those that are rotated."""

    hidden_size: int
    heads: int
    latent: LatentAttention
    position: Position

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        at, h, n, x = f"decoder.layers.{layer}.self_attention.", self.hidden_size, self.heads, self.latent
        q, kv = x.q_lora_rank, x.kv_lora_rank
        place = functools.partial(Parameter, layer=layer)
        found = []
        if q is None:
            found.append(place(at + "linear_q_proj.weight", (n * x.head_dim, h), Role.ATTENTION_IN, 0))
        else:
            found += [
                place(at + "linear_q_down_proj.weight", (q, h), Role.ATTENTION_IN, None),
                place(at + "q_layernorm.weight", (q,), Role.HEAD_NORM, None),
                place(at + "linear_q_up_proj.weight", (n * x.head_dim, q), Role.ATTENTION_IN, 0),
            ]
        rows = n * (x.qk_nope_head_dim + x.v_head_dim)
        found += [
            place(at + "linear_kv_down_proj.weight", (kv + x.qk_rope_head_dim, h), Role.ATTENTION_IN, None),
            place(at + "kv_layernorm.weight", (kv,), Role.HEAD_NORM, None),
            place(at + "linear_kv_up_proj.weight", (rows, kv), Role.ATTENTION_IN, 0),
            place(at + "linear_proj.weight", (h, n * x.v_head_dim), Role.ATTENTION_OUT, 1),
        ]
        return tuple(found)

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores. yarn's mscale_all_dim scales all channels of q and k, and not those alone that rotate."""
        scale, scaling = self.latent.head_dim**-0.5, self.position.scaling
        if scaling is None or not scaling.mscale_all_dim:
            return scale
        return scale * (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        keys = counted_keys(seq_length, None) * (0.5 if causal else 1.0)
        products = self.heads * (self.latent.head_dim + self.latent.v_head_dim)
        return super().flops_per_token(seq_length, causal=causal) + 2.0 * products * keys
