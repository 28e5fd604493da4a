"""Runs before any test module is imported, and so before anything can import triton."""

import os

# Triton reads this when `@triton.jit` decorates a function, its own standard library included: set it before the first
# `import triton` of the process, which a Hugging Face or megatron-core import can be. A machine with a GPU may set 0.
os.environ.setdefault("TRITON_INTERPRET", "1")
