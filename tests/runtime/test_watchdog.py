"""A hung rank ends the job with every rank's last step, phase and stack; a rank that cannot stop in time ends itself."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagscale_like.engine.engine import Engine
from tests import faults
from tests.harness import run_ranks, tiny_config


def sleep_for_ever(call):
    time.sleep(10_000)


def hang(config, rank):
    """Train; the rank falls asleep inside its fourth step."""
    if int(os.environ["RANK"]) == rank:
        faults.at_call(Engine, "forward_backward", 4, sleep_for_ever)
    faults.train_run(config)


def test_a_hung_rank_ends_the_job_with_every_ranks_step_and_stack(tmp_path):
    limits = {"first_step_timeout_s": 300, "step_timeout_s": 3}
    config = tiny_config(tmp_path / "run", checkpoint__interval=2, resilience=limits)
    began = time.monotonic()
    with pytest.raises(AssertionError, match="died"):
        run_ranks(2, hang, config, 1)
    assert time.monotonic() - began < 150  # the later steps' limit, not the first's
    texts = [(tmp_path / "run" / "hang" / f"rank_{rank:05d}.txt").read_text() for rank in range(2)]
    for rank, text in enumerate(texts):
        assert text.startswith(f"rank {rank}: ")
        assert "s in: training step, last step done 3" in text.splitlines()[0]
    assert "sleep_for_ever" in texts[1]  # the culprit's stack shows where
    assert "sleep_for_ever" not in texts[0]
    assert "forward_backward" in texts[0]
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json").is_file()

    run_ranks(2, faults.train_run, config)  # goes on, and keeps the reports
    assert faults.resumed_from(tmp_path / "run") == 2
    assert len(faults.losses(tmp_path / "run")) == 6
    assert len(list((tmp_path / "run").glob("hang-*/rank_00001.txt"))) == 1


WATCH = """
import sys, time
from pathlib import Path
from flagscale_like.runtime.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, int(sys.argv[2]), first_timeout_s=float(sys.argv[3]), timeout_s=0, grace_s=GRACE) as dog:
    dog.beat(7, "saving", slow=True)
    print("ready", flush=True)
    end = time.monotonic() + float(sys.argv[4])
    while time.monotonic() < end and not (dog.asked_to_stop and len(sys.argv) > 5):
        time.sleep(0.05)
print("done", dog.asked_to_stop)
"""


def watch(*arguments, grace_s=1, before=""):
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\nGRACE = {grace_s}\n{WATCH}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_rank_that_is_told_to_stop_has_its_grace_time_and_no_more(number, tmp_path):
    obedient = watch(tmp_path / "hang", 1, 60, 60, "obey")
    obedient.send_signal(number)
    out, err = obedient.communicate(timeout=90)
    assert obedient.returncode == 0
    assert out == "done True\n"
    assert err.startswith(f"{number.name}: stopping after this step, within 1 s")

    stuck = watch(tmp_path / "hang", 1, 60, 60)
    stuck.send_signal(number)
    _, err = stuck.communicate(timeout=90)
    assert stuck.returncode == 143
    assert "1 s later (resilience.grace_s) not done: saving, last step done 7. No checkpoint was saved" in err
    assert err.count("\n") == 2


def test_ctrl_c_again_stops_at_once_but_the_same_one_passed_on_does_not(tmp_path):
    process = watch(tmp_path / "hang", 1, 60, 60, grace_s=60)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == (
        "SIGINT: stopping after this step, within 60 s; Ctrl-C again stops now and saves nothing\n"
    )
    process.send_signal(signal.SIGINT)  # as torchrun passes on what the terminal has sent already
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130
    assert err == "error (rank 0): stopped at once. No checkpoint was saved\n"


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    process = watch(tmp_path / "hang", 1, 60, 1, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out, err) == (0, "done False\n", "")


def test_a_rank_that_does_not_answer_is_named(tmp_path):
    alone = watch(tmp_path / "hang", 2, 1, 60)
    _, err = alone.communicate(timeout=90)
    assert alone.returncode == 16
    assert "a rank makes no progress" in err
    assert re.search(r"rank 0: \d+ s in: saving, last step done 7; rank 1: no answer", err)


AGENT = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
print(rank.pid, flush=True)
rank.wait()
"""


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_a_rank_stops_when_torchruns_agent_has_died_and_outlives_a_shell(under_torchrun, tmp_path):
    seconds = "60" if under_torchrun else "3"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, f"GRACE = 1\n{WATCH}", str(tmp_path / "hang"), "1", "0", seconds, "obey"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment | ({"TORCHELASTIC_RUN_ID": "1"} if under_torchrun else {}),
    )
    assert int(agent.stdout.readline())
    assert agent.stdout.readline() == "ready\n"
    agent.kill()
    # The rank holds the pipes' other ends: this waits for it.
    out, err = agent.communicate(timeout=90)
    assert out == f"done {under_torchrun}\n"
    assert ("the launcher has died" in err) == under_torchrun


def test_a_watchdog_without_limits_lets_go_cleanly(tmp_path):
    process = watch(tmp_path / "hang", 1, 0, 0.2)
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out, err) == (0, "done False\n", "")
    assert list(tmp_path.iterdir()) == []
