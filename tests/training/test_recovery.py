"""Stopping, failing, restarting and going back; with real processes and real signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import soak
from flagscale_like import json_files
from flagscale_like.checkpoint.manifest import step_folders
from flagscale_like.config import Monitors
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import PeerLostError
from flagscale_like.json_files import keep_records, records_backwards
from flagscale_like.training.guard import Guard
from flagscale_like.training.metrics import read_metrics
from flagscale_like.training.parts import Event, Facts, Verdict
from flagscale_like.training.recovery import Ledger, effective_time_ratio, read_ledger
from tests import faults
from tests.harness import REPOSITORY, cli, free_port, run_ranks, tiny_config, write_yaml


def signalled(config, number):
    """Train; rank 1 gets the signal inside its third step."""
    if os.environ["RANK"] == "1":
        faults.at_call(Engine, "forward_backward", 3, lambda call: (os.kill(os.getpid(), number), call())[1])
    return faults.train_and_listen(config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all_after_the_step_with_a_save_and_nothing_is_lost(number, tmp_path):
    run_ranks(2, faults.train_run, tiny_config(tmp_path / "whole"))
    config = tiny_config(tmp_path / "run")
    results = run_ranks(2, signalled, config, number)
    assert [error for _, error in results] == [None, None]
    assert "stopped at step 3; the same command goes on from the newest checkpoint" in results[0][0]
    run_ranks(2, faults.train_run, config)
    assert faults.resumed_from(config.run_dir) == 3
    assert faults.losses(config.run_dir) == faults.losses(tmp_path / "whole")
    assert not any("resilience/restarts" in r for r in read_metrics(tmp_path / "run"))  # it was no interruption


def fails_on_rank_1(config):
    def fail(call):
        raise ZeroDivisionError("a bug")

    if os.environ["RANK"] == "1":
        faults.at_call(Engine, "forward_backward", 3, fail)
    try:
        faults.train_run(config)
    except (ZeroDivisionError, PeerLostError) as error:
        return f"{type(error).__name__}: {error}"


def test_one_ranks_exception_ends_the_others_with_one_readable_line(tmp_path):
    assert run_ranks(2, fails_on_rank_1, tiny_config(tmp_path / "run")) == [
        "PeerLostError: rank 0 lost its connection to another rank, which has ended",
        "ZeroDivisionError: a bug",
    ]


def test_a_taken_port_is_one_line_and_exit_code_15(tmp_path):
    import socket

    yaml = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "run.yaml")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        rank: dict[str, Any] = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        result = cli("train", str(yaml), **rank, MASTER_PORT=str(taken.getsockname()[1]))
    assert result.returncode == 15
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "the port is taken: choose another --master-port" in lines[0]
    assert "Traceback" not in result.stderr


def test_restarts_that_do_not_help_end_with_the_ranks_own_exit_code(tmp_path):
    data = {"sources": [{"path": "x"}], "tokenizer": str(tmp_path / "nowhere")}
    yaml = write_yaml(tiny_config(tmp_path / "run", data=data), tmp_path / "run.yaml")
    result = cli("train", str(yaml), "--nproc-per-node", "1", "--max-restarts", "1")
    assert result.returncode == 11
    cause, why = (
        f"error: tokenizer {tmp_path}/nowhere: no such folder",
        "rank 0 ended with exit code 11; its error is above",
    )
    assert [line for line in result.stderr.splitlines() if "error" in line] == [
        cause,
        f"restarting all ranks (1 of 1): {why}",
        cause,
        f"error: {why}",
        "error: given up after 1 restarts (--max-restarts)",
    ]


def start_cli(*arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-m", "flagscale_like", *map(str, arguments)],
        env=env,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(launcher):
    """Rank processes of a launcher, by rank."""
    found = {}
    for child in psutil.Process(launcher.pid).children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return found


def until_step(run_dir, wanted, launcher, timeout_s=90):
    """Wait until the run has recorded a step."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and launcher.poll() is None:
        steps = faults.losses(run_dir)
        if steps and steps[-1][0] >= wanted:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {wanted} was not reached: {launcher.communicate()}")


def test_a_killed_rank_restarts_the_job_and_sigterm_to_the_launcher_saves_and_exits_0(tmp_path):
    # one long run for both, because starting a launcher and its ranks is what takes the time
    config = tiny_config(tmp_path / "run", train__steps=3000, checkpoint={"interval": 5, "keep": 2})
    yaml = write_yaml(config, tmp_path / "run.yaml")
    launcher = start_cli("train", yaml, "--nproc-per-node", 2, "--max-restarts", 2)
    try:
        until_step(config.run_dir, 12, launcher)
        ranks_of(launcher)[1].kill()
        killed_at = faults.losses(config.run_dir)[-1][0]
        end = time.monotonic() + 90
        while not any("resilience/restarts" in r for r in read_metrics(Path(config.run_dir))):
            assert time.monotonic() < end
            assert launcher.poll() is None
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, err
    assert "restarting all ranks (1 of 2): rank 1 was ended by SIGKILL, as the kernel does" in err
    (record,) = [r for r in read_metrics(Path(config.run_dir)) if "resilience/restarts" in r]
    resumed = faults.resumed_from(config.run_dir)
    assert resumed % 5 == 0
    assert resumed >= 5
    assert record["resilience/restarts"] == 1
    assert 0 <= record["resilience/lost-steps"] <= killed_at + 10 - resumed
    assert 0 < record["resilience/recovery_s"] < 60
    assert 0 < record["resilience/ettr"] < 1
    stopped = int(re.search(r"stopped at step (\d+)", out)[1])
    assert next(step_folders(Path(config.run_dir) / "checkpoints")).name == f"step_{stopped:08d}"
    steps = [step for step, *_ in faults.losses(config.run_dir)]
    assert steps == list(range(1, stopped + 1))  # every step once
    assert not psutil.pid_exists(launcher.pid) or not ranks_of(launcher)


# Going back


def poisoned(config, steps):
    """Train; the loss of these steps is NaN on rank 1, and on no other."""
    if os.environ["RANK"] == "1":
        faults.poison(steps, "total")
    return faults.train_and_listen(config)


def test_a_nan_on_one_rank_is_skipped_by_all_alike(tmp_path):
    config = tiny_config(tmp_path / "run")
    results = run_ranks(2, poisoned, config, {3})
    assert [error for _, error in results] == [None, None]
    assert faults.losses(config.run_dir)[2][1] is None
    last = [r for r in read_metrics(tmp_path / "run") if "lm loss" in r][-1]
    assert last["skipped-steps"] == 1


def test_a_run_goes_back_skips_the_batches_in_between_and_a_restart_stays_on_the_new_branch(tmp_path):
    monitors = {"non_finite": "rewind", "rewind_steps": 2}
    config = tiny_config(tmp_path / "run", checkpoint={"interval": 1, "keep": 9}, monitors=monitors, train__steps=5)
    halfway = config.model_copy(update={"train": config.train.model_copy(update={"exit_at_step": 4})})
    results = run_ranks(2, poisoned, halfway, {4})
    assert [error for _, error in results] == [None, None]
    said = results[0][0]
    assert "step 4: went back to step 2, skipping 16 samples in between" in said
    records = [(r["step"], r["consumed-samples"]) for r in read_metrics(tmp_path / "run") if "lm loss" in r]
    # steps 3 and 4 are made twice, the second time with other data
    assert records == [(1, 8), (2, 16), (3, 24), (4, 32), (3, 40), (4, 48)]
    state = json.loads((tmp_path / "run/checkpoints/step_00000002/state.json").read_text())
    assert (state["consumed_samples"], state["rewinds"]) == (32, 1)
    run_ranks(2, faults.train_run, config)
    found = [r for r in read_metrics(tmp_path / "run") if "lm loss" in r]
    assert found[-1]["consumed-samples"] == 56
    kept = [*found[:2], *found[4:]]  # each step is logged
    assert found[-1]["kept-time"] == pytest.approx(sum(r["iteration-time"] for r in kept), rel=1e-9)


def test_caps_end_a_run_that_does_not_get_better(tmp_path):
    monitors = {"max_consecutive_skips": 2}
    results = run_ranks(2, poisoned, tiny_config(tmp_path / "run", monitors=monitors), {2, 3, 4})
    reason = "not finite; monitors.non_finite is skip; 3 steps in a row (monitors.max_consecutive_skips)"
    for _, error in results:
        assert error.startswith("DivergedError: step 4: loss nan, gradient norm ")
        assert error.endswith(f"{reason}; the update was not made")
    assert faults.losses(tmp_path / "run")[-1][0] == 4
    # the save of step 3 was under way: it is finished, not lost
    assert (tmp_path / "run" / "checkpoints" / "step_00000003" / "manifest.json").is_file()


def reported(guard):
    """(kind, action) of the events that a guard reports."""
    found = []
    report = SimpleNamespace(event=lambda step, consumed, event: found.append((event.kind, event.action)))
    guard.after(SimpleNamespace(plan=SimpleNamespace(step=1), consumed=8), report)
    return found


def test_the_guard_takes_the_gravest_verdict_and_counts():
    def spikes(facts):
        return [Event("loss", facts.loss, 10.0, "rewind", "a spike")] if facts.loss > 10 else []

    counting, nan = Guard(Monitors(max_consecutive_skips=2, on_max_skips="rewind", max_rewinds=2)), float("nan")

    def guard(loss, norm, overflow):
        return counting(Facts(loss, norm, 1, overflow, {}), spikes)

    assert guard(1.0, 1.0, False) is Verdict.UPDATE
    assert guard(1.0, nan, True) is Verdict.SKIP  # an fp16 overflow, not counted
    assert [guard(nan, 1.0, False) for _ in range(3)] == [Verdict.SKIP, Verdict.SKIP, Verdict.REWIND]
    assert counting.skips == 0
    assert guard(11.0, 1.0, False) is Verdict.REWIND
    assert counting.reason == "a spike"
    assert guard(12.0, 1.0, False) is Verdict.STOP
    assert "monitors.max_rewinds" in counting.reason
    assert reported(counting) == [
        *[("non_finite", "skip")] * 3,
        ("max_consecutive_skips", "rewind"),
        ("loss", "rewind"),
        ("loss", "rewind"),
        ("max_rewinds", "stop"),
    ]
    assert reported(counting) == []
    infinite = Facts(float("inf"), 1.0, 1, False, {})
    assert Guard(Monitors(non_finite="stop"))(infinite, lambda _: ()) is Verdict.STOP


def test_a_gradient_that_no_loss_scale_makes_finite_is_not_skipped_for_ever():
    guard = Guard(Monitors(max_consecutive_skips=2))
    overflowed = Facts(1.0, float("nan"), 1, True, {})
    verdicts = [guard(overflowed, lambda _: ()) for _ in range(103)]
    assert verdicts == [Verdict.SKIP] * 102 + [Verdict.STOP]
    assert "monitors.max_consecutive_skips" in guard.reason


def test_the_ledger_counts_what_an_interruption_cost(tmp_path):
    def record(step, seconds, at):
        time_ = f"2026-01-01T00:00:{at:02d}+00:00"
        return json.dumps({"step": step, "lm loss": 1.0, "iteration-time": seconds, "time": time_})

    second = 1767225600.0  # 2026-01-01T00:00:00Z
    Ledger(tmp_path, 0, now=lambda: second)
    # ten steps of 1 s, reported every two; killed after the last
    lines = [record(step, 1.0, step) for step in (2, 4, 6, 8, 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    clock = [second + 15]
    ledger = Ledger(tmp_path, 6, now=lambda: clock[0])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")  # as Reporter cuts it
    clock[0] += 5
    assert ledger.recovered() == {
        "resilience/restarts": 1,
        "resilience/lost-steps": 4,
        "resilience/recovery_s": 10.0,
        "resilience/ettr": 6 / 20,
    }
    assert ledger.recovered() == {}
    ledger.close(None)
    clock[0] += 1000  # after an orderly stop no time is lost
    later = Ledger(tmp_path, 6, now=lambda: clock[0])
    assert later.recovered() == {}
    assert effective_time_ratio(read_metrics(tmp_path), read_ledger(tmp_path), clock[0]) == pytest.approx(6 / 20)
    later.close(None)
    assert soak.ettr(tmp_path) == pytest.approx(6 / 20)  # whenever it is asked


def test_a_resume_reads_a_long_record_of_steps_from_its_end(tmp_path, monkeypatch):
    path, steps = tmp_path / "metrics.jsonl", [*range(1, 5001), *range(4001, 6001)]
    more = {"iteration-time": 1.0, "time": "1970-01-01T01:00:00+00:00", "more": "x" * 100}
    lines = [json.dumps({"step": step, "kept-time": float(step), **more}) for step in steps]
    saved = '{"step": 5990, "checkpoint/write_s": 1.0}'  # on record when steps 5991 to 5998 are done
    path.write_text("\n".join([*lines[:-2], saved, *lines[-2:]]) + '\n{"step": 6001, "iterat')
    (tmp_path / "resilience.jsonl").write_text('{"event": "start", "time": 0, "step": 0}\n')
    reads, read = [], json_files.json.loads
    monkeypatch.setattr(json_files.json, "loads", lambda text: reads.append(len(text)) or read(text))
    ledger = Ledger(tmp_path, 5990, now=lambda: 10000.0)
    assert ledger.interruption.lost_steps == 10
    for _ in range(2):
        keep_records(path, "step", 5990, in_order="iteration-time")
        assert path.read_text().splitlines() == [*lines[:-10], saved]  # and what the rewind gave up
    assert ledger.recovered()["resilience/ettr"] == 5990 / 10000
    assert len(reads) < 40
    assert [record["step"] for _, record in records_backwards(path)][1:] == steps[:-10][::-1]
    keep_records(path, "step", 0)
    assert path.read_bytes() == b""
