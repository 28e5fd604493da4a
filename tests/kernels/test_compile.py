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
from typing import NamedTuple

import pytest
from kernel_checks import BENCHMARKS

SCRIPT = BENCHMARKS / "resources.py"
MOST_COMPILED = (
    60  # kernels that the file does not have, seconds each; above it the test asks for the file to be written
)
ATTENTION = ("flash_forward", "flash_dkdv", "flash_dq", "piecewise_forward", "piecewise_dkdv", "piecewise_dq")
NORMS = ("norm_forward", "norm_backward", "norm_backward_parts")
OTHERS = (*NORMS, "rope", "gated_forward", "gated_backward", "sum_rows", "copy_rows")
HOPPER = ("hopper_forward", "hopper_dkdv", "hopper_dq")
FITS, UNIT, SERIAL = "fits", "uses the chip's matrix unit", "products are not serialised"
TWICE, SPILL, NO_SPILL = "no product is computed twice", "no spill inside a loop", "no spill"
KERNELS = (*ATTENTION, *OTHERS, "statistics", "gradient", "delta")


class Known(NamedTuple):
    """What does not hold, and cannot be mended.

    Attributes:
        parts: of the names of its rows.
        gate: that they do not pass.
        reason: why.
        share: the most accesses to local memory over the instructions of a loop.
        at_edges: the loop with the fewest instructions, which most tiles take, has no such access.
    """

    parts: tuple[str, ...]
    gate: str
    reason: str
    share: float
    at_edges: bool = False


AHEAD = "an H200 took 6 to 26 % more time with 32x128, which spills nothing (results/, 2026-11-26, edge 1, by pointers)"
SUMS = "dK, dV and the addresses of atomics: at D 96 no tile of the same products spills less; at 192 and 256 1 and 5 reads"
FILLED = "the sums take 160 registers of 255, for one read in 456 instructions; dK and dV apart compute a product more"
EDGES = "a loop over the few tiles at the edge of a band reads some addresses again, the main loop none"
WINDOW = "a window's second bound takes registers; 128x32, the next of the list, spills nothing"
TIMED = "not the default: twice the default's tile, for a few spilled addresses; listed so that tuning can time both"
# An entry that nothing needs any more fails the test.
KNOWN_FAILURES = [
    Known(("_flash_dkdv_kernel", "sm_90", "64x128"), SPILL, AHEAD, 0.075),
    Known(("_piecewise_dkdv_kernel", "sm_90", "64x128"), SPILL, AHEAD, 0.041),
    Known(("_flash_dkdv_kernel", "D192 V128", "sm_90"), SPILL, FILLED, 0.003),
    Known(("dkdv_kernel", "sm_80", "dQ added"), SPILL, SUMS, 0.08),
    Known(("dkdv_kernel", "sm_80, 64x64, 4 warps, 2 stages, edge 2"), SPILL, TIMED, 0.036),
    Known(("_flash_forward_kernel", "window", "sm_80"), SPILL, WINDOW, 0.017),
    Known(("_forward_kernel",), SPILL, EDGES, 0.015, at_edges=True),
    Known(("dq_kernel",), SPILL, EDGES, 0.043, at_edges=True),
    Known(("_hopper_dkdv_kernel", "D128"), SPILL, "its sums take 128 registers of 240", 0.015),
]


def compiled(*options):
    # A process of its own: this one interprets.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), "--json", *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def named(row):
    tile = f", {row['bm']}x{row['bn']}, {row['warps']} warps, {row['stages']} stages" if row["bn"] else ""
    edge = f", edge {row['edge']}" if row["bn"] else ""
    gives = f", {row['gives']}" if row["gives"] else ""
    return f"{row['kernel']} ({row['case']}) on sm_{row['arch']}{tile}{edge}{gives}"


def is_attention(row):
    return any(name in row["kernel"] for name in (*ATTENTION, *HOPPER)) and "fp32" not in row["case"]


def spilled(row):
    """Accesses to local memory over all instructions, of the loop with the largest share."""
    return max((loop["local"] / loop["instructions"] for loop in row["loops"]), default=0.0)


def gates(row):
    """{gate: whether the row passes} of the gates that it has to pass."""
    found = {FITS: row["fits"]}
    if is_attention(row):
        wanted, other = ("HGMMA", "HMMA") if row["arch"] == 90 else ("HMMA", "HGMMA")
        found |= {
            UNIT: row[wanted] > 0 and row[other] == 0,
            # ptxas waits after each product where it cannot keep one in flight: as many beginnings as products.
            SERIAL: row["HGMMA"] == 0 or row["WARPGROUP.ARRIVE"] < row["HGMMA"],
            SPILL: bool(row["loops"]) and spilled(row) == 0,
        }
        if row["bn"]:  # the others walk over tiles of two sizes
            # Warps that share rows compute the same products more than once.
            found[TWICE] = set(row["executed"]) == {1.0}
    elif "fp32" not in row["case"]:
        found[NO_SPILL] = row["stack"] == 0
    return found


def failures(rows):
    return {(named(row), gate): row for row in rows for gate, passed in gates(row).items() if not passed}


def excuses(failure, row):
    """The places in KNOWN_FAILURES of the entries that name the failure."""
    name, gate = failure
    return [
        i
        for i, known in enumerate(KNOWN_FAILURES)
        if gate == known.gate
        and all(part in name for part in known.parts)
        and spilled(row) <= known.share
        and not (known.at_edges and min(row["loops"], key=lambda loop: loop["instructions"])["local"])
    ]


def check(rows):
    for arch in (80, 90):
        names = {row["kernel"] for row in rows if row["arch"] == arch}
        missing = [kernel for kernel in KERNELS if not any(kernel in name for name in names)]
        assert not missing, f"not compiled for sm_{arch}: {missing}"
    assert {name for name in HOPPER if any(name in row["kernel"] for row in rows)} == set(HOPPER)
    found = failures(rows)
    new = [
        f"{name}: not so: {gate} ({spilled(row):.1%} of a loop)"
        for (name, gate), row in found.items()
        if not excuses((name, gate), row)
    ]
    assert not new, "\n".join(new)
    needed = {i for failure, row in found.items() for i in excuses(failure, row)}
    mended = [entry.parts for i, entry in enumerate(KNOWN_FAILURES) if i not in needed]
    assert not mended, f"these hold now, so take them out of KNOWN_FAILURES: {mended}"


@pytest.fixture(scope="module")
def rows():
    return compiled("--known", "--most", str(MOST_COMPILED))


def test_every_variant_and_config_keeps_the_matrix_units_busy(rows):
    check(rows)


def test_a_new_threshold_of_piecewise_attention_compiles_nothing(rows):
    d128 = [row for row in rows if row["case"] == "D128" and "piecewise" in row["kernel"] and row["chosen"]]
    distinct = {(row["arch"], row["kernel"], row["gives"]) for row in d128}
    assert len(d128) == len(distinct) == 10, d128


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


WAITING = """
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/                   LD.E.STRONG.GPU R3, [R2.64] ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   RED.E.ADD.F32 [R6.64], R4 ;
        /*0040*/               @P1 BRA 0x0 ;
        /*0050*/                   EXIT ;
        /*0060*/                   LDL R3, [R1] ;
        /*0070*/                   BRA 0x30 ;
"""


def test_a_loop_that_waits_inside_a_loop_of_products_is_part_of_it():
    import machine_code

    [loop] = machine_code.matrix_loops(WAITING, 1)
    assert loop == {"multiplications": 16 * 8 * 16, "local": 0, "instructions": 5}


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
