"""benchmarks/gpu_first.py on a stand-in device that fails: whatever a stage does, the others run and the page is written."""

import json
import random
import time

from benchmarks.gpu_first import SHOWN_LINES, Stage, run_all, summary

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
    "out of time, ignores signals": "trap '' TERM INT HUP; while :; do :; done",
}


def test_every_stage_is_reported_whatever_the_others_do(tmp_path):
    order = random.Random(0).sample(sorted(FAULTS), len(FAULTS))
    stages = [Stage(f"stage{i}", 0.05, FAULTS[name], ("Error", "result")) for i, name in enumerate(order)]
    began = time.monotonic()
    results = run_all(stages, 0.5, tmp_path)
    assert time.monotonic() - began < 25  # two hang, each for 1.5 s; a sleep of theirs takes 600
    assert [r.outcome for r in results] == [name.split(", ")[0] if "exit" not in name else name for name in order]
    assert [json.loads(line)["name"] for line in (tmp_path / "stages.jsonl").open()] == [s.name for s in stages]
    page = summary(results, ["device: a stand-in"])
    assert "Error: no kernel image" in page
    assert "result 7" in page
    assert len(page.splitlines()) < 20 + len(stages) * (SHOWN_LINES + 3)


def test_what_has_no_time_left_is_said(tmp_path):
    stages = [Stage("long", 1.0, "sleep 60"), Stage("late", 0.5, "echo never")]
    results = run_all(stages, 0.03, tmp_path)
    assert [r.outcome for r in results] == ["out of time", "not begun: no time left"]
