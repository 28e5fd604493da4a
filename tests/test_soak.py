"""Long runs with random faults: `make soak`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.harness import REPOSITORY, tiny_config, write_yaml
from tests.training.test_recovery import ranks_of, start_cli, until_step

pytestmark = pytest.mark.soak


@pytest.mark.timeout(1800)
def test_random_kills_lose_nothing_and_leak_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    out = tmp_path / "soak.json"
    command = [sys.executable, "benchmarks/soak.py", "--steps", "600", "--kills", "5", "--out", str(out)]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(out.read_text())
    assert figures["kills"] == 5
    assert len(figures["recovery_s"]) == 5
    assert max(figures["lost steps"]) <= 2 * figures["save interval"]  # one save may be under way
    assert figures["memory_growth_mib"] < 20
    assert figures["file_descriptor_growth"] <= 2


@pytest.mark.timeout(300)
def test_a_stopped_rank_is_named_and_the_job_restarts_by_itself(tmp_path):
    limits = {"first_step_timeout_s": 60, "step_timeout_s": 3}
    changes = {"train__steps": 400, "checkpoint": {"interval": 5, "keep": 2}, "resilience": limits}
    config = tiny_config(tmp_path / "run", **changes)
    launcher = start_cli("train", write_yaml(config, tmp_path / "run.yaml"), "--nproc-per-node", 2, "--max-restarts", 1)
    try:
        until_step(config.run_dir, 10, launcher)
        ranks_of(launcher)[1].send_signal(signal.SIGSTOP)
        _, err = launcher.communicate(timeout=200)  # reads on: 400 steps of log lines fill a pipe
    finally:
        launcher.kill()
    assert launcher.returncode == 0, err
    assert "rank 1: no answer" in err
    assert [step for step, *_ in faults.losses(config.run_dir)] == list(range(1, 401))
    assert any(r.get("resilience/restarts") == 1 for r in read_metrics(Path(config.run_dir)))
