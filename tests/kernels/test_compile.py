"""Every kernel compiles for the chips it is meant for, and what ptxas says about it is what the design needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "resources.py"
pytestmark = pytest.mark.timeout(1800)  # ptxas is slow, and the fixture compiles everything
ATTENTION = ("flash_forward", "flash_dkdv", "flash_dq", "piecewise_forward", "piecewise_dkdv", "piecewise_dq")


def compiled(*options):
    # A process of its own: this one interprets.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), "--json", *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows():
    return compiled("--quick")


def named(row):
    return f"{row['kernel']} ({row['case']}) on sm_{row['arch']}, {row['bm']}x{row['bn']}, {row['warps']} warps"


def is_attention(row):
    return any(name in row["kernel"] for name in ATTENTION)


def check(rows):
    for row in rows:
        assert row["fits"], f"{named(row)}: {row['shared']} bytes of shared memory"
        # fp32 is for tests, and head dimensions above 128 do not fit: docs/kernels.md says by how much.
        if row["chosen"] and "fp32" not in row["case"] and "D256" not in row["case"]:
            assert row["stack"] == 0, f"{named(row)} is chosen and spills {row['stack']} bytes"
        if is_attention(row) and "fp32" not in row["case"]:
            wanted, other = ("HGMMA", "HMMA") if row["arch"] == 90 else ("HMMA", "HGMMA")
            assert row[wanted] > 0, f"{named(row)} has no {wanted}"
            assert row[other] == 0, f"{named(row)} has {other}"


def test_every_kernel_is_compiled_for_both_chips(rows):
    for arch in (80, 90):
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        for name in (*ATTENTION, "rms_norm_forward", "rms_norm_backward", "rope", "swiglu_forward", "swiglu_backward"):
            assert any(name in kernel for kernel in kernels), f"{name} was not compiled for sm_{arch}"
        for name in ("statistics", "gradient", "delta"):
            assert any(name in kernel for kernel in kernels), f"{name} was not compiled for sm_{arch}"


def test_every_config_fits_uses_the_matrix_units_and_the_chosen_ones_do_not_spill(rows):
    check(rows)


def test_every_attention_kernel_has_alternatives_to_choose_from(rows):
    for arch in (80, 90):
        for name in ATTENTION:
            tiles = {
                (row["bm"], row["bn"], row["warps"], row["stages"])
                for row in rows
                if name in row["kernel"] and row["arch"] == arch
            }
            assert 2 <= len(tiles) <= 4, f"{name} on sm_{arch}: {sorted(tiles)}"


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_variant_of_every_kernel_fits_and_the_chosen_configs_do_not_spill():
    check(compiled())
