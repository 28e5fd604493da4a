"""A run's page: what it says of a run with every kind of event, and what a browser makes of it."""

import json
import math
import re
import shutil
import subprocess
import tracemalloc

import pytest

from flagscale_like.errors import ConfigError, DataError
from flagscale_like.json_files import write_record
from flagscale_like.training.charts import Curve, chart, layout_drawing, short, thinned, ticks
from flagscale_like.training.metrics import plot_losses
from flagscale_like.training.report import planned_memory, read_story, write_report
from tests.commands import invoke
from tests.harness import tiny_config
from tests.tools import find_program

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
STEPS, WORLD = 60, 4


def step_record(config, step, loss, *, skipped=0, minute=0):
    tokens_per_s = 1000.0 + 10 * step
    flops = config.model.flops_per_token(config.train.seq_length) * tokens_per_s / WORLD
    return {
        "step": step,
        "lm loss": loss,
        "grad-norm": 1.0 + math.sin(step),
        "learning-rate": 1e-3 * step / STEPS,
        "batch-size": 8,
        "world-size": WORLD,
        "consumed-samples": 8 * step,
        "iteration-time": 0.2,
        "tokens-per-second": tokens_per_s,
        "throughput/tflops/device": flops / 1e12,
        "mem-peak-bytes": 300 << 20,
        "skipped-steps": skipped,
        "time": f"2026-01-01T00:{minute:02d}:{step % 60:02d}+00:00",
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: steps 1 to 40, back to 30, on to 60; a NaN step, a restart, saves, alarms of the monitors."""
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    folder.mkdir()
    config = tiny_config(folder, train__steps=STEPS, parallel={"tp": 2, "pp": 2, "sp": True})
    (folder / "config.yaml").write_text(config.to_yaml())
    records = [step_record(config, s, None if s == 12 else 6 * 0.97**s, skipped=s >= 12) for s in range(1, 41)]
    records += [step_record(config, s, 6 * 0.96**s, skipped=1, minute=1) for s in range(31, 61)]
    records.insert(20, {"step": 20, "checkpoint/stall_s": 0.1, "checkpoint/write_s": 0.5, "time": records[0]["time"]})
    by_source = {"lm loss validation/web & more": 3.25, "lm loss validation/books": 3.75}
    records.insert(20, {"step": 20, "lm loss validation": 3.5, **by_source, "time": records[0]["time"]})
    restart = {"resilience/restarts": 1, "resilience/lost-steps": 2, "resilience/recovery_s": 7.5}
    records.append({"step": 50, **restart, "time": records[-1]["time"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    event = {
        "step": 35,
        "kind": "loss_spike",
        "value": 9,
        "limit": 7,
        "action": "rewind",
        "message": "<img alt=x> 6 sigma",
    }
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    ledger = [
        {"event": "start", "time": 1767225600.0, "step": 0},
        {"event": "stop", "time": 1767225640.0, "step": 25},
        {"event": "start", "time": 1767225660.0, "step": 25},
        {"event": "stop", "time": 1767225700.0, "step": 60},
    ]
    (folder / "resilience.jsonl").write_text("".join(json.dumps(e) + "\n" for e in ledger))
    return folder


def test_the_story_keeps_the_branch_that_the_run_is_on(run):
    story = read_story(run)
    assert [r["step"] for r in story.kept] == list(range(1, 61))
    assert [[r["step"] for r in part] for part in story.given_up] == [list(range(31, 41))]
    assert story.validation == [(20, 3.5)]
    assert story.world_size == WORLD
    assert story.ettr == pytest.approx(60 * 0.2 / 80)
    assert story.by_source == {"web & more": 3.25, "books": 3.75}
    happened = [(mark.step, mark.kind) for mark in story.happened]
    assert happened == [
        (12, "skip"),
        (20, "checkpoint"),
        (25, "resume"),
        (31, "rewind"),
        (35, "rewind"),
        (50, "restart"),
    ]


def test_a_run_that_made_more_steps_than_it_plans_now_is_told_as_it_is(run, tmp_path):
    shorter = shutil.copytree(run, tmp_path / "shorter")
    text = (shorter / "config.yaml").read_text()
    (shorter / "config.yaml").write_text(text.replace(f"steps: {STEPS}\n", "steps: 40\n"))
    write_report(shorter, tmp_path / "page.html")
    assert "step 60 (train.steps is 40 now)" in (tmp_path / "page.html").read_text()


def test_the_plot_marks_resumes_and_draws_the_sources(run, tmp_path):
    """The picture with sources and a resume is another one than without."""
    pictures = []
    for name, keep in (("all", True), ("less", False)):
        folder = shutil.copytree(run, tmp_path / name)
        with open(folder / "resilience.jsonl", "a") as file:
            file.write('{"event": "start"}\n')  # of a step that nobody knows: no line is drawn
        if not keep:
            (folder / "resilience.jsonl").unlink()
        plot_losses(folder)
        pictures.append((folder / "loss.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_the_plot_of_a_long_run_holds_the_curves_and_not_the_records(tmp_path):
    record = {"lm loss": 5.0, "lm loss/mean": 5.0, "iteration-time": 0.5} | {f"number {n}": n / 7 for n in range(20)}
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        for step in range(5_000):
            write_record(file, {"step": step, **record})
    plot_losses(tmp_path)  # matplotlib itself is loaded
    tracemalloc.start()
    plot_losses(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_the_plan_on_the_page_is_the_planners_for_the_ranks_that_ran(run):
    story = read_story(run)
    layout, memory = planned_memory(story.config, story.world_size)
    assert (layout.tp, layout.pp, layout.dp) == (2, 2, 1)
    assert len(memory) == 2
    assert memory[0].overhead == 0


def test_the_page_asks_for_nothing_and_runs_no_word_of_the_run(run, tmp_path):
    write_report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<title>a &lt;run&gt;</title>" in page
    assert "<img" not in page
    assert "{{" not in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", page)
    assert len(page) < 200_000
    for part in ("layers 0-1", "planned, stage 1", "num_query_groups: 2", "restart 1, 2 steps lost, back after 7.5 s"):
        assert part in page
    assert "1 checkpoint saved" in page
    assert "<td>web &amp; more</td><td>3.2500</td>" in page
    assert "step 60 of 60," in page


# Drawings of a larger run, to see that their words fit too.
LARGE = chart("large", "loss", [Curve(name="training", points=[(0, 1e5), (6_000, 2e5)])], [], last_step=6_000)
LARGE += layout_drawing([[range(8), range(16, 24)], [range(8, 16), range(24, 32)]], tp=16, dp=8, sp=True)
PROBE = """<script>
const curves = [...document.querySelectorAll("path.curve")].map(path => {
  const box = path.getBBox(), style = getComputedStyle(path);
  return {name: path.dataset.name, chart: path.closest("svg").dataset.key, length: path.getTotalLength(),
          width: box.width, height: box.height, stroke: style.stroke, shown: style.display};
});
const cut = [...document.querySelectorAll("svg text")].filter(text => {
  const box = text.getBBox(), view = text.closest("svg").viewBox.baseVal;
  return box.x < 0 || box.y < 0 || box.x + box.width > view.width || box.y + box.height > view.height;
}).map(text => text.textContent);
const svg = document.querySelector("svg.chart"), place = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: place.left + place.width / 2, clientY: place.top + 50}));
const found = {curves, cut, marks: document.querySelectorAll("svg.chart .mark").length,
  asked: performance.getEntriesByType("resource").map(entry => entry.name),
  readout: document.getElementById("readout").textContent, wide: document.documentElement.scrollWidth > innerWidth};
document.title = "probe:" + JSON.stringify(found);
</script>"""


def test_a_browser_draws_the_curves(run, tmp_path):
    browser = find_program(*BROWSERS)
    page = tmp_path / "page.html"
    write_report(run, page)
    page.write_text(page.read_text() + LARGE + PROBE)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1200", "--virtual-time-budget=2000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120)
    probe = re.search(r"<title>probe:(.*?)</title>", shown.stdout, re.DOTALL)
    assert probe, shown.stdout[:2000] + shown.stderr
    found = json.loads(probe[1].replace("&lt;", "<").replace("&amp;", "&"))
    drawn = {(c["chart"], c["name"]): c for c in found["curves"]}
    charts = ("lm loss", "tokens-per-second", "learning-rate", "grad-norm")
    assert {(key, name) for key in charts for name in ("training", "given up")} | {
        ("lm loss", "validation"),
        ("large", "training"),
    } == set(drawn)
    for key in charts:
        curve = drawn[key, "training"]
        assert curve["width"] > 400  # of 620: steps 1 to 60 across the chart
        assert curve["height"] > 60
        assert curve["length"] > curve["width"]
        assert curve["stroke"].startswith("rgb")
        assert curve["shown"] != "none"
    assert found["cut"] == []  # every word is inside its drawing
    assert found["marks"] == 4 * 6
    assert found["asked"] == []
    assert re.match(r"step 2[0-9]: lm loss ", found["readout"])
    assert not found["wide"]


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        read_story(tmp_path)
    (tmp_path / "config.yaml").write_text(tiny_config(tmp_path).to_yaml())
    with pytest.raises(DataError, match="no step is on record"):
        read_story(tmp_path)


def test_the_command_writes_beside_the_run(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    found = invoke(["report", str(copy)])
    assert found.exit_code == 0, found.error
    assert found.printed == f"wrote {copy}/report.html: 60 steps on record, 5 events; open it in a browser\n"
    assert (copy / "report.html").is_file()


def test_thinning_keeps_the_spike_and_the_order():
    points = [(step, 100.0 if step == 7777 else float(step % 3)) for step in range(20_000)]
    kept = thinned(points, 1000)
    assert len(kept) <= 1010
    assert (7777, 100.0) in kept
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1_200_000, "1.2M"), (45_000, "45k"), (2000, "2,000"), (0.003, "0.003"), (2e-5, "2e-5"), (0, "0")],
)
def test_numbers_on_an_axis_are_short(value, text):
    assert short(value) == text


def test_ticks_are_round():
    assert ticks(0, 60, 6) == [0, 10, 20, 30, 40, 50, 60]
    assert ticks(5.37, 7.71, 4) == [6, 7]
