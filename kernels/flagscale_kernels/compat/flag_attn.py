"""FlagAttention's functions (FlagOpen/FlagAttention), for tensors [batch, heads, sequence, head dimension]."""

import operator

from torch import Tensor

from flagscale_kernels import flash_attention as _flash_attention
from flagscale_kernels import piecewise_attention as _piecewise_attention
from flagscale_kernels.compat._lacking import refuse


def flash_attention(  # FlagAttention's own list of parameters
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    return_log_normalizer: bool = False,
    return_total_attention: bool = False,
    return_seed_offset: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None, None, None]:
    """Attention of q [b, n, s, d] over k, v [b, n_kv, s_k, d] -> [b, n, s, d].

    With return_log_normalizer five values, as FlagAttention returns: the output, the log of the softmax's denominator, fp32
    [b, n, s], and three times None. Raises NotImplementedError for dropout and for the total attention.
    """
    refuse(
        "flash_attention",
        dropout_p=(dropout_p, 0.0),
        return_total_attention=(return_total_attention, False),
        return_seed_offset=(return_seed_offset, False),
    )
    out = _flash_attention(q, k, v, causal=causal, softmax_scale=sm_scale, return_lse=return_log_normalizer)
    return out if isinstance(out, Tensor) else (*out, None, None, None)


def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int,
    causal: bool = False,
    sm_scale: float | None = None,
) -> Tensor:
    """Attention with scores of (q2, k2) at distances of at least `dist_threshold` and of (q1, k1) below it.

    All tensors are [b, n, s, d]; k1, k2 and v may have fewer heads. dist_threshold: any integer, NumPy's too.
    """
    threshold = operator.index(dist_threshold)
    return _piecewise_attention(q1, k1, q2, k2, v, threshold, causal=causal, softmax_scale=sm_scale)
