"""RunConfig: the configuration of a run, read from one YAML file and dotted overrides."""

from flagscale_like.config.groups import (
    Chat,
    Checkpoint,
    ContextParallelKind,
    Data,
    KernelChoice,
    Kernels,
    Offload,
    Optimizer,
    Parallel,
    Prepare,
    Profile,
    RampUp,
    Resilience,
    Source,
    Train,
    parts_of_row,
)
from flagscale_like.config.health import (
    EffectiveRank,
    Init,
    LayerNorms,
    Monitors,
    MuP,
    Salience,
    Selection,
    Spike,
)
from flagscale_like.config.load import load_config
from flagscale_like.config.lora import Lora
from flagscale_like.config.objectives import Contrastive, DirectPreference, NextTokenLoss, RewardModel
from flagscale_like.config.run import RunConfig, check_layout

__all__ = [
    "Chat",
    "Checkpoint",
    "ContextParallelKind",
    "Contrastive",
    "Data",
    "DirectPreference",
    "EffectiveRank",
    "Init",
    "KernelChoice",
    "Kernels",
    "LayerNorms",
    "Lora",
    "Monitors",
    "MuP",
    "NextTokenLoss",
    "Offload",
    "Optimizer",
    "Parallel",
    "Prepare",
    "Profile",
    "RampUp",
    "Resilience",
    "RewardModel",
    "RunConfig",
    "Salience",
    "Selection",
    "Source",
    "Spike",
    "Train",
    "check_layout",
    "load_config",
    "parts_of_row",
]
