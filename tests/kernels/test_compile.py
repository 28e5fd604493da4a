"""The kernels compile for the chips they are meant for, and need the registers, memory and units that they should.

By default: one variant of each kernel (bf16, head dimension 128) with its default config, for sm_80 and sm_90.
With `make soak`: every variant (head dimensions, dtypes, masks, packing) with every config of its list.
Triton caches what it compiled, so a second run only compiles the kernels that have changed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "resources.py"
ATTENTION = ("flash_forward", "flash_dkdv", "flash_dq", "piecewise_forward", "piecewise_dkdv", "piecewise_dq")
OTHERS = ("norm_forward", "norm_backward", "norm_backward_parts", "rope", "gated_forward", "gated_backward", "sum_rows")
KERNELS = (*ATTENTION, *OTHERS, "statistics", "gradient", "delta")


def compiled(*options):
    # A process of its own: this one interprets.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), "--json", *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def named(row):
    return f"{row['kernel']} ({row['case']}) on sm_{row['arch']}, {row['bm']}x{row['bn']}, {row['warps']} warps"


def is_attention(row):
    return any(name in row["kernel"] for name in ATTENTION)


def check(rows):
    for arch in (80, 90):
        names = {row["kernel"] for row in rows if row["arch"] == arch}
        missing = [kernel for kernel in KERNELS if not any(kernel in name for name in names)]
        assert not missing, f"not compiled for sm_{arch}: {missing}"
    for row in rows:
        assert row["fits"], f"{named(row)}: {row['shared']} bytes of shared memory"
        # fp32 is for tests, and head dimensions above 128 do not fit: docs/kernels.md says by how much.
        if row["chosen"] and "fp32" not in row["case"] and "D256" not in row["case"]:
            assert row["stack"] == 0, f"{named(row)} is chosen and spills {row['stack']} bytes"
        if is_attention(row) and "fp32" not in row["case"]:
            wanted, other = ("HGMMA", "HMMA") if row["arch"] == 90 else ("HMMA", "HGMMA")
            assert row[wanted] > 0, f"{named(row)} has no {wanted}"
            assert row[other] == 0, f"{named(row)} has {other}"


@pytest.fixture(scope="module")
def default_rows():
    return compiled("--quick")


def test_the_default_configs_fit_do_not_spill_and_use_the_matrix_units(default_rows):
    assert all(row["chosen"] for row in default_rows)
    check(default_rows)


def test_a_new_threshold_of_piecewise_attention_compiles_nothing(default_rows):
    piecewise = [(row["arch"], row["kernel"]) for row in default_rows if "piecewise" in row["kernel"]]
    assert len(piecewise) == len(set(piecewise)) == 6, piecewise


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_variant_and_config_fits_and_the_default_configs_do_not_spill():
    check(compiled())
