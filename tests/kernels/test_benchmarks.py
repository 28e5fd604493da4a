"""The benchmark on the CPU: every workload runs once, and a rehearsal on a device that fails leaves no row without a word."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import BENCHMARKS, seeded

import flagscale_kernels as fk

PARTS = ["rope", "swiglu"]  # of the operators' names
SCRIPT = BENCHMARKS / "run.py"
GPU = torch.cuda.is_available()


def run(*options, status=0):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *options], env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(GPU, reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_says_so_and_succeeds():
    assert run() == "no CUDA device\n"


@pytest.mark.skipif(GPU, reason="the smoke run is for the CPU")
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


@pytest.mark.skipif(GPU, reason="a rehearsal is for the CPU")
def test_whatever_the_device_does_each_row_has_a_result_or_a_failure(tmp_path):
    # From the seed 0 on: a hang that --row-seconds ends, a killed process, a lost device, and errors of several classes.
    options = ["--stand-in", "0", "--minutes", "3", "--jobs", "1", "--hang-seconds", "60", "--row-seconds", "3"]
    options += ["--only", ",".join(PARTS)]
    run(*options, "--out", str(tmp_path), status=1)
    [path] = tmp_path.glob("*.json")
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert json.loads(path.read_text())["rows"] == rows
    assert path.with_suffix(".png").exists()
    planned = expected_rows()
    said = {row["name"] for row in rows if row["kind"] == "failure"}
    said |= {f"check {row['name']}" for row in rows if row["kind"] == "check"}
    said |= {f"time {row['operator']} {row['shape']} {row['provider']}" for row in rows if row["kind"] == "time"}
    assert said | {"card"} == planned | {"card"}
    failures = " ".join(row["error"] for row in rows if row["kind"] == "failure")
    for cause in ("SystemExit", "TritonError", "illegal memory access", "status -9", "took more than 3 s"):
        assert cause in failures, failures


def expected_rows():
    """The keys of all rows of a rehearsal, from a process that does not interpret."""
    code = f"import plan; rows = [*plan.checks(True, {PARTS}), *plan.timings('cpu', True, {PARTS})]"
    code += "; print([row.key for row in rows])"
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    return set(eval(out)) - {"card"}


@pytest.mark.skipif(GPU, reason="a rehearsal is for the CPU")
def test_rows_that_the_time_does_not_reach_are_named(tmp_path):
    out = run("--stand-in", "1", "--minutes", "0.001", "--out", str(tmp_path))
    assert "not run for want of time" in out


def test_every_listed_config_is_timed_and_the_result_is_right():
    import config_times

    class Device:
        def times(self, call):
            call()
            return {"milliseconds": 1.0, "host_milliseconds": 0.0}

    q, k, v = (seeded(1, 1, 40, 16, dtype=torch.float16, seed=i) for i in range(3))
    workload = SimpleNamespace(
        operator="flash_attention", shape="tiny", differentiable=(0, 1, 2), tensors=lambda: [q, k, v],
        ours=lambda *t: fk.flash_attention(*t, causal=True, backend="triton"),
    )  # fmt: skip
    rows = list(config_times.rows(workload, Device()))
    assert len(rows) == 3
    assert {row["default"] for row in rows} == {True}
    assert len({row["kernel"] for row in rows}) == 3


def test_goals_are_judged_by_our_rows_alone():
    import goals

    shape = {"operator": "flash_attention", "shape": goals.FLASH_SHAPE, "kind": "time", "milliseconds": 1.0}
    rows = [
        shape | {"direction": "forward", "provider": "ours", "tflop_per_s": 500.0},
        shape | {"direction": "forward", "provider": "theirs", "tflop_per_s": 700.0},
        shape | {"operator": "piecewise_attention", "shape": goals.PIECEWISE_SHAPE, "direction": "forward",
                 "provider": "ours", "tflop_per_s": 450.0},
    ]  # fmt: skip
    judged = {row["goal"]: row for row in goals.judged(rows, "NVIDIA H100 80GB HBM3", "ours")}
    forward = [row for name, row in judged.items() if name.startswith(f"flash_attention {goals.FLASH_SHAPE} forward")]
    assert [row["reached"] for row in forward] == [True, False]
    [piecewise] = [row for name, row in judged.items() if "piecewise" in name and "forward" in name]
    assert piecewise["measured"] == pytest.approx(0.9)
    assert not piecewise["reached"]
    assert sum(row["measured"] is None for row in judged.values()) == len(judged) - 3
