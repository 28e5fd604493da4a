r"""GeGLU (Shazeer 2020, arXiv:2002.05202): y = w gelu(g) u, with GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    exact    gelu(g) = g (1 + erf(g / sqrt 2)) / 2
    tanh     gelu(g) = g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2

The kernels and the gradient are those of _gated.py.
"""

import functools

import torch
from torch import Tensor

from flagscale_kernels._checks import require
from flagscale_kernels._gated import GELU, gated, gated_reference

ACTIVATION_OF = {approximate: activation for activation, approximate in GELU.items()}


def geglu_reference(
    gate: Tensor, up: Tensor | None = None, weight: Tensor | None = None, *, approximate: str = "tanh"
) -> Tensor:
    """The definition, in plain PyTorch; autograd derives the gradient."""
    gelu = functools.partial(torch.nn.functional.gelu, approximate=approximate)
    return gated_reference(gelu, gate, up, weight)


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    approximate: str = "tanh",
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """gelu(gate) * up * weight.

    approximate: "tanh" (Gemma's gelu_pytorch_tanh) or "none", as torch.nn.functional.gelu names them.
    The other arguments and the errors are those of `swiglu`.
    """
    require(approximate in ACTIVATION_OF, f"approximate ({approximate!r}) must be one of {tuple(ACTIVATION_OF)}")
    return gated(gate, up, weight, ACTIVATION_OF[approximate], backend)
