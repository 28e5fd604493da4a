"""Triton kernels for training language models, each with a PyTorch path for the CPU. Importing needs no GPU."""

from flagscale_kernels.rms_norm import rms_norm, rms_norm_reference, rms_norm_residual

__all__ = ["rms_norm", "rms_norm_reference", "rms_norm_residual"]
