"""The kernels' tests run Triton's interpreter on CPU tensors; tests/conftest.py has set TRITON_INTERPRET by now."""

import pytest
import torch
import triton

if triton.knobs.runtime.interpret:  # not on a GPU: its Triton may be another version, whose interpreter differs
    import interpreter_fixes

    interpreter_fixes.install()
torch.set_num_threads(1)  # tensors here are tiny: more threads only get in each other's way


def pytest_report_header(config):
    """Say how many GPUs there are where tests for GPUs are asked for."""
    if config.option.markexpr == "gpu":
        return f"CUDA devices: {torch.cuda.device_count()} (tests marked two_gpus are deselected where there are fewer)"
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Deselect what needs two GPUs on a machine that has fewer."""
    left_out = [item for item in items if item.get_closest_marker("two_gpus")]
    if torch.cuda.device_count() < 2 and left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
