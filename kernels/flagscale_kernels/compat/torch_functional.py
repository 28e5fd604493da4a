"""torch.nn.functional's attention and cross-entropy, with torch's signatures."""

from typing import Any

from torch import Tensor

from flagscale_kernels.compat._lacking import refuse
from flagscale_kernels.cross_entropy import cross_entropy as _cross_entropy
from flagscale_kernels.flash_attention import flash_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of query [b, n, s, d] over key and value [b, n, s_k, d], or fewer heads with enable_gqa.

    Raises NotImplementedError for a mask, for dropout, and for is_causal where s and s_k differ: torch aligns the first
    query with the first key, the kernels the last with the last.
    """
    function = "scaled_dot_product_attention"
    refuse(function, attn_mask=(attn_mask, None), dropout_p=(dropout_p, 0.0))
    if is_causal and query.shape[-2] != key.shape[-2]:
        raise NotImplementedError(
            f"{function}: is_causal needs as many queries ({query.shape[-2]}) as keys ({key.shape[-2]}): "
            "flash_attention aligns the last query with the last key, torch the first with the first"
        )
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(f"{function}: {query.shape[1]} heads over {key.shape[1]} need enable_gqa=True")
    return flash_attention(query, key, value, causal=is_causal, softmax_scale=scale)


def cross_entropy(  # torch's own list of parameters
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits [n, v] and class numbers [n], in fp32.

    Raises NotImplementedError for class weights, probabilities as targets, and classes that are not the last dimension.
    """
    deprecated = {"size_average": (size_average, None), "reduce": (reduce, None)}
    refuse("cross_entropy", weight=(weight, None), **deprecated)
    if input.dim() > 2 or target.is_floating_point():
        raise NotImplementedError(
            f"cross_entropy: input {list(input.shape)} and target {list(target.shape)} must be [n, v] or [v] and class "
            "numbers: torch has the classes in dimension 1, the kernels in the last"
        )
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    return _cross_entropy(input, target, **options)
