"""The choice between Triton and PyTorch, and the checks of arguments that the operators share."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flagscale_kernels._triton import HAS_TRITON, interpreting

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_DTYPES = (*TRITON_DTYPES, torch.float64)  # float64 in the PyTorch paths only, for gradcheck
BACKENDS = (None, "triton", "torch")


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def choose_backend(x: Tensor, backend: str | None) -> str:
    """Return "triton" or "torch": `backend` where given, else "triton" for CUDA tensors and "torch" for others.

    On CPU tensors "triton" runs Triton's interpreter, for tests. It needs TRITON_INTERPRET=1 before triton is imported.
    Raises ValueError for an unknown backend or one that cannot run here.
    """
    require(backend in BACKENDS, f"backend ({backend!r}) must be one of {BACKENDS}")
    if backend is None:
        return "triton" if x.device.type == "cuda" and HAS_TRITON else "torch"
    if backend == "triton":
        require(HAS_TRITON, "backend ('triton') needs Triton, which is not installed")
        require(
            x.device.type in ("cuda", "meta") or interpreting(),
            f"backend ('triton') runs on cuda tensors, got {x.device.type}; on the CPU it needs TRITON_INTERPRET=1",
        )
    return backend


def called_plainly() -> bool:
    """Whether nothing differentiates, compiles or traces what is called now.

    An operator then needs no dispatch, which takes longer on a CPU than the operator itself on the few rows of a step of
    generation.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


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


class Rows(NamedTuple):
    """A [..., c] tensor as n rows: row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride."""

    tensor: Tensor
    n: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def addressing(self) -> tuple[int, int, int]:
        return self.inner, self.outer_stride, self.inner_stride


def as_rows(x: Tensor) -> Rows:
    """View x [..., c] as rows. Two strides describe any slice of a packed projection; other tensors are copied."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return as_rows(x.contiguous())
    n = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not sizes:
        return Rows(x, n, 1, 0, 0)
    if len(sizes) == 1:
        return Rows(x, n, sizes[0], 0, strides[0])
    return Rows(x, n, sizes[1], strides[0], strides[1])
