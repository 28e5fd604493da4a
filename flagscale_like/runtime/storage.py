"""The memory behind a tensor: which it is, for tensors without data as well."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def memory_of(tensor: Tensor) -> int:
    """A number that two tensors share while they live, if they have one memory. A tensor without data has it as well."""
    return tensor.untyped_storage()._cdata


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is one memory and no subclass that wraps others; a tensor without data stands for a plain one."""
    return type(tensor) in (Tensor, FakeTensor)
