"""Other packages' functions, computed by these kernels: their users change an import and nothing else.

    from flash_attn import flash_attn_func              ->  from flagscale_kernels.compat.flash_attn import ...
    from flag_attn import piecewise_attention           ->  from flagscale_kernels.compat.flag_attn import ...
    from liger_kernel.transformers.functional import    ->  from flagscale_kernels.compat.liger import ...
    torch.nn.functional's attention and cross_entropy   ->  from flagscale_kernels.compat.torch_functional import ...

Names, order and defaults of the arguments are theirs. What a kernel here lacks raises NotImplementedError in one line; an
argument that changes neither result nor shape is taken and ignored, as the function's text says.
"""

from flagscale_kernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from flagscale_kernels.compat.liger import (
    liger_cross_entropy,
    liger_fused_add_rms_norm,
    liger_fused_linear_cross_entropy,
    liger_geglu,
    liger_layer_norm,
    liger_rms_norm,
    liger_rope,
    liger_swiglu,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_varlen_func",
    "liger_cross_entropy",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rope",
    "liger_swiglu",
]
