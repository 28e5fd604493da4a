"""`triton` and `tl`, or stand-ins where Triton is not installed, so that the PyTorch paths work everywhere.

Every kernel file imports both names from here. Importing this package does not ask Triton for its driver, so it works
on a machine without a GPU.
"""

from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # no Triton wheel for this platform

    class _Absent:
        """Evaluates `@triton.jit` and `tl.constexpr` annotations. `choose_backend` refuses a launch without Triton."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()
    HAS_TRITON = False

INTERPRETER = 0  # what `arch()` returns under TRITON_INTERPRET=1
OTHER = -1  # a GPU that is not NVIDIA's


def interpreting():
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def arch():
    """80 for an A100, 90 for an H100 or H200, and so on. It asks the driver, so only a launch may call it."""
    if interpreting():
        return INTERPRETER
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else OTHER


@lru_cache(maxsize=64)
def _cuda_sm_count(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


def sm_count(device):
    """Streaming multiprocessors of `device`. The interpreter has 2, so that its programs loop over rows too."""
    if device.type == "cuda":
        return _cuda_sm_count(device.index if device.index is not None else torch.cuda.current_device())
    return 2 if interpreting() else 132


def cdiv(a, b):
    return -(-a // b)


def next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()
