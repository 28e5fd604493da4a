"""flash-attn's functions (Dao-AILab/flash-attention 2), for tensors [batch, sequence, heads, head dimension] and packs."""

from torch import Tensor

from flagscale_kernels.compat._lacking import refuse
from flagscale_kernels.flash_attention import flash_attention


def flash_attn_func(  # flash-attn's own list of parameters
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of q [b, s, n, d] over k, v [b, s_k, n_kv, d] -> [b, s, n, d].

    With return_attn_probs also the LSE, fp32 [b, n, s], and None, as flash-attn returns without dropout.
    Raises NotImplementedError for dropout.
    """
    refuse("flash_attn_func", dropout_p=(dropout_p, 0.0))
    out = flash_attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        layout="bsnd",
        window=_window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_lse=return_attn_probs,
    )
    return out if isinstance(out, Tensor) else (*out, None)


def flash_attn_varlen_func(  # flash-attn's own list of parameters
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention within each sequence of a pack: q [t, n, d], k and v [t_k, n_kv, d] -> [t, n, d].

    With return_attn_probs also the LSE, fp32 [n, t], and None. Raises NotImplementedError for dropout and a block table.
    """
    refuse("flash_attn_varlen_func", dropout_p=(dropout_p, 0.0), block_table=(block_table, None))
    out = flash_attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        layout="tnd",
        window=_window(window_size),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=int(max_seqlen_q),
        max_seqlen_k=int(max_seqlen_k),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_lse=return_attn_probs,
    )
    return out if isinstance(out, Tensor) else (*out, None)


def _window(window_size: tuple[int, int]) -> tuple[int, int] | None:
    """flash-attn's (left, right), where -1 is no bound, as `flash_attention` takes it."""
    left, right = window_size
    return None if (left, right) == (-1, -1) else (left, right)
