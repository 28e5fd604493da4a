"""Every variant of every operator.

`run.py` checks them before it measures, tests/kernels/test_gpu.py tests them on a GPU, and tests/kernels/test_benchmarks.py
runs them at tiny sizes on the CPU. The GPU is asked for nothing here: inputs are made when a variant is checked.
"""

from attention_variants import config_variants, flash_variants, hopper_variants, ordered_variants, piecewise_variants
from operator_variants import operator_variants
from variant import Variant


def variants(tiny: bool = False) -> list[Variant]:
    """All variants, or the same ones with a few rows for the CPU. What no GPU has run comes first, other configs last."""
    found = [*ordered_variants(tiny), *hopper_variants(tiny)]
    found += [*flash_variants(tiny), *operator_variants(tiny), *piecewise_variants(tiny), *config_variants(tiny)]
    names = [variant.name for variant in found]
    assert len(set(names)) == len(names), "two variants have the same name"
    return found
