"""benchmarks/gpu_first.py on a stand-in device that fails: whatever a stage does, the others run and the page is written."""

import json
import random
import tarfile
import time

import pytest

from benchmarks import gpu_first
from benchmarks.gpu_first import STAGES, Stage, run_all, summary

# What a stage can do to its runner, as bash.
FAULTS = {
    "ok": "echo result 7; exit 0",
    "failed, exit code 3": "echo Error: no kernel image; exit 3",
    "failed, exit code -9": "kill -9 $$",
    "failed, exit code -11": "kill -11 $$",
    "out of time": "echo began; sleep 600",
    "ok, garbage": r"head -c 3000 /dev/urandom; seq 1 500; exit 0",
    "ok, a process stays": "sleep 600 & echo left; exit 0",
    "ok, no output": "exit 0",
    "ok, files": "head -c 5000000 /dev/zero > $WORK/checkpoint.json; mkdir $WORK/a; echo 1 > $WORK/a/rows.jsonl; exit 0",
    "out of time, ignores signals": "trap '' TERM INT HUP; while :; do :; done",
}


def test_every_stage_is_reported_whatever_the_others_do(tmp_path):
    order = random.Random(0).sample(sorted(FAULTS), len(FAULTS))
    stages = [Stage(f"stage{i}", 0.06, FAULTS[name], ("Error", "result")) for i, name in enumerate(order)]
    began = time.monotonic()
    results = run_all(stages, 0.4, tmp_path, ["device: a stand-in"])
    assert time.monotonic() - began < 25  # two hang, each for 1.5 s; a sleep of theirs takes 600
    assert [r.outcome for r in results] == [name.split(", ")[0] if "exit" not in name else name for name in order]
    assert [json.loads(line)["name"] for line in (tmp_path / "stages.jsonl").open()] == [s.name for s in stages]
    page = (tmp_path / "summary.md").read_text()
    assert page == summary(results, ["device: a stand-in"])
    assert "Error: no kernel image" in page
    assert "result 7" in page
    assert len(page.splitlines()) < 20 + len(stages) * (stages[0].lines + 3)
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        files = f"stage{order.index('ok, files')}/a/rows.jsonl"
        assert sorted(archive.getnames()) == sorted([files, *(f"{stage.name}.log" for stage in stages)])


def test_what_has_no_time_left_is_said(tmp_path):
    stages = [Stage("long", 1.0, "sleep 60"), Stage("late", 0.5, "echo never")]
    results = run_all(stages, 0.03, tmp_path, [])
    assert [r.outcome for r in results] == ["out of time", "not begun: no time left"]


def test_what_is_left_of_a_share_goes_to_the_next_and_a_stage_says_what_it_has_found(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_first, "GRACE_S", 1.0)
    hangs = "trap 'echo found 3 of 9; exit 1' INT; echo began; while :; do sleep 0.1; done"
    results = run_all([Stage("short", 0.5, "true"), Stage("hangs", 0.5, hangs)], 0.06, tmp_path, [])
    assert results[1].limit_s == pytest.approx(3.6, abs=0.4)
    assert (results[1].outcome, results[1].shown) == ("out of time", ["began", "found 3 of 9"])
    assert results[1].seconds < 3.5


def test_the_stages_share_all_of_the_time():
    assert sum(stage.share for stage in STAGES) == pytest.approx(1)
    assert sum(stage.lines for stage in STAGES) < 110  # the page
