"""The device of a rehearsed rank: it has what another platform's devices have, and no memory. Its tensors have no data.

torch gets a device of its own for it, `rehearsed`, so that the host's tensors and the device's stay apart as on a GPU.
megatron-core is told of it as of any other device (runtime.device_shim).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from flagscale_kernels import stand_for_cuda
from flagscale_like.cluster import DeviceSpec
from flagscale_like.errors import required
from flagscale_like.rehearsal.expected import Expected
from flagscale_like.runtime.platforms import Platform

DEVICE = "rehearsed"
# Capabilities that a rehearsed device has from the platform that it stands for. megatron-core's fusions are compiled on no
# rehearsed device: a plain function allocates as much or more.
CAPABILITIES = (
    "has_streams",
    "pins_memory",
    "overlaps_param_gather",
    "waits_for_exchanges",
    "counts_device_memory",
    "ranks_share_device",
    "triton",
    "bf16",
)


class Observer(Protocol):
    """Who is told what the host asks of the device beside its operators; see recorder.Recorder."""

    def host_waits(self, op: str) -> None: ...

    def on_stream(self, name: str) -> contextlib.AbstractContextManager: ...

    def stream_waits(self, stream: str, handle: int) -> None: ...

    def marks(self, stream: str) -> int: ...

    def gives_back(self) -> None: ...

    def peak_bytes(self) -> int: ...


class Silent:
    """Hears nothing."""

    def host_waits(self, op: str) -> None: ...

    def on_stream(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def stream_waits(self, stream: str, handle: int) -> None: ...

    def marks(self, stream: str) -> int:
        return 0

    def gives_back(self) -> None: ...

    def peak_bytes(self) -> int:
        return 0


class Stream:
    """Stands for torch.cuda.Stream; what it is asked goes to the observer."""

    def __init__(self, platform: RehearsedPlatform, name: str) -> None:
        self._platform, self.name = platform, name

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        self._platform.observer.stream_waits(self.name, event.handle)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._platform)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._platform.observer.host_waits("stream synchronize")

    def query(self) -> bool:
        return True


class Event:
    """Stands for torch.cuda.Event; no time passes between two of them."""

    def __init__(self, platform: RehearsedPlatform) -> None:
        self._platform, self.handle = platform, 0

    def record(self, stream: Stream | None = None) -> None:
        name = stream.name if stream is not None else self._platform.compute.name
        self.handle = self._platform.observer.marks(name)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._platform.compute).wait_event(self)

    def synchronize(self) -> None:
        self._platform.observer.host_waits("event synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Event) -> float:
        return 0.0


class Namespace:
    """Answers for torch.cuda inside megatron-core; what is not listed here is torch.cuda's own."""

    def __init__(self, platform: RehearsedPlatform) -> None:
        self._platform = platform
        self.Event = functools.partial(_event_of, platform)
        self.Stream = functools.partial(_stream_of, platform)

    def is_available(self) -> bool:
        return True

    def synchronize(self, *_: object) -> None:
        self._platform.synchronize()

    def empty_cache(self) -> None:
        self._platform.give_back_memory()

    def current_stream(self, *_: object) -> Stream:
        return self._platform.current

    def default_stream(self, *_: object) -> Stream:
        return self._platform.compute

    def stream(self, stream: Stream) -> contextlib.AbstractContextManager:
        return self._platform.on_stream(stream)

    def manual_seed(self, seed: int) -> None: ...

    def get_rng_state(self, *_: object, **__: object) -> torch.Tensor:
        return self._platform.rng_state()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _event_of(platform: RehearsedPlatform, *_: object, **__: object) -> Event:
    return Event(platform)


def _stream_of(platform: RehearsedPlatform, *_: object, **__: object) -> Stream:
    return platform.side_stream() or platform.compute  # a device without streams has one


class _Now:
    """What belongs to the rehearsal that runs, whichever platform is asked.

    megatron-core is told of the first platform of a process, and asks that one in later rehearsals as well (device_shim).
    """

    observer: Observer = Silent()
    expected = Expected()
    stream: Stream | None = None


class RehearsedPlatform(Platform):
    """A device of the kind `of`, without data. The one that was made last is the one that is rehearsed on.

    Args:
        of: the platform whose capabilities it has.
        spec: the device; its memory is what a rehearsal is measured against.

    Attributes:
        observer: who is told of waits and streams.
        expected: what is known of the tensors.
    """

    torch_type, backend = DEVICE, "fake"
    claims = holds_data = False

    def __init__(self, of: type[Platform], spec: DeviceSpec) -> None:
        make_device()
        super().__init__()
        for name in ("name", *CAPABILITIES):
            setattr(self, name, getattr(of, name))
        self._of, self._spec = of, spec
        self.compute = Stream(self, "compute")
        self._side_streams = 0
        self.observer, _Now.expected, _Now.stream = Silent(), Expected(), self.compute

    @property
    def observer(self) -> Observer:
        return _Now.observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        _Now.observer = observer

    @property
    def expected(self) -> Expected:
        return _Now.expected

    @property
    def current(self) -> Stream:
        return required(_Now.stream, "stream")

    @property
    def fuses_main_grad(self) -> bool:
        """As on the device that it stands for, with the packages of this installation."""
        return self._of.fuses_main_grad.fget(self._of.__new__(self._of))

    @property
    def pins_batches(self) -> bool:
        return False  # torch pins for a device that is there

    def make_current(self) -> None: ...

    def cuda_namespace(self) -> Namespace:
        return Namespace(self)

    def all_gather_object(self, values: list, value: object) -> None:
        """What the other ranks would say is what this one says."""
        values[:] = [value] * len(values)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """As megatron-core does it on CUDA: it waits for the stream of the copies later."""
        return tensor.to("cpu", non_blocking=self.has_streams)

    def to_numpy(self, tensor: torch.Tensor) -> np.ndarray:
        """What is expected of it."""
        return np.array(self.expected.numbers(self.to_host(tensor))).reshape(tuple(tensor.shape))

    def describe(self) -> str:
        return f"{self._spec.name} (rehearsed)"

    def data_sheet(self) -> DeviceSpec:
        return self._spec

    def generator(self, seed: int) -> torch.Generator:
        """The host's: nothing is drawn."""
        return torch.Generator().manual_seed(seed)

    def rng_state(self) -> torch.Tensor:
        """A state of the size that a CUDA generator's has."""
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor) -> None: ...

    def side_stream(self) -> Any:
        """A Stream of this module."""
        if not self.has_streams:
            return None
        self._side_streams += 1
        return Stream(self, f"side {self._side_streams}")

    @contextlib.contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        before, _Now.stream = _Now.stream, stream
        try:
            with self.observer.on_stream(stream.name):
                yield
        finally:
            _Now.stream = before

    def compute_stream(self) -> Any:
        """A Stream of this module."""
        return self.compute

    def event(self) -> Any:
        """An Event of this module."""
        return Event(self)

    def synchronize(self) -> None:
        self.observer.host_waits("synchronize")

    def host_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device="cpu")

    def peak_memory_bytes(self) -> int:
        return self.observer.peak_bytes()

    def give_back_memory(self) -> None:
        self.observer.gives_back()

    def reset_peak_memory(self) -> None: ...

    def total_memory_bytes(self) -> int:
        return self._spec.hbm_bytes


@functools.cache
def make_device() -> None:
    """Give torch the device `rehearsed`, once a process."""
    _setup_privateuseone_for_python_backend(DEVICE)
    capable = torch.distributed.Backend.backend_capability["fake"]
    if DEVICE not in capable:
        capable.append(DEVICE)
    stand_for_cuda(DEVICE)  # where the platform runs no Triton, the model asks the operators for torch
