"""A plug-in as a vendor writes it: a platform, and a communication backend that torch does not know.

The device is the CPU, and the backend is gloo under another name, so that it runs everywhere.
"""

from typing import Any

import torch
import torch.distributed as dist

from flagscale_like.runtime.platforms.cpu import CpuPlatform, HostStream

ASKED: set[str] = set()
"""What megatron-core has asked of `torch.cuda`."""
GROUPS: list[int] = []
"""The size of every process group made through the backend."""


class ExampleNamespace:
    """What a vendor's package gives as torch.example. It has these names and no others."""

    Stream = Event = HostStream

    def __getattribute__(self, name: str) -> Any:
        ASKED.add(name)
        return object.__getattribute__(self, name)

    def synchronize(self, device: object = None) -> None: ...

    def empty_cache(self) -> None: ...

    def current_stream(self, device: object = None) -> HostStream:
        return HostStream()

    default_stream = current_stream

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()


def open_group(options: Any, _: object = None) -> Any:
    """The vendor's ProcessGroup for one group of ranks."""
    GROUPS.append(options.group_size)
    return dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, timeout=options.timeout)


class ExampleChip(CpuPlatform):
    """The CPU, as a chip with a namespace and a library of its own. A real chip's class derives from Platform."""

    name, backend = "example", "exampleccl"
    waits_for_exchanges = True  # as a maker's platform does that sets nothing

    @classmethod
    def prepare(cls) -> None:
        dist.Backend.register_backend(cls.backend, open_group, extended_api=True, devices=["cpu"])

    def cuda_namespace(self) -> Any:
        return ExampleNamespace()
