"""The one place that knows CUDA from CPU: device, backend, streams, pinned memory, memory statistics, RNG."""

from __future__ import annotations

import functools
import importlib.util
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from flagscale_like.errors import PlatformError


@dataclass(frozen=True)
class Platform:
    """What this process computes on.

    Attributes:
        device: the tensor device of this rank.
        backend: the torch.distributed backend.
    """

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def can_fuse_gradient_accumulation(self) -> bool:
        """Whether there is a GEMM that accumulates into main_grad: apex's on CUDA, torch's on CPU (cpu_shim, 6)."""
        return not self.is_cuda or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None

    def describe(self) -> str:
        """The device in words, for logs and checkpoints."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({torch.get_num_threads()} threads)"

    def seed(self, seed: int) -> None:
        """Seed torch's default generator of the device; not the model-parallel streams."""
        torch.manual_seed(seed)

    def generator(self, seed: int) -> torch.Generator:
        """A generator on the device."""
        return torch.Generator(device=self.device).manual_seed(seed)

    def rng_state(self) -> torch.Tensor:
        """State of the device's default generator, uint8 on the host."""
        return torch.cuda.get_rng_state(self.device) if self.is_cuda else torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Put back what rng_state() returned."""
        if self.is_cuda:
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def side_stream(self) -> torch.cuda.Stream | None:
        """A stream for copies beside the compute; None on CPU, where work is in order anyway."""
        return torch.cuda.Stream(self.device) if self.is_cuda else None

    def on_stream(self, stream: torch.cuda.Stream | None) -> AbstractContextManager:
        """Run on `stream`; nothing on CPU."""
        return torch.cuda.stream(stream) if stream is not None else nullcontext()

    def compute_stream(self) -> torch.cuda.Stream:
        """The stream that compute is queued on; CUDA only."""
        return torch.cuda.current_stream(self.device)

    def event(self) -> torch.cuda.Event:
        """An event that can be timed; CUDA only."""
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def host_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised [numel] host tensor, pinned where there is a device to copy from."""
        return torch.empty(numel, dtype=dtype, pin_memory=self.is_cuda)

    def peak_memory_bytes(self) -> int:
        """Most bytes in use so far: allocated on the GPU, or resident in this process."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # ru_maxrss: bytes on macOS, KiB on Linux

    def reset_peak_memory(self) -> None:
        """Count the peak from here on; on a CPU it cannot be reset."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def total_memory_bytes(self) -> int:
        """Bytes the device (or the host) has."""
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def get_platform() -> Platform:
    """Find this rank's device and make it current. FLAGSCALE_LIKE_DEVICE=cpu hides the GPUs.

    Raises:
        PlatformError: FLAGSCALE_LIKE_DEVICE names something else, or there is no GPU for this local rank.
    """
    wanted = os.environ.get("FLAGSCALE_LIKE_DEVICE", "")
    if wanted not in ("", "cpu", "cuda"):
        raise PlatformError(f"FLAGSCALE_LIKE_DEVICE is {wanted!r}: use cpu or cuda, or leave it unset")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise PlatformError("FLAGSCALE_LIKE_DEVICE is cuda, but torch sees no CUDA device: `flagscale-like doctor`")
    # megatron-core overlaps TP communication with GEMMs by the order of kernel launches (tensor_parallel/layers.py), and
    # warns on every rank, CPU or not, where this is not set.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if wanted == "cpu" or not torch.cuda.is_available():
        return Platform(torch.device("cpu"), "gloo")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise PlatformError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; start fewer processes a node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return Platform(device, "nccl")
