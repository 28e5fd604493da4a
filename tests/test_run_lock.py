"""One trainer for a run folder: a second is refused, what an ended one left is taken over, whatever ends it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from flagscale_like import run_lock
from flagscale_like.errors import ConfigError
from flagscale_like.run_lock import RunLock
from tests.harness import cli, tiny_config, write_yaml


def record(path, **changes):
    process = psutil.Process()
    own = {
        "host": os.uname().nodename,
        "pid": process.pid,
        "started": process.create_time(),
        "since": "then",
        "id": "x",
    }
    path.write_text(json.dumps(own | changes))


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path):
    path = tmp_path / "lock"
    with RunLock(path):
        with pytest.raises(ConfigError, match=f"is in use: process {os.getpid()} on .* trains it since"), RunLock(path):
            pass
        assert path.is_file()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_an_ended_process_is_taken_over(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for changes in ({"pid": ended.pid}, {"started": 1.0}, {"pid": "nonsense"}):  # ended; its number used again; damaged
        record(path, **changes)
        with RunLock(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    monkeypatch.setattr(run_lock, "SILENT_S", 0.3)
    path.write_text("{cut")  # names no host
    with RunLock(path, lambda line: None):
        pass


def test_another_hosts_lock_is_taken_over_once_it_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 1.0)
    path, said = tmp_path / "lock", []
    record(path, host="far-away")
    began = time.monotonic()
    with RunLock(path, said.append):
        assert time.monotonic() - began >= 1.0
    assert "on far-away; watching for 1 s whether it still lives" in said[0]


def test_another_hosts_holder_that_lives_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 30.0)
    path = tmp_path / "lock"
    record(path, host="far-away")
    beat = threading.Timer(0.5, lambda: os.utime(path))
    beat.start()
    with pytest.raises(ConfigError, match="on far-away trains it since then"), RunLock(path, lambda line: None):
        pass
    assert json.loads(path.read_text())["host"] == "far-away"


def test_the_holder_gives_signs_of_life_and_does_not_remove_anothers_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    path = tmp_path / "lock"
    with RunLock(path):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 2
        record(path, id="another")
    assert json.loads(path.read_text())["id"] == "another"


HOLD = """
import sys, time
from pathlib import Path
from flagscale_like.errors import ConfigError
from flagscale_like.run_lock import RunLock
folder = Path(sys.argv[1])
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.001)
try:
    with RunLock(folder / "lock"):
        print("held", flush=True)
        sys.stdin.read()
except ConfigError:
    print("refused", flush=True)
"""


def test_of_many_that_start_together_one_holds_a_lock_that_is_gone(tmp_path):
    record(tmp_path / "lock", started=1.0)
    words, pipe = [sys.executable, "-c", HOLD, str(tmp_path)], subprocess.PIPE
    starts = [subprocess.Popen(words, text=True, stdin=pipe, stdout=pipe) for _ in range(4)]
    assert [start.stdout.readline() for start in starts] == ["ready\n"] * 4
    (tmp_path / "go").touch()
    outcomes = sorted(start.stdout.readline() for start in starts)
    for start in starts:
        start.communicate(timeout=60)
    assert outcomes == ["held\n", "refused\n", "refused\n", "refused\n"]


def test_the_same_command_twice_trains_once_and_a_killed_run_goes_on(tmp_path):
    config = tiny_config(tmp_path / "run", train__steps=100_000, checkpoint={"interval": 1000, "keep": 1})
    path = write_yaml(config, tmp_path / "run.yaml")
    words = [sys.executable, "-m", "flagscale_like", "train", str(path)]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in first.stdout or ():
            if line.startswith("step "):
                break
        second = cli("train", str(path))
        assert second.returncode == ConfigError.exit_code
        assert f"is in use: process {first.pid} on {os.uname().nodename} trains it since" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1, second.stderr
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    again = cli("train", str(path), "train.exit_at_step=1")
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "run" / "lock").exists()
