"""The order of the dimensions of q, k and v, and views, sizes and strides in one order for all operators.

A layout is named by its dimensions: b batch, n heads, s sequence, d head dimension, t tokens of a pack of sequences.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from flagscale_kernels._checks import check_unit_stride, require


class Layout(NamedTuple):
    """The index of each dimension; the head dimension is the last. A pack has no batch dimension: one entry."""

    batch: int | None
    head: int
    seq: int


LAYOUTS = {
    "bnsd": Layout(batch=0, head=1, seq=2),
    "sbnd": Layout(batch=1, head=2, seq=0),
    "bsnd": Layout(batch=0, head=2, seq=1),
    "tnd": Layout(batch=None, head=1, seq=0),
}
PACKED = "tnd"


def sizes(t: Tensor, layout: str) -> tuple[int, int, int]:
    """(batch, heads, sequence length) of t; a pack is a batch of one."""
    batch, head, seq = LAYOUTS[layout]
    return (1 if batch is None else t.shape[batch], t.shape[head], t.shape[seq])


def strides(t: Tensor, layout: str) -> tuple[int, int, int]:
    """(batch, head, sequence) strides of t in elements; the batch stride of a pack is 0."""
    batch, head, seq = LAYOUTS[layout]
    return (0 if batch is None else t.stride(batch), t.stride(head), t.stride(seq))


def as_bnsd(t: Tensor, layout: str) -> Tensor:
    """t as a [b, n, s, d] view."""
    batch, head, seq = LAYOUTS[layout]
    return t.permute(head, seq, 2).unsqueeze(0) if batch is None else t.permute(batch, head, seq, 3)


def from_bnsd(t: Tensor, layout: str) -> Tensor:
    """A [b, n, s, d] tensor as a contiguous one in `layout`: the inverse of `as_bnsd`."""
    batch, head, seq = LAYOUTS[layout]
    if batch is None:
        return t.squeeze(0).transpose(0, 1).contiguous()
    order = sorted(range(3), key=(batch, head, seq).__getitem__)
    return t.permute(*order, 3).contiguous()


def check_layout(layout: str, tensors: Iterable[tuple[str, Tensor]], allowed: Iterable[str] = LAYOUTS) -> None:
    """Raise ValueError unless `layout` is one of `allowed` and each named tensor has its dimensions and last stride 1."""
    require(layout in allowed, f"layout ({layout!r}) must be one of {tuple(allowed)}")
    for name, t in tensors:
        require(t.dim() == len(layout), f"{name}.dim() ({t.dim()}) must be {len(layout)} for layout {layout!r}")
        check_unit_stride(name, t)
