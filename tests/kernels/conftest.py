"""The kernels' tests run Triton's interpreter on CPU tensors; tests/conftest.py has set TRITON_INTERPRET by now."""

import interpreter_fixes
import torch

interpreter_fixes.install()
torch.set_num_threads(1)  # tensors here are tiny: more threads only get in each other's way
