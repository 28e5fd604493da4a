"""ModelSpec -> TransformerConfig -> GPTModel chunks -> DistributedDataParallel."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    get_pp_last_rank,
    is_pp_first_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor, nn

from flagscale_like.arch import EMBEDDING_NAME, OUTPUT_NAME
from flagscale_like.config import Kernels
from flagscale_like.errors import ConfigError
from flagscale_like.model.experts import Router
from flagscale_like.model.heads import HiddenHead, LanguageModelHead, ValueHead
from flagscale_like.model.layer_spec import block_spec
from flagscale_like.model.lora import attach_adapters
from flagscale_like.model.modules import backend_of
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.platforms import Platform
from flagscale_like.runtime.precision import DTYPES

# megatron-core's own fusions, none of which is used: our kernels take their place.
FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "apply_rope_fusion")


def transformer_config(spec: ModelSpec, platform: Platform, *, meta: bool = False) -> TransformerConfig:
    """megatron-core's description of the model and its layout.

    Args:
        meta: leave the device open, for building under torch.device("meta").
    """
    arch, par, dtype = spec.arch, spec.parallel, DTYPES[spec.precision]
    interleaved, recomputes_all = par.vpp > 1, spec.recompute == "full"
    qk_norm = arch.qk_norm_over if arch.qk_norm else None
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # megatron-core's name for "take activation_func from the layer spec"
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        # It adds up the gradients of norms that all tensor-parallel ranks hold; see model.modules.ProjectionNorm. From 0.18
        # on, megatron-core takes the spec's norms only with one of these two switches.
        qk_layernorm=qk_norm == "head",
        qk_l2_norm=qk_norm == "projection",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=spec.precision == "bf16",
        fp16=spec.precision == "fp16",
        tensor_model_parallel_size=par.tp,
        pipeline_model_parallel_size=par.pp,
        virtual_pipeline_model_parallel_size=par.vpp if interleaved else None,
        num_layers_in_first_pipeline_stage=par.first_stage_layers,
        num_layers_in_last_pipeline_stage=par.last_stage_layers,
        sequence_parallel=par.sp,
        context_parallel_size=par.cp,
        cp_comm_type=par.cp_kind,  # our core attention reads it, and no other
        # Two messages to one neighbour cross in a batched exchange: interleaved with pp 2 trains on swapped chunks.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=platform.waits_for_exchanges,
        deallocate_pipeline_outputs=True,
        recompute_granularity=None if spec.recompute == "none" else spec.recompute,
        recompute_method="uniform" if recomputes_all else None,
        recompute_num_layers=1 if recomputes_all else None,
        calculate_per_token_loss=True,
        # initialize_weights() fills the weights, alike on every layout. megatron-core's own initialisation still has to run:
        # it marks which parameters are tensor-parallel, without which the gradient norm leaves shards out.
        perform_initialization=not meta,
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=meta,
        gradient_accumulation_fusion=platform.fuses_main_grad and not meta,
        **dict.fromkeys(FUSIONS, False),
        **(expert_options(spec) if arch.experts else {}),
    )


def expert_options(spec: ModelSpec) -> dict[str, Any]:
    """What megatron-core has to know of a mixture of experts; model.experts computes choice, losses and bias."""
    experts = spec.arch.required_experts
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.top_k,
        "moe_router_pre_softmax": experts.top_k == 1,  # read by its check alone
        "moe_router_score_function": experts.score,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": spec.parallel.ep,
        "expert_tensor_parallel_size": 1,
    }


def _leave(weight: Tensor) -> None:
    """An initialisation that leaves the weight as it is."""


class LanguageModel(GPTModel):
    """GPTModel with our layer spec and a head of model.heads. Positions live in the core attention: megatron-core adds none.

    Args:
        fused_loss: see LanguageModelHead.
        pre, post: this chunk holds the embedding; the head.
        vp_stage: number of the chunk where a stage holds several.
        groups: the process groups of its layout.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: TransformerConfig,
        *,
        fused_loss: bool,
        pre: bool,
        post: bool,
        vp_stage: int | None,
        groups: ProcessGroupCollection,
    ) -> None:
        # setup_embeddings_and_output_layer() reads them while GPTModel is built
        self.spec, self.arch, self.fused_loss = spec, spec.arch, fused_loss
        self.dtype = DTYPES[spec.precision]
        super().__init__(
            config,
            block_spec(spec.arch, spec.kernels, config, groups, vp_stage, spec.micro_batch_size),
            vocab_size=spec.arch.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=spec.seq_length,
            pre_process=pre,
            post_process=post,
            position_embedding_type="none",
            share_embeddings_and_output_weights=spec.tied,
            vp_stage=vp_stage,
            pg_collection=groups,
        )

    @functools.cached_property
    def routers(self) -> list[Router]:
        """Of the layers of experts, in their order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def bfloat16(self) -> LanguageModel:
        """Itself: Float16Module asks for a conversion, and the weights are made in the precision that they are trained in.

        What is not in it (a router's bias and counts) is to stay as exact as it is.
        """
        wrong = {name: p.dtype for name, p in self.named_parameters() if p.requires_grad and p.dtype != self.dtype}
        assert not wrong, f"made in another precision than {self.dtype}: {wrong}"
        return self

    half = bfloat16

    def setup_embeddings_and_output_layer(self) -> None:
        """Put the head in the place of megatron-core's output layer, before that is marked as the model's output."""
        if self.post_process:
            self.output_layer = self._head()
        super().setup_embeddings_and_output_layer()

    def _head(self) -> LanguageModelHead | ValueHead | HiddenHead:
        tp_group = self.pg_collection.tp
        if self.spec.head == "value":
            return ValueHead(self.config, self.spec.value_heads, tp_group)
        if self.spec.head == "hidden":
            return HiddenHead(self.config, tp_group)
        return LanguageModelHead(
            self.config,
            vocab_size=self.arch.vocab_size,
            padded_vocab_size=self.vocab_size,
            normalize=self.arch.norm_head,
            temperature=self.spec.temperature,
            tied_here=self.pre_process and self.share_embeddings_and_output_weights,
            fused=self.fused_loss,
            backend=backend_of(self.spec.kernels.cross_entropy),
            tp_group=tp_group,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """GPTModel's, but for a head without a weight, which GPTModel does not know."""
        if self.spec.head == "hidden":
            return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Any, position_ids: Any, labels: Tensor | None, *_: Any, **__: Any
    ) -> Tensor:
        """What GPTModel does after the decoder: nothing on a middle stage, the head on the last.

        The other arguments serve multi-token prediction and megatron-core's own inference, which this model has not.
        """
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer.finish(hidden_states, labels, weight)


def build_chunks(spec: ModelSpec, ctx: ParallelContext, *, meta: bool = False) -> list[LanguageModel]:
    """This rank's model chunks (one, or vpp of them), with uninitialised weights.

    Args:
        meta: build on the meta device: shapes and counts of any size, no memory.

    Raises:
        ConfigError: a kernel that does not run here is asked for, or a pattern of `frozen` names no parameter.
    """
    check_platform(spec, ctx.platform)
    fused_loss = fuses_loss(spec.kernels, ctx.platform)
    spec = dataclasses.replace(spec, kernels=kernels_of(spec.kernels, ctx.platform))
    tf_config = transformer_config(spec, ctx.platform, meta=meta)
    vpp = spec.parallel.vpp
    chunks = []
    with torch.device("meta" if meta else ctx.platform.device):
        for stage in range(vpp):
            vp_stage = stage if vpp > 1 else None
            chunks.append(
                LanguageModel(
                    spec,
                    tf_config,
                    fused_loss=fused_loss,
                    pre=is_pp_first_stage(ctx.groups.pp) and is_vp_first_stage(vp_stage, vpp),
                    post=ctx.is_last_stage and is_vp_last_stage(vp_stage, vpp),
                    vp_stage=vp_stage,
                    groups=ctx.groups,
                )
            )
    if spec.lora is not None:
        for chunk in chunks:
            attach_adapters(chunk, spec.lora, ctx, spec.seed)
    freeze(chunks, spec, ctx)
    return chunks


def check_platform(spec: ModelSpec, platform: Platform) -> None:
    """Refuse a precision or a choice of kernels that this platform cannot run.

    Raises:
        ConfigError: triton, or bf16, where the platform has none.
    """
    if spec.precision == "bf16" and not platform.bf16:
        raise ConfigError(f"train.precision is bf16, which {platform.name} does not compute: use fp16 or fp32")
    chosen = [name for name, choice in spec.kernels.model_dump().items() if choice == "triton"]
    if chosen and not platform.triton and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"kernels.{chosen[0]} is triton, which does not run on {platform.name} (only with TRITON_INTERPRET=1): "
            "use auto or torch"
        )


def kernels_of(kernels: Kernels, platform: Platform) -> Kernels:
    """The kernels with `auto` resolved to torch where Triton does not run, whatever the type of the platform's tensors."""
    if platform.triton:
        return kernels
    chosen = {name: choice for name, choice in kernels.model_dump().items() if name != "linear_cross_entropy"}
    return kernels.model_copy(update={name: "torch" for name, choice in chosen.items() if choice == "auto"})


def fuses_loss(kernels: Kernels, platform: Platform) -> bool:
    """Whether output layer and loss are one operator; see config.Kernels."""
    choice = kernels.linear_cross_entropy
    return choice == "fused" or (choice == "auto" and platform.triton)


def freeze(chunks: list[LanguageModel], spec: ModelSpec, ctx: ParallelContext) -> None:
    """Exclude the parameters that the spec freezes from training: those that match a pattern, or all but the adapters.

    Raises:
        ConfigError: on every rank, where a pattern names no parameter of any rank, or a stage has nothing to train.
    """
    if not spec.frozen and spec.lora is None:
        return
    names, trained = [], 0
    for chunk in chunks:
        # On a last stage of its own, a tied output layer is a copy of the embedding: it is frozen, or trained, with it.
        copied = chunk.share_embeddings_and_output_weights and not chunk.pre_process
        for name, parameter in named_shards(chunk).items():
            names.append(EMBEDDING_NAME if copied and name == OUTPUT_NAME else name)
            parameter.requires_grad_(not spec.is_frozen(names[-1]))
            trained += parameter.requires_grad
        if chunk.pre_process and not any(p.requires_grad for p in chunk.embedding.parameters()):
            # Full recompute passes gradients only to an input that asks for one; a frozen embedding's output does not.
            chunk.embedding.register_forward_hook(_requires_grad)
    matched = {pattern for pattern in spec.frozen if fnmatch.filter(names, pattern)}
    found = ctx.gather((matched, trained))
    unknown = set(spec.frozen) - set().union(*(patterns for patterns, _ in found))
    if unknown:
        raise ConfigError(
            f"train.frozen: {sorted(unknown)[0]!r} matches no parameter; names look like decoder.layers.0.*"
        )
    if not all(count for _, count in found):
        raise ConfigError("train.frozen leaves a pipeline stage without a parameter to train: freeze less, or lower pp")


def _requires_grad(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if module.training and torch.is_grad_enabled() else output


def named_shards(chunk: LanguageModel) -> dict[str, nn.Parameter]:
    """A chunk's parameters under names that no layout changes: layers counted over the whole model."""
    offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0

    def global_name(name: str) -> str:
        head, found, rest = name.partition("decoder.layers.")
        if not found:
            return name
        layer, _, tail = rest.partition(".")
        return f"{head}decoder.layers.{int(layer) + offset}.{tail}"

    return {global_name(name): parameter for name, parameter in chunk.named_parameters()}


def wrap_chunks(chunks: list[LanguageModel], spec: ModelSpec, ctx: ParallelContext) -> list[MegatronModule]:
    """DistributedDataParallel around every chunk: gradient buffers, reduce-scatter overlapped with the backward pass.

    With several chunks a rank, all stages gather a chunk's parameters while the chunk before it runs. Otherwise each stage
    would wait for its own gather before it sends anything on, and a pipeline of many stages for one after another.
    """
    overlap = ctx.replicas > 1
    gathers = overlap and ctx.platform.overlaps_param_gather
    ahead = gathers and len(chunks) > 1
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=gathers,
        align_param_gather=ahead,
    )
    tf_config = chunks[0].config
    half = spec.precision != "fp32"
    modules = [Float16Module(tf_config, chunk) if half else chunk for chunk in chunks]
    wrapped = [
        DistributedDataParallel(tf_config, ddp, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    tf_config.finalize_model_grads_func = functools.partial(finalize_gradients, ctx)
    if overlap:
        tf_config.no_sync_func = _each([w.no_sync for w in wrapped])
        if spec.parallel.pp > 1:
            tf_config.grad_sync_func = _each([w.start_grad_sync for w in wrapped])
        if ahead:
            tf_config.param_sync_func = [w.start_param_sync for w in wrapped]
    return wrapped


def finalize_gradients(
    ctx: ParallelContext, chunks: list[MegatronModule], num_tokens: Tensor | None = None, **options: Any
) -> None:
    """megatron-core's finalize_model_grads, without the wait for the device in it.

    megatron-core asks the host whether `num_tokens > 0` before it divides the gradients. Dividing by at least 1 needs no
    answer: where no token counts, the gradients are 0.
    """
    finalize_model_grads(chunks, None, **options)
    if num_tokens is not None:
        # Only the last stage has counted them.
        dist.broadcast(num_tokens, src=get_pp_last_rank(ctx.groups.pp), group=ctx.groups.pp)
        dist.all_reduce(num_tokens, group=ctx.groups.dp_cp)
        for chunk in chunks:
            chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def _each(functions: list[Callable]) -> Callable | list[Callable]:
    return functions if len(functions) > 1 else functions[0]


def unwrap(module: nn.Module) -> LanguageModel:
    """The LanguageModel inside DistributedDataParallel and Float16Module."""
    inner: Any = module
    while not isinstance(inner, LanguageModel):
        inner = inner.module
    return inner
