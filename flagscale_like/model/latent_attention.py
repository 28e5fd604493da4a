"""Multi-head latent attention: projections down to a vector a token, up to the heads, and our core attention between.

megatron-core 0.16.1 has this attention too. Without Transformer Engine it cuts the projections down over tensor-parallel
ranks and gathers their output, and the gradient of the rotated part of k, which all heads share, then is that of one rank's
heads alone (multi_latent_attention.py: gather_from_tensor_model_parallel_region splits it and adds nothing up). Here every
rank has these small projections whole, as with Transformer Engine, and the rotation is core attention's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from flagscale_like.arch import MultiLatentAttention
from flagscale_like.errors import required
from flagscale_like.model.attention import CoreAttention
from flagscale_like.model.modules import mark


class LatentSelfAttention(MegatronModule):
    """Latent attention of this tensor-parallel rank's heads.

    Args:
        layer_number: megatron-core gives it to every attention; this one needs it for its core attention alone.
        block: the sizes.
        norm: makes a norm, from the configuration, its channels and its epsilon.
        core_attention: makes the core attention, from what megatron-core gives one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        block: MultiLatentAttention,
        norm: Callable[..., nn.Module],
        core_attention: Callable[..., nn.Module],
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,  # newer versions of megatron-core name the module
    ) -> None:
        super().__init__(config)
        self.latent, self.pg_collection = block.latent, required(pg_collection, "pg_collection")
        self.recomputes = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        n, h, q, kv = block.heads, config.hidden_size, self.latent.q_lora_rank, self.latent.kv_lora_rank
        d, r, v = self.latent.head_dim, self.latent.qk_rope_head_dim, self.latent.v_head_dim
        if q is None:
            self.linear_q_proj = self._up(h, n * d)
        else:
            self.linear_q_down_proj = WholeLinear(config, h, q)
            self.q_layernorm = norm(config, q, config.layernorm_epsilon)
            self.linear_q_up_proj = self._up(q, n * d)
        self.linear_kv_down_proj = WholeLinear(config, h, kv + r)
        self.kv_layernorm = norm(config, kv, config.layernorm_epsilon)
        self.linear_kv_up_proj = self._up(kv, n * (d - r + v))
        self.core_attention = core_attention(
            config=config, layer_number=layer_number, cp_comm_type=cp_comm_type, pg_collection=pg_collection
        )
        self.linear_proj = RowParallelLinear(
            n * v,
            h,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.pg_collection.tp,
        )

    def _up(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        """A projection to the heads, which are cut over tensor-parallel ranks."""
        return ColumnParallelLinear(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.pg_collection.tp,
        )

    def query_key_value(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states: [s, b, h], with SP [s/tp, b, h] -> q, k [s, b, n/tp, d], and v [s, b, n/tp, v_head_dim]."""
        d, r, v = self.latent.head_dim, self.latent.qk_rope_head_dim, self.latent.v_head_dim
        if self.latent.q_lora_rank is None:
            query = self.linear_q_proj(hidden_states)[0]
        else:
            query = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))[0]
        latent, shared = self.linear_kv_down_proj(hidden_states).split((self.latent.kv_lora_rank, r), dim=-1)
        heads = self.linear_kv_up_proj(self.kv_layernorm(latent.contiguous()))[0].unflatten(-1, (-1, d - r + v))
        own, value = heads.split((d - r, v), dim=-1)
        if self.config.sequence_parallel:
            shared = gather_from_sequence_parallel_region(shared.contiguous(), group=self.pg_collection.tp)
        else:
            shared = copy_to_tensor_model_parallel_region(shared, group=self.pg_collection.tp)
        key = torch.cat((shared.unsqueeze(-2).expand(*own.shape[:-1], r), own), dim=-1)
        return query.unflatten(-1, (-1, d)), key, value

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """[s, b, h] -> [s, b, h], and no bias. The other arguments serve megatron-core's inference and positions."""
        qkv = self.query_key_value(hidden_states)
        if packed_seq_params is not None:  # a pack is one row: [t, 1, n/tp, d] -> [t, n/tp, d]
            qkv = tuple(x.squeeze(1) for x in qkv)

        def attend(*qkv: Tensor) -> Tensor:
            return self.core_attention(*qkv, attention_mask, packed_seq_params=packed_seq_params)

        recomputes = self.recomputes and self.training
        out = tensor_parallel.checkpoint(attend, False, *qkv) if recomputes else attend(*qkv)
        return self.linear_proj(out if packed_seq_params is None else out.unsqueeze(1))


class WholeLinear(nn.Module):
    """y = W x with the whole W on every tensor-parallel rank. With SP each has a part of the tokens, and gradients add up."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        mark(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, inputs] -> [s, b, outputs]."""
        return F.linear(x, self.weight)


class LatentCoreAttention(CoreAttention):
    """Core attention whose heads of v are narrower than those of q and k: they are padded, and the output is cut.

    Args:
        block: the sizes, and the factor on the scores.
        options: CoreAttention's.
    """

    def __init__(self, *, block: MultiLatentAttention, **options: Any) -> None:
        options["softmax_scale"] = block.softmax_scale
        super().__init__(**options)
        self.head_dim, self.v_head_dim = block.latent.head_dim, block.latent.v_head_dim
        self.frees_qkv = False  # q, k and v are no views of one product

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """query, key: [s, b, n/tp, d]; value: [s, b, n/tp, v_head_dim] -> [s, b, n/tp * v_head_dim]; packs likewise."""
        value = F.pad(value, (0, self.head_dim - self.v_head_dim))
        out = super().forward(query, key, value, *args, **options)
        return out.unflatten(-1, (-1, self.head_dim))[..., : self.v_head_dim].flatten(-2)
