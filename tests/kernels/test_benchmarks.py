import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "run.py"


def run(*options):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_says_so_and_succeeds():
    assert run() == "no CUDA device\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke run is for the CPU")
def test_every_workload_runs_once_on_the_cpu():
    out = run("--smoke")
    for operator in (
        "rms_norm",
        "rms_norm_residual",
        "rope",
        "swiglu",
        "cross_entropy",
        "linear_cross_entropy",
        "flash_attention",
        "piecewise_attention",
    ):
        assert f"\n{operator} " in "\n" + out
    assert "flagscale_kernels ran" in out
