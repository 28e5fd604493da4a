"""The decoder layer: megatron-core's parallel linears and residual structure, with our norm, attention and activation."""

from __future__ import annotations

import functools
from collections.abc import Callable

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from flagscale_like.arch import (
    Block,
    GatedFeedForward,
    GroupedQueryAttention,
    Layer,
    MixtureOfExperts,
    ModelArch,
    MultiLatentAttention,
)
from flagscale_like.config import Kernels
from flagscale_like.model.attention import CoreAttention, RotaryTables
from flagscale_like.model.experts import ExpertLayer, GroupedExperts, Router
from flagscale_like.model.latent_attention import LatentCoreAttention, LatentSelfAttention
from flagscale_like.model.modules import ProjectionNorm, RMSNorm, SwiGLU, backend_of


def attention_spec(block: GroupedQueryAttention, arch: ModelArch, kernels: Kernels) -> ModuleSpec:
    """Grouped-query attention. The layers that are built from one spec share the tables of RoPE."""
    q_norm = k_norm = norm_spec(kernels) if block.qk_norm else IdentityOp
    if block.qk_norm and block.qk_norm_over == "projection":
        q_norm, k_norm = (
            ModuleSpec(module=ProjectionNorm, params={"heads": heads, "backend": backend_of(kernels.rms_norm)})
            for heads in (block.heads, block.groups)
        )
    tables = None if block.position.kind == "alibi" else RotaryTables(arch)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if block.causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=functools.partial(CoreAttention, arch=arch, kernels=kernels, tables=tables),
            linear_proj=RowParallelLinear,
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )


def latent_attention_spec(block: MultiLatentAttention, arch: ModelArch, kernels: Kernels) -> ModuleSpec:
    """Multi-head latent attention."""
    options = {"arch": arch, "kernels": kernels, "tables": RotaryTables(arch)}
    return ModuleSpec(
        module=LatentSelfAttention,
        params={
            "block": block,
            "norm": functools.partial(RMSNorm, backend=backend_of(kernels.rms_norm)),
            "core_attention": functools.partial(LatentCoreAttention, block=block, **options),
        },
    )


def feed_forward_spec(block: GatedFeedForward, kernels: Kernels, rows: int) -> ModuleSpec:
    """SwiGLU between two parallel linears."""
    return ModuleSpec(module=MLP, submodules=_gated(kernels))


def _gated(kernels: Kernels) -> MLPSubmodules:
    return MLPSubmodules(
        linear_fc1=ColumnParallelLinear,
        activation_func=ModuleSpec(module=SwiGLU, params={"backend": backend_of(kernels.swiglu)}),
        linear_fc2=RowParallelLinear,
    )


def experts_spec(block: MixtureOfExperts, kernels: Kernels, rows: int) -> ModuleSpec:
    """Router, experts, and the FFN that they may share.

    Args:
        rows: of a micro-batch; see Experts.balance.
    """
    return ModuleSpec(
        module=ExpertLayer,
        submodules=MoESubmodules(
            router=functools.partial(Router, experts=block.experts, rows=rows),
            experts=ModuleSpec(module=GroupedExperts, params={"backend": backend_of(kernels.swiglu)}),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_gated(kernels)),
        ),
    )


# The modules of each class of block in flagscale_like.arch.
ATTENTION_SPECS: dict[type[Block], Callable[..., ModuleSpec]] = {
    GroupedQueryAttention: attention_spec,
    MultiLatentAttention: latent_attention_spec,
}
FEED_FORWARD_SPECS: dict[type[Block], Callable[..., ModuleSpec]] = {
    GatedFeedForward: feed_forward_spec,
    MixtureOfExperts: experts_spec,
}


def layer_spec(layer: Layer, arch: ModelArch, kernels: Kernels, rows: int) -> ModuleSpec:
    """One decoder layer, its operators computed as `kernels` says."""
    norm = norm_spec(kernels)
    attention, feed_forward = layer.attention, layer.feed_forward
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ATTENTION_SPECS[type(attention)](attention, arch, kernels),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=FEED_FORWARD_SPECS[type(feed_forward)](feed_forward, kernels, rows),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def norm_spec(kernels: Kernels) -> ModuleSpec:
    """Our RMSNorm, with the chosen backend."""
    return ModuleSpec(module=RMSNorm, params={"backend": backend_of(kernels.rms_norm)})


def block_spec(
    arch: ModelArch,
    kernels: Kernels,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    vp_stage: int | None,
    rows: int,
) -> TransformerBlockSubmodules:
    """The layers of one model chunk on this pipeline stage, and the final norm.

    Args:
        groups: the process groups of the layout.
        rows: of a micro-batch.
    """
    stage = groups.pp.rank()
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
    layers = arch.layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)]
    specs = {layer: layer_spec(layer, arch, kernels, rows) for layer in set(layers)}
    for spec in specs.values():  # megatron-core hands them to its own layer of experts alone
        if spec.submodules.mlp.module is ExpertLayer:
            spec.submodules.mlp.params = {"pg_collection": groups}
    return TransformerBlockSubmodules(layer_specs=[specs[layer] for layer in layers], layer_norm=norm_spec(kernels))
