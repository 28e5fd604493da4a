"""Liger's functional names (liger_kernel.transformers.functional). No function here writes over its inputs."""

from typing import Any

import torch
from torch import Tensor

from flagscale_kernels.compat._lacking import refuse
from flagscale_kernels.cross_entropy import cross_entropy
from flagscale_kernels.geglu import geglu
from flagscale_kernels.layer_norm import layer_norm
from flagscale_kernels.linear_cross_entropy import fused_linear_cross_entropy
from flagscale_kernels.rms_norm import rms_norm, rms_norm_residual
from flagscale_kernels.rope import rope
from flagscale_kernels.swiglu import swiglu

ROUNDING = {"llama": "hf", "gemma": "megatron"}  # of Liger's casting modes; "none" computes in bf16


def _norm_options(function: str, offset: float, casting_mode: str) -> dict:
    if casting_mode not in ROUNDING:
        raise NotImplementedError(
            f"{function}: casting_mode ({casting_mode!r}) must be one of {tuple(ROUNDING)}: norms compute in fp32 here"
        )
    return {"rounding": ROUNDING[casting_mode], "weight_offset": offset}


def liger_rms_norm(
    X: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
) -> Tensor:
    """RMSNorm of X [..., h] with W + offset. in_place is ignored: the backward writes to memory of its own."""
    return rms_norm(X, W, eps, **_norm_options("liger_rms_norm", offset, casting_mode))


def liger_fused_add_rms_norm(
    X: Tensor, R: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of X + R, X + R). in_place is ignored."""
    return rms_norm_residual(X, R, W, eps, **_norm_options("liger_fused_add_rms_norm", offset, casting_mode))


def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
    """LayerNorm of X [..., h]."""
    return layer_norm(X, W, B, eps)


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b."""
    return swiglu(a, b)


def liger_geglu(a: Tensor, b: Tensor) -> Tensor:
    """gelu(a) * b, with GELU by tanh, as Liger's."""
    return geglu(a, b, approximate="tanh")


def liger_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate q [b, n, s, d] and k [b, n_kv, s, d] by cos, sin [1 or b, s, d], which have each angle twice.

    position_ids and unsqueeze_dim are ignored, as by Liger: row i of the tables is token i's.
    """
    half = q.shape[-1] // 2
    tables = (t[..., :half].to(torch.promote_types(t.dtype, torch.float32)) for t in (cos, sin))
    return rope(q, k, *tables, layout="bnsd")


def liger_cross_entropy(  # Liger's own list of parameters
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
) -> Tensor:
    """Cross-entropy of logits [n, v] and targets [n], in fp32; lse_square_scale is the weight of the z-loss.

    Raises NotImplementedError for class weights, softcap and return_z_loss.
    """
    refuse(
        "liger_cross_entropy",
        weight=(weight, None),
        size_average=(size_average, None),
        reduce=(reduce, None),
        softcap=(softcap, None),
        return_z_loss=(return_z_loss, False),
    )
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": lse_square_scale, "reduction": reduction}
    return cross_entropy(input, target, ignore_index=ignore_index, **options)


def liger_fused_linear_cross_entropy(  # Liger's own list of parameters
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of input [n, h] @ weight [v, h].T and targets [n], without the logits in memory.

    accum_dtype is ignored: the weight's gradient is summed in fp32. Raises NotImplementedError for a bias, class weights,
    softcap and return_z_loss.
    """
    refuse(
        "liger_fused_linear_cross_entropy",
        bias=(bias, None),
        ce_weight=(ce_weight, None),
        softcap=(softcap, None),
        return_z_loss=(return_z_loss, False),
    )
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": lse_square_scale, "reduction": reduction}
    return fused_linear_cross_entropy(input, weight, target, ignore_index=ignore_index, **options)
