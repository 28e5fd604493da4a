"""This rank's random streams: torch's default stream of the device, and megatron-core's for each kind of parallelism."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from flagscale_like.runtime.platforms import Platform


def random_states(platform: Platform) -> dict[str, Tensor]:
    """The state of every stream, by name, as uint8 tensors on the host."""
    return {
        "rng.default": platform.rng_state(),
        **{f"rng.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def set_random_states(platform: Platform, states: Mapping[str, Tensor]) -> None:
    """Put back what random_states() returned."""
    platform.set_rng_state(states["rng.default"])
    tracker = get_cuda_rng_tracker()
    own = tracker.get_states()
    tracker.set_states({name: states.get(f"rng.{name}", state) for name, state in own.items()})
