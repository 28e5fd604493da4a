"""Tensors as rows: how the operators that work on one row at a time read strided tensors without a copy."""

from typing import NamedTuple

from torch import Tensor

from flagscale_kernels._triton import tl, triton


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """The offset of a row, or of a tensor of rows, in elements: see Rows."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


class Rows(NamedTuple):
    """A [..., c] tensor as n rows, whose places `row_start` computes.

    Rows at one stride have `inner` 1: Triton compiles that value in, and nothing is divided.
    """

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
    if len(sizes) < 2:
        return Rows(x, n, 1, strides[0] if strides else 0, 0)
    return Rows(x, n, sizes[1], strides[0], strides[1])
