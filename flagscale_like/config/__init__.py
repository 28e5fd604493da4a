"""RunConfig: one YAML file, dotted overrides, and errors that name the file, the line and the nearest known key."""

from flagscale_like.config.groups import (
    Checkpoint,
    Data,
    KernelChoice,
    Kernels,
    Monitors,
    Offload,
    Optimizer,
    Parallel,
    Prepare,
    Profile,
    RampUp,
    Resilience,
    Source,
    Train,
)
from flagscale_like.config.load import load_config
from flagscale_like.config.run import RunConfig

__all__ = [
    "Checkpoint",
    "Data",
    "KernelChoice",
    "Kernels",
    "Monitors",
    "Offload",
    "Optimizer",
    "Parallel",
    "Prepare",
    "Profile",
    "RampUp",
    "Resilience",
    "RunConfig",
    "Source",
    "Train",
    "load_config",
]
