"""The choice between Triton and PyTorch, and the checks of arguments that the operators share."""

import functools
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from flagscale_kernels._triton import HAS_TRITON, interpreting

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_DTYPES = (*TRITON_DTYPES, torch.float64)  # float64 in the PyTorch paths only, for gradcheck
BACKENDS = (None, "triton", "torch")
# Types of devices whose tensors have no data and stand for CUDA tensors: operators choose Triton, and nothing is launched.
_stand_ins: set[str] = set()


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@functools.cache
def say_once(message: str) -> None:
    """Warn of `message`, once in a process."""
    warnings.warn(message, stacklevel=3)


def stand_for_cuda(device_type: str) -> None:
    """Have tensors of this type of device, which have no data, take the ways that CUDA tensors take."""
    _stand_ins.add(device_type)


def takes_cudas_way(x: Tensor) -> bool:
    """Whether what is written for CUDA tensors alone is for this one."""
    return x.is_cuda or x.device.type in _stand_ins


def choose_backend(x: Tensor, backend: str | None, *, lacks: str = "") -> str:
    """Return "triton" or "torch": `backend` where given, else "triton" for CUDA tensors and "torch" for others.

    lacks: what of these arguments the Triton kernels do not take; then CUDA tensors, too, run in PyTorch, which is said
    once. So do tensors of float64.
    On CPU tensors "triton" runs Triton's interpreter, for tests. It needs TRITON_INTERPRET=1 before triton is imported.
    Raises ValueError for an unknown backend or one that cannot run here.
    """
    require(backend in BACKENDS, f"backend ({backend!r}) must be one of {BACKENDS}")
    if backend is None:
        if x.device.type not in _stand_ins and (x.device.type != "cuda" or not HAS_TRITON):
            return "torch"
        lacks = lacks or ("the Triton kernels take no torch.float64" if x.dtype == torch.float64 else "")
        if lacks and not torch.compiler.is_compiling():
            say_once(f"flagscale_kernels: a call runs in PyTorch, which is slower: {lacks}")
        return "torch" if lacks else "triton"
    if backend == "triton" and x.device.type not in _stand_ins:
        require(HAS_TRITON, "backend ('triton') needs Triton, which is not installed")
        require(
            x.device.type in ("cuda", "meta") or interpreting(),
            f"backend ('triton') runs on cuda tensors, got {x.device.type}; on the CPU it needs TRITON_INTERPRET=1",
        )
    return backend


def check_float(name: str, x: Tensor, backend: str) -> None:
    """Raise ValueError unless the backend computes in x's dtype."""
    allowed = TRITON_DTYPES if backend == "triton" else FLOAT_DTYPES
    require(x.dtype in allowed, f"{name}.dtype ({x.dtype}) must be one of {[str(d) for d in allowed]}")


def check_same(attribute: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError unless all named tensors have the first one's `attribute`: "dtype", "device" or "shape"."""
    (first_name, first), *others = tensors
    expected = getattr(first, attribute)
    for name, tensor in others:
        found = getattr(tensor, attribute)
        require(found == expected, f"{name}.{attribute} ({found}) must equal {first_name}.{attribute} ({expected})")


def check_unit_stride(name: str, x: Tensor) -> None:
    """Raise ValueError unless the last dimension is contiguous."""
    if x.shape[-1] > 1:
        require(x.stride(-1) == 1, f"{name}.stride(-1) ({x.stride(-1)}) must be 1")
