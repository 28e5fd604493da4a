"""A decoder layer's forward pass on the few tokens of a step of generation, without what autograd and training ask for.

megatron-core's modules prepare every call for a backward pass, for parallel modes and for profilers, which takes longer than
the products themselves where a step has a few tokens. The functions here compute the same with the modules' own parameters.
Where a module has hooks (LoRA adapters), or is of another kind (experts, latent attention), the module itself is called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from flagscale_kernels import swiglu
from flagscale_like.model.kv_cache import CachedStep

Product = Callable[[Tensor], Tensor]


class LayerStep:
    """One layer's forward pass. Weights are taken when it is made, and must not be replaced while it is used."""

    def __init__(self, layer: TransformerLayer) -> None:
        self.layer = layer
        self.input_norm, self.norm = layer.input_layernorm.forward, layer.pre_mlp_layernorm.forward
        attention, mlp = layer.self_attention, layer.mlp
        self.attends = _attention(attention) if type(attention) is SelfAttention else _module_attention(attention)
        self.feeds = _gated(mlp) if type(mlp) is MLP else _module(mlp)

    def __call__(self, hidden: Tensor, step: CachedStep) -> Tensor:
        """[t, h] -> [t, h], of a step's tokens."""
        hidden = hidden + self.attends(self.input_norm(hidden), step)
        return hidden + self.feeds(self.norm(hidden))


def _attention(attention: SelfAttention) -> Callable[[Tensor, CachedStep], Tensor]:
    """Grouped-query attention: the heads of each group of the product lie before its key and its value."""
    project, out = _product(attention.linear_qkv), _product(attention.linear_proj)
    core, norms = attention.core_attention, (attention.q_layernorm, attention.k_layernorm)
    groups, channels = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    heads = attention.num_attention_heads_per_partition

    def attend(x: Tensor, step: CachedStep) -> Tensor:
        mixed = project(x).view(len(x), groups, -1, channels)
        query, key, value = mixed[:, :, :-2].reshape(len(x), heads, channels), mixed[:, :, -2], mixed[:, :, -1]
        if norms[0] is not None:
            query, key = (norm(t[:, None])[:, 0] for norm, t in zip(norms, (query, key), strict=True))
        return out(step.attend(core, query, key, value).reshape(len(x), -1))

    return attend


def _gated(mlp: MLP) -> Product:
    """SwiGLU between two products."""
    up, down, backend = _product(mlp.linear_fc1), _product(mlp.linear_fc2), mlp.activation_func.backend
    return lambda x: down(swiglu(up(x), backend=backend))


def _product(linear: ColumnParallelLinear | RowParallelLinear) -> Product:
    """x Wᵀ of this rank's part; the sum over tensor-parallel ranks where they hold parts of the columns."""
    if linear._forward_hooks or linear._forward_pre_hooks:
        return lambda x: linear(x[:, None])[0][:, 0]
    weight, bias = linear.weight, linear.bias
    group = linear.tp_group
    if isinstance(linear, ColumnParallelLinear) or group.size() == 1:
        return lambda x: F.linear(x, weight, bias)

    def summed(x: Tensor) -> Tensor:
        y = F.linear(x, weight)
        dist.all_reduce(y, group=group)
        return y

    return summed


def _module_attention(attention: nn.Module) -> Callable[[Tensor, CachedStep], Tensor]:
    return lambda x, step: attention(x[:, None], None, packed_seq_params=step)[0][:, 0]


def _module(mlp: nn.Module) -> Product:
    return lambda x: mlp(x[:, None])[0][:, 0]
