"""The decoder layer: megatron-core's parallel linears and residual structure, with our norm, attention and activation."""

from __future__ import annotations

import functools

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from flagscale_like.arch import ModelArch
from flagscale_like.config import Kernels
from flagscale_like.model.attention import CoreAttention, RotaryTables
from flagscale_like.model.modules import RMSNorm, SwiGLU, backend_of


def layer_spec(arch: ModelArch, kernels: Kernels) -> ModuleSpec:
    """One decoder layer of `arch`, its operators computed as `kernels` says."""
    norm = norm_spec(kernels)
    qk_norm = norm if arch.qk_norm else IdentityOp
    tables = None if arch.position.kind == "alibi" else RotaryTables(arch)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=functools.partial(CoreAttention, arch=arch, kernels=kernels, tables=tables),
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear,
                    activation_func=ModuleSpec(module=SwiGLU, params={"backend": backend_of(kernels.swiglu)}),
                    linear_fc2=RowParallelLinear,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def norm_spec(kernels: Kernels) -> ModuleSpec:
    """Our RMSNorm, with the chosen backend."""
    return ModuleSpec(module=RMSNorm, params={"backend": backend_of(kernels.rms_norm)})


def block_spec(
    arch: ModelArch, kernels: Kernels, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one model chunk on this pipeline stage, and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(arch, kernels)] * layers, layer_norm=norm_spec(kernels))
