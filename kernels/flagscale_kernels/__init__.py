"""Triton kernels for training language models, each with a PyTorch path for the CPU. Importing needs no GPU."""

from flagscale_kernels.rms_norm import rms_norm, rms_norm_reference, rms_norm_residual
from flagscale_kernels.swiglu import swiglu, swiglu_reference

__all__ = ["rms_norm", "rms_norm_reference", "rms_norm_residual", "swiglu", "swiglu_reference"]
