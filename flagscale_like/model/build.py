"""ModelArch -> TransformerConfig -> GPTModel chunks -> DistributedDataParallel."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_vp_first_stage, is_vp_last_stage
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor, nn

from flagscale_kernels import cross_entropy
from flagscale_like.arch import ModelArch
from flagscale_like.config import Kernels, RunConfig
from flagscale_like.errors import ConfigError
from flagscale_like.model.layer_spec import block_spec
from flagscale_like.model.modules import OutputLayer, backend_of
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.platforms import Platform

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def transformer_config(config: RunConfig, platform: Platform, *, meta: bool = False) -> TransformerConfig:
    """megatron-core's description of the model and its layout.

    Args:
        meta: leave the device open, for building under torch.device("meta").
    """
    arch, par, train = config.model, config.parallel, config.train
    dtype = DTYPES[train.precision]
    interleaved = par.vpp > 1
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
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        tensor_model_parallel_size=par.tp,
        pipeline_model_parallel_size=par.pp,
        virtual_pipeline_model_parallel_size=par.vpp if interleaved else None,
        num_layers_in_first_pipeline_stage=par.first_stage_layers,
        num_layers_in_last_pipeline_stage=par.last_stage_layers,
        sequence_parallel=par.sp,
        context_parallel_size=par.cp,
        # Two messages to one neighbour cross in a batched exchange: interleaved with pp 2 trains on swapped chunks.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=True,
        recompute_granularity=None if train.recompute == "none" else train.recompute,
        recompute_method="uniform" if train.recompute == "full" else None,
        recompute_num_layers=1 if train.recompute == "full" else None,
        calculate_per_token_loss=True,
        # initialize_weights() fills the weights, alike on every layout. megatron-core's own initialisation still has to run:
        # it marks which parameters are tensor-parallel, without which the gradient norm leaves shards out.
        perform_initialization=not meta,
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=meta,
        gradient_accumulation_fusion=platform.fuses_main_grad and not meta,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )


def _leave(weight: Tensor) -> None:
    """An initialisation that leaves the weight as it is."""


class LanguageModel(GPTModel):
    """GPTModel with our layer spec and output layer. Positions live in the core attention: megatron-core adds none."""

    def __init__(
        self,
        arch: ModelArch,
        config: TransformerConfig,
        *,
        kernels: Kernels,
        max_seq_length: int,
        pre: bool,
        post: bool,
        vp_stage: int | None,
    ) -> None:
        self.cross_entropy_backend = backend_of(kernels.cross_entropy)
        self.arch = arch  # setup_embeddings_and_output_layer() reads it while GPTModel is built
        super().__init__(
            config,
            block_spec(arch, kernels, config, vp_stage),
            vocab_size=arch.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=max_seq_length,
            pre_process=pre,
            post_process=post,
            position_embedding_type="none",
            share_embeddings_and_output_weights=arch.tie_embeddings,
            vp_stage=vp_stage,
        )

    def setup_embeddings_and_output_layer(self) -> None:
        """Put our output layer in the place of megatron-core's, before it marks the weight as the model's output."""
        if self.post_process:
            self.output_layer = OutputLayer(
                self.config,
                vocab_size=self.arch.vocab_size,
                padded_vocab_size=self.vocab_size,
                normalize=self.arch.norm_head,
                tied_here=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
            )
        super().setup_embeddings_and_output_layer()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each token over the tensor-parallel vocabulary, with one collective.

        Args:
            labels: [b, s].
            logits: [s, b, v/tp]; the backward pass writes their gradient over them.

        Returns:
            fp32 [b, s].
        """
        loss = cross_entropy(
            logits, labels.t(), group=self.pg_collection.tp, reduction="none", backend=self.cross_entropy_backend
        )
        return loss.t()


def build_chunks(config: RunConfig, ctx: ParallelContext, *, meta: bool = False) -> list[LanguageModel]:
    """This rank's model chunks (one, or vpp of them), with uninitialised weights.

    Args:
        meta: build on the meta device: shapes and counts of any size, no memory.
    """
    check_kernels(config, ctx.platform)
    kernels = kernels_of(config, ctx.platform)
    tf_config = transformer_config(config, ctx.platform, meta=meta)
    vpp = config.parallel.vpp
    chunks = []
    with torch.device("meta" if meta else ctx.platform.device):
        for stage in range(vpp):
            vp_stage = stage if vpp > 1 else None
            chunks.append(
                LanguageModel(
                    config.model,
                    tf_config,
                    kernels=kernels,
                    max_seq_length=config.train.seq_length,
                    pre=is_pp_first_stage(ctx.groups.pp) and is_vp_first_stage(vp_stage, vpp),
                    post=ctx.is_last_stage and is_vp_last_stage(vp_stage, vpp),
                    vp_stage=vp_stage,
                )
            )
    return chunks


def check_kernels(config: RunConfig, platform: Platform) -> None:
    """Refuse a choice of kernels that this platform cannot run.

    Raises:
        ConfigError: triton, or bf16, where the platform has none.
    """
    if config.train.precision == "bf16" and not platform.bf16:
        raise ConfigError(f"train.precision is bf16, which {platform.name} has no products for: use fp16 or fp32")
    chosen = [name for name, choice in config.kernels.model_dump().items() if choice == "triton"]
    if chosen and not platform.triton and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"kernels.{chosen[0]} is triton, which does not run on {platform.name} (but with TRITON_INTERPRET=1): "
            f"use auto or torch"
        )


def kernels_of(config: RunConfig, platform: Platform) -> Kernels:
    """The configured kernels; `auto` is torch on a platform that Triton kernels do not run on, whatever its tensors' type."""
    if platform.triton:
        return config.kernels
    return config.kernels.model_copy(
        update={name: "torch" for name, choice in config.kernels.model_dump().items() if choice == "auto"}
    )


def named_shards(chunk: LanguageModel) -> dict[str, Tensor]:
    """A chunk's parameters under names that no layout changes: layers counted over the whole model."""
    offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0

    def global_name(name: str) -> str:
        head, found, rest = name.partition("decoder.layers.")
        if not found:
            return name
        layer, _, tail = rest.partition(".")
        return f"{head}decoder.layers.{int(layer) + offset}.{tail}"

    return {global_name(name): parameter for name, parameter in chunk.named_parameters()}


def matrix_std(name: str, config: RunConfig) -> float:
    """Standard deviation that a matrix is drawn with.

    init_std; for the two that write to the residual stream output_init_std, or, depth-scaled, init_std / sqrt(2 * num_layers)
    (Radford et al. 2019). muP (Yang et al. 2022, table 8) divides by sqrt(m) where both sides grow with the width,
    m = hidden_size / base_hidden_size, and by m in the output layer. The table's output multiplier 1 / m is that second
    factor: with Adam, a multiplier can be moved into the standard deviation and the learning rate.

    Args:
        name: from `named_shards`.
    """
    arch, init = config.model, config.init
    std, scaled = arch.init_std, init.scheme == "depth_scaled"
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std = arch.output_init_std or (std / (2 * arch.num_layers) ** 0.5 if scaled else std)
    if init.mup and "word_embeddings" not in name:
        width = arch.hidden_size / init.mup.base_hidden_size
        std /= width if name.endswith("output_layer.weight") else width**0.5
    return std


@torch.no_grad()
def initialize_weights(chunks: list[LanguageModel], config: RunConfig, ctx: ParallelContext) -> None:
    """Fill the weights from (seed, parameter name), so that one seed gives one model on every layout.

    Each rank draws the full matrix and keeps its own part. Normal, with `matrix_std`; norms are norm_init, q's and k's own
    norms 1. Biases and the rows of the padded vocabulary are zero.
    """
    arch, tp, rank = config.model, config.parallel.tp, ctx.tp_rank
    for chunk in chunks:
        for name, parameter in named_shards(chunk).items():
            if parameter.dim() == 1:
                own_norm = name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0 if own_norm else arch.norm_init)
                continue
            if chunk.share_embeddings_and_output_weights:
                # The last stage's copy of a tied embedding must be drawn as the first stage's.
                name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
            to_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
            dim = 1 if to_residual else 0 if dim < 0 else dim
            shape[dim] *= tp
            vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
            padded = shape[0]
            if vocabulary:
                shape[0] = arch.vocab_size  # padding must not shift the numbers drawn
            digest = hashlib.sha256(f"{config.train.seed}/{name}".encode()).digest()
            generator = ctx.platform.generator(int.from_bytes(digest[:6], "little"))
            full = torch.empty(shape, device=ctx.platform.device, dtype=torch.float32)
            full.normal_(0.0, matrix_std(name, config), generator=generator)
            if vocabulary:
                full = F.pad(full, (0, 0, 0, padded - arch.vocab_size))
            if name.endswith("linear_fc1.weight"):  # each rank holds [its gate; its up]
                gate, up = full.chunk(2)
                full = torch.cat([torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)])
            parameter.copy_(full.chunk(tp, dim=dim)[rank])


def wrap_chunks(chunks: list[LanguageModel], config: RunConfig, ctx: ParallelContext) -> list[MegatronModule]:
    """DistributedDataParallel around every chunk: gradient buffers, reduce-scatter overlapped with the backward pass."""
    overlap = ctx.dp > 1
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and ctx.platform.overlaps_param_gather,
    )
    tf_config = chunks[0].config
    half = config.train.precision != "fp32"
    modules = [Float16Module(tf_config, chunk) if half else chunk for chunk in chunks]
    wrapped = [
        DistributedDataParallel(tf_config, ddp, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    tf_config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        tf_config.no_sync_func = _each([w.no_sync for w in wrapped])
        if config.parallel.pp > 1:
            tf_config.grad_sync_func = _each([w.start_grad_sync for w in wrapped])
    return wrapped


def _each(functions: list[Callable]) -> Callable | list[Callable]:
    return functions if len(functions) > 1 else functions[0]


def unwrap(module: nn.Module) -> LanguageModel:
    """The LanguageModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(module, LanguageModel):
        module = module.module
    return module
