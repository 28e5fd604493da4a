"""The precisions of a run's configuration as torch knows them."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_word(dtype: torch.dtype) -> str:
    """The name that config.json of a Hugging Face folder has for a dtype: bfloat16, float16, float32."""
    return str(dtype).removeprefix("torch.")
