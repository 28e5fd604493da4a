"""The kernels' tests run Triton's interpreter on CPU tensors; tests/conftest.py has set TRITON_INTERPRET by now."""

import torch
import triton

if triton.knobs.runtime.interpret:  # not on a GPU: its Triton may be another version, whose interpreter differs
    import interpreter_fixes

    interpreter_fixes.install()
torch.set_num_threads(1)  # tensors here are tiny: more threads only get in each other's way
