r"""SwiGLU (Shazeer 2020, arXiv:2002.05202) of one packed or two tensors. Mixtures of experts add a weight per token.

    y = w silu(g) u,    silu(g) = g sigmoid(g)

The kernels and the gradient are those of _gated.py.
"""

import torch
from torch import Tensor

from flagscale_kernels._gated import gated, gated_reference


def swiglu_reference(gate: Tensor, up: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    return gated_reference(torch.nn.functional.silu, gate, up, weight)


def swiglu(
    gate: Tensor, up: Tensor | None = None, *, weight: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """silu(gate) * up * weight.

    gate, up: each [..., f] -> [..., f]; or gate alone, [..., 2f] with the gate in the first half -> [..., f].
    weight: one number per row, such as a router's probability: [...] or [..., 1], of any float dtype, with a gradient.
    The last dimension must be contiguous; the others may be strided. Raises ValueError for a shape, dtype, device or
    stride that does not fit.
    """
    return gated(gate, up, weight, "silu", backend)
