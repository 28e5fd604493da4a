"""The learning-rate schedule, on megatron-core's scheduler."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from flagscale_like.config import RunConfig


def build_scheduler(optimizer: MegatronOptimizer, config: RunConfig) -> OptimizerParamScheduler:
    """Warm-up from 0, then cosine, linear, constant, or WSD (Hu et al. 2024); counted in optimizer steps."""
    options, steps = config.optimizer, config.train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if options.schedule == "wsd" else options.schedule,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=options.decay_steps if options.schedule == "wsd" else None,
        lr_wsd_decay_style="linear" if options.schedule == "wsd" else None,
    )
