"""The host itself, with gloo: laptops, tests, and machines whose devices are hidden."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from typing import Any

import torch

from flagscale_like.runtime.platforms.base import Platform


class HostStream:
    """Stands for torch.cuda.Stream and torch.cuda.Event on a machine where work is already in order."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: object) -> HostStream:
        return self

    record = wait = wait_event

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 0.0


class HostNamespace:
    """Answers for torch.cuda on a machine without a device; what is not listed here is torch.cuda's own."""

    Stream = Event = HostStream

    def is_available(self) -> bool:
        return False

    def synchronize(self, *_: object) -> None: ...

    def empty_cache(self) -> None: ...

    def current_stream(self, *_: object) -> HostStream:
        return HostStream()

    default_stream = current_stream

    def stream(self, *_: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, *_: object, **__: object) -> torch.Tensor:
        return torch.get_rng_state()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class CpuPlatform(Platform):
    """All ranks of a node share its cores and its memory."""

    name, torch_type, backend = "cpu", "cpu", "gloo"
    claims = False  # what is left where nothing else claims the machine
    has_streams = pins_memory = overlaps_param_gather = waits_for_exchanges = counts_device_memory = False
    ranks_share_device = True
    gemm_size, copy_bytes = 1024, 32 << 20

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cpu")

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def count(cls) -> int:
        return 1

    @property
    def group_device(self) -> None:
        return None

    def make_current(self) -> None: ...

    def cuda_namespace(self) -> Any:
        return HostNamespace()

    def describe(self) -> str:
        return f"CPU ({torch.get_num_threads()} threads)"

    def rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def synchronize(self) -> None: ...

    def peak_memory_bytes(self) -> int:
        """Most bytes that were resident in this process."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # ru_maxrss: bytes on macOS, KiB on Linux

    def reset_peak_memory(self) -> None:
        """Nothing: the peak of a process cannot be reset."""

    def total_memory_bytes(self) -> int:
        """Bytes the host has."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
