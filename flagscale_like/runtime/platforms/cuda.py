"""NVIDIA GPUs, and what speaks CUDA as they do."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch

from flagscale_like.runtime.platforms.base import Platform


class CudaPlatform(Platform):
    """The platform that megatron-core is written for: nothing of it is patched."""

    name, torch_type, backend, visible_env = "cuda", "cuda", "nccl", "CUDA_VISIBLE_DEVICES"
    needs_shim = False
    compiles = True
    triton = True
    waits_for_exchanges = False
    profiler_activity = torch.profiler.ProfilerActivity.CUDA

    @classmethod
    def missing(cls) -> str | None:
        reason = super().missing()
        return "torch sees no CUDA device" if reason and cls.module is None else reason

    @classmethod
    def count(cls) -> int:
        return torch.cuda.device_count()  # unlike is_available(), it leaves CUDA untouched where NVML answers

    @property
    def fuses_main_grad(self) -> bool:
        """Whether apex is there, with its matrix product that accumulates into main_grad."""
        return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None

    def make_current(self) -> None:
        torch.cuda.set_device(self.device)

    def side_stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def on_stream(self, stream: Any) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()

    def compute_stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def total_memory_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory
