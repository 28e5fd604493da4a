"""The kernels compile for the chips they are meant for, and need the registers, memory and units that they should.

Every variant (head dimensions, dtypes, masks, packing) with every config of its list, for sm_80 and sm_90. What a kernel
compiles to is in kernels/benchmarks/known_resources.json under a key of its source, arguments and options, so that only
kernels that have changed are compiled here. `make soak` compiles all of them, whatever the file says. After a change of
kernels, `python kernels/benchmarks/resources.py --write` writes the file again.
"""

import json
import os
import subprocess
import sys

import pytest
from kernel_checks import BENCHMARKS

SCRIPT = BENCHMARKS / "resources.py"
MOST_COMPILED = (
    60  # kernels that the file does not have, seconds each; above it the test asks for the file to be written
)
# Accesses to local memory over all instructions of a loop: a few pointers read again each time round cost less than the
# smaller tile that would hold them in registers (14 of 925 in the fastest sm_80 tile of dK and dV, by arithmetic).
LOCAL_SHARE = 0.03
ATTENTION = ("flash_forward", "flash_dkdv", "flash_dq", "piecewise_forward", "piecewise_dkdv", "piecewise_dq")
NORMS = ("norm_forward", "norm_backward", "norm_backward_parts")
OTHERS = (*NORMS, "rope", "gated_forward", "gated_backward", "sum_rows", "copy_rows")
HOPPER = ("hopper_forward", "hopper_dkdv", "hopper_dq")
FITS, UNIT, SERIAL = "fits", "uses the chip's matrix unit", "products are not serialised"
TWICE, SPILL, NO_SPILL = "no product is computed twice", "hardly a spill inside a loop", "no spill"
KERNELS = (*ATTENTION, *OTHERS, "statistics", "gradient", "delta")

FILLED = "the sums of dK and dV alone fill the registers of so wide a head; a smaller tile computes products twice"
SUMS = "dQ's product is added to memory from registers that the sums of dK and dV need"
AHEAD = "an H200 had this tile ahead of 32x128, which spills nothing (2026-11-26, dense, an earlier kernel)"
# What does not hold: (parts of the row's name, gates, reason). An entry that nothing needs any more fails the test.
KNOWN_FAILURES = [
    (("dkdv_kernel", "D256"), {SPILL, TWICE, UNIT}, FILLED),
    (("_flash_dkdv_kernel", "D192"), {SPILL, TWICE, UNIT}, FILLED),
    (("_flash_dkdv_kernel", "D96"), {SPILL}, FILLED),
    (("adding dQ",), {SPILL, TWICE, UNIT}, SUMS),
    (("_flash_dkdv_kernel", "packed D128", "sm_90", "64x128"), {SPILL}, AHEAD),
    (("_flash_dkdv_kernel", "softcap and sinks D128", "sm_90", "64x128"), {SPILL}, AHEAD),
    (
        ("dq_kernel", "D192 V128", "sm_80"),
        {SPILL, TWICE},
        "64 rows of 192 columns do not fit into the registers of 4 warps",
    ),
    (("dq_kernel", "D256", "sm_80"), {SPILL, TWICE}, "64 rows of 256 columns do not fit into the registers of 4 warps"),
    (
        ("_flash_dkdv_kernel", "softcap", "sm_80"),
        {SPILL},
        "the slope of the capped scores takes registers besides them",
    ),
    (
        ("_piecewise_dq_kernel", "D128)", "128x128"),
        {SPILL},
        "not the default; the tuner takes it only where it is faster",
    ),
]


def compiled(*options):
    # A process of its own: this one interprets.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), "--json", *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def named(row):
    tile = f", {row['bm']}x{row['bn']}, {row['warps']} warps, {row['stages']} stages" if row["bn"] else ""
    summed = ", adding dQ" if row.get("adds_dq") else ""
    return f"{row['kernel']} ({row['case']}) on sm_{row['arch']}{tile}{summed}"


def is_attention(row):
    return any(name in row["kernel"] for name in (*ATTENTION, *HOPPER)) and "fp32" not in row["case"]


def gates(row):
    """{gate: whether the row passes} of the gates that it has to pass."""
    found = {FITS: row["fits"]}
    if is_attention(row):
        wanted, other = ("HGMMA", "HMMA") if row["arch"] == 90 else ("HMMA", "HGMMA")
        found |= {
            UNIT: row[wanted] > 0 and row[other] == 0,
            # ptxas waits after each product where it cannot keep one in flight: as many beginnings as products.
            SERIAL: row["HGMMA"] == 0 or row["WARPGROUP.ARRIVE"] < row["HGMMA"],
            # Warps that share rows compute the same products more than once.
            SPILL: bool(row["loops"])
            and all(loop["local"] <= LOCAL_SHARE * loop["instructions"] for loop in row["loops"]),
        }
        if row["bn"]:  # the others walk over tiles of two sizes
            # Warps that share rows compute the same products more than once.
            found[TWICE] = set(row["executed"]) == {1.0}
    elif "fp32" not in row["case"]:
        found[NO_SPILL] = row["stack"] == 0
    return found


def failures(rows):
    return {(named(row), gate): row for row in rows for gate, passed in gates(row).items() if not passed}


def excuses(failure):
    """The places in KNOWN_FAILURES of the entries that name the failure."""
    name, gate = failure
    return [
        i for i, (parts, allowed, _) in enumerate(KNOWN_FAILURES) if gate in allowed and all(p in name for p in parts)
    ]


def check(rows):
    for arch in (80, 90):
        names = {row["kernel"] for row in rows if row["arch"] == arch}
        missing = [kernel for kernel in KERNELS if not any(kernel in name for name in names)]
        assert not missing, f"not compiled for sm_{arch}: {missing}"
    assert {name for name in HOPPER if any(name in row["kernel"] for row in rows)} == set(HOPPER)
    found = failures(rows)
    new = [f"{name}: not so: {gate}" for name, gate in found if not excuses((name, gate))]
    assert not new, "\n".join(new)
    needed = {i for failure in found for i in excuses(failure)}
    mended = [entry[0] for i, entry in enumerate(KNOWN_FAILURES) if i not in needed]
    assert not mended, f"these hold now, so take them out of KNOWN_FAILURES: {mended}"


@pytest.fixture(scope="module")
def rows():
    return compiled("--known", "--most", str(MOST_COMPILED))


def test_every_variant_and_config_keeps_the_matrix_units_busy(rows):
    check(rows)


def test_a_new_threshold_of_piecewise_attention_compiles_nothing(rows):
    d128 = [row for row in rows if row["case"] == "D128" and "piecewise" in row["kernel"] and row["chosen"]]
    distinct = {(row["arch"], row["kernel"], row.get("adds_dq")) for row in d128}
    assert len(d128) == len(distinct) == 8, d128


def test_the_key_of_a_kernel_follows_its_source_and_not_its_place():
    code = """if True:
        import offline
        from flagscale_kernels import _bands, _tiles
        kernel = _bands.attend_band
        before = offline.source(kernel)
        tile = _tiles._load.fn if hasattr(_tiles._load, "fn") else _tiles._load
        assert "def _load" in before and "def attend_band" in before
        kernel.starting_line_number = 1
        assert offline.source(kernel) == before
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{BENCHMARKS}:{BENCHMARKS.parent}"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   STL [R1], R3 ;
        /*0030*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/              @!P1 BRA 0x50 ;
        /*0070*/                   BRA 0x0 ;
        /*0080*/                   BRA 0x80 ;
"""


def test_the_loops_of_machine_code_are_read():
    import machine_code

    first, second = machine_code.matrix_loops(SASS, 8)
    assert first == {"multiplications": 8 * 16 * 8 * 16, "local": 1, "instructions": 4}
    assert second == {"multiplications": 2 * 64 * 128 * 16, "local": 0, "instructions": 2}
    assert machine_code.count(SASS, "HGMMA") == 1


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_variant_and_config_compiles_to_what_the_file_says():
    check(compiled())
