"""AdamW over megatron-core's distributed optimizer."""

from __future__ import annotations

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.transformer.module import MegatronModule

from flagscale_like.arch import Role
from flagscale_like.config import Optimizer
from flagscale_like.model.build import named_shards, unwrap
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.precision import DTYPES


def build_optimizer(chunks: list[MegatronModule], spec: ModelSpec, options: Optimizer) -> MegatronOptimizer:
    """The optimizer of this rank's wrapped chunks: fp32 master weights and moments, sharded over data parallelism (ZeRO-1,
    Rajbhandari et al. 2020). apex's or Transformer Engine's fused Adam where installed, else torch's fused AdamW.
    """
    precision = spec.precision
    settings = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        clip_grad=options.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        initial_loss_scale=options.initial_loss_scale,
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=True,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
    )
    overrides = {
        **get_standard_config_overrides(settings),
        **_mup_overrides(chunks, spec, options),
        **_lora_plus_overrides(chunks, spec, options),
    }
    optimizer = get_megatron_optimizer(settings, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True  # one kernel a group; the default makes a dozen passes over the state
    # The schedule multiplies the loss by the fp16 loss scale just before the backward pass.
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _mup_overrides(
    chunks: list[MegatronModule], spec: ModelSpec, options: Optimizer
) -> dict[ParamKey, ParamGroupOverride]:
    """muP's learning rates for Adam (Yang et al. 2022, table 8): lr / m for every matrix but the embedding.

    The embedding keeps `lr`, and so do the norms and biases; weight decay is not touched.
    """
    if spec.init.mup is None:
        return {}
    m = spec.arch.hidden_size / spec.init.mup.base_hidden_size
    scaled = {role for role in Role if role.grows_with_width}
    key = _parameters_of(scaled, "grows with the width", chunks, spec)
    return {key: ParamGroupOverride(max_lr=options.lr / m, min_lr=options.min_lr / m)}


def _lora_plus_overrides(
    chunks: list[MegatronModule], spec: ModelSpec, options: Optimizer
) -> dict[ParamKey, ParamGroupOverride]:
    """LoRA+'s learning rate of B: that of A times lora.plus_ratio (Hayou et al. 2024)."""
    if spec.lora is None or spec.lora.plus_ratio == 1:
        return {}
    ratio = spec.lora.plus_ratio
    key = _parameters_of({Role.ADAPTER_B}, "B of an adapter", chunks, spec)
    return {key: ParamGroupOverride(max_lr=options.lr * ratio, min_lr=options.min_lr * ratio)}


def _parameters_of(roles: set[Role], words: str, chunks: list[MegatronModule], spec: ModelSpec) -> ParamKey:
    """What tells megatron-core which parameters an override is for."""
    table = spec.table
    chosen = {
        id(parameter)
        for chunk in chunks
        for name, parameter in named_shards(unwrap(chunk)).items()
        if table[name].role in roles
    }

    def is_chosen(parameter: torch.nn.Parameter, _: str) -> bool:
        return id(parameter) in chosen

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=words, fn=is_chosen))
