"""How the kernels' tests judge numbers: by the rule of the benchmarks, kernels/benchmarks/accuracy.py."""

import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from accuracy import assert_as_good_as_pytorch, relative_rms, run, seeded  # noqa: E402

__all__ = ["BACKENDS", "DTYPES", "assert_as_good_as_pytorch", "relative_rms", "run", "seeded"]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["triton", "torch"]
