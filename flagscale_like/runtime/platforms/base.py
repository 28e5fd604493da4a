"""Platform: what a rank computes on, and what that device can do."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from flagscale_like.cluster import DeviceSpec, find_device


class Platform:
    """One kind of device; an instance is the device of this rank. What is here goes through torch.accelerator.

    A subclass names its device and its collective backend, and changes what differs. The class attributes are its
    capabilities: outside runtime/ nobody asks which device it is, only what it can do. The class methods say what this
    machine has, without making a device current.

    Attributes:
        device: the tensor device of this rank.
    """

    name: ClassVar[str]
    """The word that FLAGSCALE_LIKE_DEVICE takes."""
    torch_type: ClassVar[str]
    """The type of its torch.device."""
    backend: ClassVar[str]
    """The torch.distributed backend of its collectives."""
    module: ClassVar[str | None] = None
    """The Python package that brings the device to torch; None: torch has it."""
    visible_env: ClassVar[str | None] = None
    """The environment variable that lists the devices a process sees."""
    environment: ClassVar[Mapping[str, str]] = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    """Environment variables that are set where they are unset, before the device is first used.

    megatron-core overlaps TP communication with matrix products by the order in which CUDA launches kernels
    (tensor_parallel/layers.py), and warns on every rank, CUDA or not, where this one is not set.
    """
    not_run: ClassVar[bool] = False
    """Written from the vendor's documents, and never run on the device."""
    claims: ClassVar[bool] = True
    """Whether it is chosen where FLAGSCALE_LIKE_DEVICE is unset and the machine has it."""

    needs_shim: ClassVar[bool] = True
    """megatron-core, written for CUDA, has to be told of this device (device_shim)."""
    compiles: ClassVar[bool] = False
    """megatron-core may compile its fusions with torch.compile."""
    has_streams: ClassVar[bool] = True
    """Work is queued: copies run beside the compute, and a collective reads its input in the queue's order."""
    pins_memory: ClassVar[bool] = True
    """Copies from page-locked host memory run by themselves."""
    overlaps_param_gather: ClassVar[bool] = True
    """The gather of updated parameters runs beside the forward pass."""
    waits_for_exchanges: ClassVar[bool] = True
    """The host waits for the device after each batched exchange between stages (megatron-core's batch_p2p_sync).

    Up to torch 1.12 a wait for a batch of NCCL's messages waited for nothing (pytorch/pytorch#82450). torch's own backends
    are past that; a maker's backend has to be shown to be.
    """
    counts_device_memory: ClassVar[bool] = True
    """The device has memory of its own, and torch counts what is allocated there."""
    ranks_share_device: ClassVar[bool] = False
    """The ranks of a node share one device, its cores and its memory."""
    triton: ClassVar[bool] = False
    """Our Triton kernels run here; where not, `auto` is each operator's torch path."""
    holds_data: ClassVar[bool] = True
    """Tensors have values; those of a rehearsed device have none, so that no weights have to be read."""
    bf16: ClassVar[bool] = True
    """Matrix products in bf16."""
    profiler_activity: ClassVar[torch.profiler.ProfilerActivity | None] = None
    """What torch.profiler records of the device, beside the CPU."""
    gemm_size: ClassVar[int] = 8192
    """Rows and columns of the matrix product that measures it."""
    copy_bytes: ClassVar[int] = 256 << 20
    """Bytes of the copy that measures its memory."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device(self.torch_type, index)

    # What this machine has.

    @classmethod
    def missing(cls) -> str | None:
        """Why this process cannot use the device, in words that follow "but"; None where it can."""
        if cls.module is not None and importlib.util.find_spec(cls.module) is None:
            return f"the package {cls.module} is not installed"
        if cls.module is not None:
            try:
                importlib.import_module(cls.module)
            except (
                Exception
            ) as error:  # a vendor's package fails in its own ways: a driver, a library, a version of torch
                return f"{cls.module} cannot be imported ({type(error).__name__}: {_first_line(error)})"
        namespace = getattr(torch, cls.torch_type, None)
        if namespace is None or not hasattr(namespace, "is_available"):
            return f"this torch has no torch.{cls.torch_type}"
        return None if cls.count() else f"torch.{cls.torch_type} sees no device"

    @classmethod
    def count(cls) -> int:
        """Devices of this node that the process sees."""
        namespace = getattr(torch, cls.torch_type)
        return namespace.device_count() if namespace.is_available() else 0

    @classmethod
    def missing_backend(cls) -> str | None:
        """Why the ranks cannot talk to each other, as `missing` says it; None where they can."""
        if dist.is_backend_available(cls.backend):
            return None
        return f"this torch has no communication backend {cls.backend!r}"

    @classmethod
    def prepare(cls) -> None:
        """A plug-in's hook: what has to happen before megatron-core is imported. Called once, when the platform is chosen."""

    def make_current(self) -> None:
        """Allocate and compute on this rank's device from now on."""
        torch.accelerator.set_device_index(self.device)

    # What megatron-core is given (device_shim).

    def cuda_namespace(self) -> Any:
        """What answers for `torch.cuda` inside megatron-core: the device's own namespace."""
        return torch.get_device_module(self.device)

    @property
    def fuses_main_grad(self) -> bool:
        """Whether there is a matrix product that accumulates into main_grad: with the shim torch's (device_shim, 6)."""
        return self.needs_shim

    @property
    def pins_batches(self) -> bool:
        """Whether the loader puts micro-batches into page-locked memory."""
        return self.pins_memory

    @property
    def group_device(self) -> torch.device | None:
        """The device that torch.distributed is bound to; None leaves it open."""
        return self.device

    def all_gather_object(self, values: list, value: object) -> None:
        """Fill `values` with every rank's `value`, which can be pickled."""
        dist.all_gather_object(values, value)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, of numbers that the host is about to read."""
        return tensor.cpu()

    def to_numpy(self, tensor: torch.Tensor) -> np.ndarray:
        """The numbers of a tensor on the device, which the host waits for."""
        return self.to_host(tensor).numpy()

    # What it is.

    def describe(self) -> str:
        """The device in words, for logs and checkpoints."""
        namespace = torch.get_device_module(self.device)
        return namespace.get_device_name(self.device) if hasattr(namespace, "get_device_name") else self.name

    def data_sheet(self) -> DeviceSpec | None:
        """Its maker's figures, where we have them."""
        return find_device(self.describe())

    # Random numbers.

    def generator(self, seed: int) -> torch.Generator:
        """A generator on the device."""
        return torch.Generator(device=self.device).manual_seed(seed)

    def rng_state(self) -> torch.Tensor:
        """State of the device's default generator, uint8 on the host."""
        return torch.get_device_module(self.device).get_rng_state(self.device)

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Put back what rng_state() returned."""
        torch.get_device_module(self.device).set_rng_state(state, self.device)

    # Streams and host memory.

    def side_stream(self) -> torch.Stream | None:
        """A stream for copies beside the compute; None where there are no streams, and work is in order anyway."""
        return torch.Stream(self.device) if self.has_streams else None

    def on_stream(self, stream: torch.Stream | None) -> contextlib.AbstractContextManager:
        """Run on `stream`; None changes nothing."""
        return stream if stream is not None else contextlib.nullcontext()

    def compute_stream(self) -> torch.Stream:
        """The stream that compute is queued on; only where there are streams."""
        return torch.accelerator.current_stream(self.device)

    def event(self) -> torch.Event:
        """An event that can be timed; only where there are streams."""
        return torch.Event(self.device, enable_timing=True)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.accelerator.synchronize(self.device)

    def host_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised [numel] host tensor, pinned where copies gain by it."""
        return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=self.pins_memory)

    # Device memory.

    def peak_memory_bytes(self) -> int:
        """Most bytes in use so far."""
        return torch.accelerator.max_memory_allocated(self.device)

    def give_back_memory(self) -> None:
        """Give the device what the allocator keeps and nothing uses."""
        if self.counts_device_memory:
            torch.accelerator.empty_cache()

    def reset_peak_memory(self) -> None:
        """Count the peak from here on."""
        self.give_back_memory()
        torch.accelerator.reset_peak_memory_stats(self.device)

    def total_memory_bytes(self) -> int:
        """Bytes the device has."""
        return torch.accelerator.get_memory_info(self.device)[1]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
