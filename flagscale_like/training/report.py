"""A run's report: one HTML file with curves, events, configuration, layout, and planned and measured memory."""

from __future__ import annotations

import datetime
import html
import itertools
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagscale_like.config import RunConfig, load_config
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.figures import fixed, short
from flagscale_like.json_files import read_records
from flagscale_like.planner.layout import Layout
from flagscale_like.planner.memory import RankMemory, rank_memory
from flagscale_like.planner.search import Goal, configured_layout
from flagscale_like.run_folder import RunFolder
from flagscale_like.training.charts import COMPONENTS, Curve, Mark, chart, layout_drawing, memory_bars, thinned
from flagscale_like.training.metrics import loss_curve, loss_name, read_metrics
from flagscale_like.training.recovery import effective_time_ratio, read_ledger

TEMPLATE = Path(__file__).with_name("report.html")

# The kinds of events that the charts mark, in the order of the legend.
KINDS = {
    "spike": "spike or alarm",
    "skip": "skipped step",
    "rewind": "rewind",
    "restart": "restart",
    "resume": "resume after a stop",
    "checkpoint": "checkpoint",
}
CHARTS = (
    ("rewards/accuracy", "share of pairs whose chosen answer has the higher reward"),
    ("rewards/margin", "reward of the chosen answer less that of the rejected one"),
    ("reward/mean", "mean reward of the rollouts"),
    ("kl/reference", "divergence of a rollout from the reference, nats"),
    ("policy/clip-share", "share of the drawn tokens that a bound decided"),
    ("policy/entropy", "entropy of the policy at the drawn tokens, nats"),
    ("policy/engine-difference", "engine's and trainer's log-probability of a token, difference"),
    ("rollout/length", "mean tokens of a rollout"),
    ("tokens-per-second/generate", "tokens/s of drawing"),
    ("tokens-per-second/score", "tokens/s of scoring"),
    ("tokens-per-second/update", "tokens/s of learning"),
    ("tokens-per-second", "tokens/s"),
    ("learning-rate", "learning rate"),
    ("grad-norm", "gradient norm"),
    ("experts/largest-load", "tokens of the busiest expert, in even shares"),
    ("experts/entropy", "entropy of the routers' scores, nats"),
)


@dataclass(frozen=True, kw_only=True)
class Story:
    """The history of a run, read from the files in its folder.

    Attributes:
        config: the run's configuration.
        loss: what the records call the loss.
        kept: one record of metrics.jsonl for each step, without the steps that a rewind discarded.
        given_up: the records of discarded steps, one list for each rewind.
        validation: (step, what an evaluation found).
        by_source: the last validation loss of each data source, by name.
        happened: the events, in the order of their steps.
        ettr: effective training time ratio; None if the run folder has no resilience.jsonl.
    """

    config: RunConfig
    loss: str
    kept: list[dict[str, Any]]
    given_up: list[list[dict[str, Any]]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    by_source: dict[str, float] = field(default_factory=dict)
    happened: list[Mark] = field(default_factory=list)
    ettr: float | None = None

    @property
    def charts(self) -> list[tuple[str, str]]:
        """Name in the records, and title, of every number that is drawn."""
        title = "loss, nats/token" if self.loss == "lm loss" else self.loss
        drawn = {name for record in self.kept[-100:] for name in record}
        return [(self.loss, title), *((name, title) for name, title in CHARTS if name in drawn)]

    @property
    def validated(self) -> str:
        """The number that the evaluations are compared with: the loss, or the reward of task rl."""
        return "reward/mean" if self.config.task == "rl" else self.loss

    @property
    def last(self) -> dict[str, Any]:
        """The record of the last step."""
        return self.kept[-1]

    @property
    def world_size(self) -> int:
        """The number of ranks of the last step. If the configured layout has changed since and does not fit that number, the
        number of ranks of one copy of the model.
        """
        ranks, copy = int(self.last["world-size"]), self.config.parallel.smallest_world
        return copy if ranks % copy else ranks


def read_story(run_dir: Path) -> Story:
    """Read config.yaml, metrics.jsonl, resilience.jsonl and events.jsonl of a run folder.

    Raises:
        ConfigError: the folder has no config.yaml.
        DataError: metrics.jsonl has no step.
    """
    run_dir = Path(run_dir)
    if not RunFolder(run_dir).config.is_file():
        raise ConfigError(
            f"{run_dir}: no run folder, because it has no config.yaml: give the run_dir of a training run"
        )
    config = load_config(RunFolder(run_dir).config)
    records = read_metrics(run_dir)
    loss = loss_name(records)
    kept, given_up, validation, happened = [], [], {}, []
    measured = {r["step"]: r for r in records if "experts/entropy" in r}  # a part's own record of a step
    for record in records:
        step = record["step"]
        if (measure := "eval/reward" if config.task == "rl" else f"{loss} validation") in record:
            validation[step] = record[measure]
        if "checkpoint/stall_s" in record:
            text = f"step {step}: checkpoint; training waited {record['checkpoint/stall_s']:.2f} s"
            happened.append(Mark(step=step, kind="checkpoint", text=text))
        if "resilience/restarts" in record:
            lost, took = record["resilience/lost-steps"], record["resilience/recovery_s"]
            text = f"step {step}: restart {record['resilience/restarts']:.0f}, {lost:.0f} steps lost, back after {took:.1f} s"
            happened.append(Mark(step=step, kind="restart", text=text))
        if loss not in record:
            continue
        if kept and step <= kept[-1]["step"]:
            lost_steps = [r for r in kept if r["step"] >= step]
            kept = [r for r in kept if r["step"] < step]
            given_up.append(lost_steps)
            validation = {s: value for s, value in validation.items() if s < step}
            text = f"step {lost_steps[-1]['step']}: rewound to before step {step}"
            happened.append(Mark(step=step, kind="rewind", text=text))
        before = kept[-1].get("skipped-steps", 0) if kept else 0
        if record.get("skipped-steps", 0) > before:
            count = record["skipped-steps"] - before
            text = f"step {step}: {count} skipped steps since the previous record"
            happened.append(Mark(step=step, kind="skip", text=text))
        kept.append(measured.get(step, {}) | record)
    if not kept:
        raise DataError(f"{run_dir}: no step is on record in metrics.jsonl yet: run the report after the first step")
    happened += [_alarm(event) for event in read_records(RunFolder(run_dir).events) if "step" in event]
    ledger = read_ledger(run_dir)
    happened += _resumes(ledger)
    now = max((event["time"] for event in ledger), default=None)
    seen = datetime.datetime.fromisoformat(records[-1]["time"]).timestamp()
    return Story(
        config=config,
        loss=loss,
        kept=kept,
        given_up=given_up,
        validation=[(s, value) for s, value in sorted(validation.items()) if value is not None],
        happened=sorted(happened, key=lambda mark: mark.step),
        by_source={name: r[key] for r in records if f"{loss} validation" in r for key, name in _sources(r, loss)},
        ettr=effective_time_ratio(records, ledger, max(now, seen)) if now is not None else None,
    )


def _sources(record: dict[str, Any], loss: str) -> list[tuple[str, str]]:
    """(key, name of the source) of each source's validation loss in a record."""
    prefix = f"{loss} validation/"
    return [(key, key[len(prefix) :]) for key, value in record.items() if key.startswith(prefix) and value is not None]


def _resumes(ledger: Sequence[dict[str, Any]]) -> list[Mark]:
    """The starts that followed an orderly stop. (What follows a start without one is a restart, and in metrics.jsonl.)"""
    return [
        Mark(step=event["step"], kind="resume", text=f"step {event['step']}: stopped, and resumed by a later start")
        for before, event in itertools.pairwise(ledger)
        if before["event"] == "stop" and event["event"] == "start"
    ]


def _alarm(event: dict[str, Any]) -> Mark:
    """Make a mark from a record of events.jsonl, which has step, kind, value, limit, action and message."""
    action = str(event.get("action") or "")
    kind = next((known for known in ("rewind", "skip") if known in action), "spike")
    words = event.get("message") or f"{event.get('value')}, the limit is {event.get('limit')}"
    text = f"step {event['step']}: {event.get('kind', 'event')}: {words}" + (
        f" ({action})" if action not in ("", "none") else ""
    )
    return Mark(step=event["step"], kind=kind, text=text)


def planned_memory(config: RunConfig, world_size: int, *, cuda: bool = False) -> tuple[Layout, Sequence[RankMemory]]:
    """Compute the run's layout and the planned memory of each pipeline stage, without the device's own overhead.

    Raises:
        ConfigError: the configuration was changed and does not fit the number of ranks.
    """
    goal = Goal.of(config, cuda=cuda)
    layout = configured_layout(config, world_size, goal, None)
    return layout, [
        rank_memory(
            goal.arch,
            layout,
            stage,
            seq_length=goal.seq_length,
            precision=goal.precision,
            ops=goal.ops,
            overhead=False,
        )
        for stage in range(layout.pp)
    ]


def write_report(run_dir: Path, out: Path) -> Story:
    """Write the report of a run to `out`. The file loads no other file, and opens without a server.

    Raises:
        ConfigError: `run_dir` is not a run folder, its configuration is not valid, or `out` cannot be written.
        DataError: metrics.jsonl has no step.
    """
    story = read_story(run_dir)
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, text in _parts(story, Path(run_dir)).items():
        page = page.replace("{{" + name + "}}", text)
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    return story


def _parts(story: Story, run_dir: Path) -> dict[str, str]:
    config, last = story.config, story.last
    # Of what a run writes, an MFU alone tells GPUs from CPUs: it is in the records of devices whose peak is known.
    layout, memory = planned_memory(config, story.world_size, cuda="mfu" in last)
    layers = config.model.num_layers
    chunks = [layout.chunk_layers(layers, stage) for stage in range(layout.pp)]
    alarms = [mark for mark in story.happened if mark.kind != "checkpoint"]
    saves = len(story.happened) - len(alarms)
    saved = "1 checkpoint" if saves == 1 else f"{saves} checkpoints"
    rows = "".join(
        f'<tr><td><span class="key {m.kind}"></span>{KINDS[m.kind]}</td><td>{html.escape(m.text)}</td></tr>'
        for m in alarms[:200]
    )
    none = '<tr><td colspan="2" class="quiet">No spike, skip, restart, resume or rewind is on record.</td></tr>'
    return {
        "title": html.escape(run_dir.resolve().name),
        "subtitle": html.escape(
            f"{config.describe_parameters()}, {layout.describe()}, {config.train.precision}; "
            f"step {last['step']:,} {_of_planned(last['step'], config)}, {last['time'][:16].replace('T', ' ')} UTC"
        ),
        "tiles": _tiles(story),
        "charts": "\n".join(_chart(story, name, title) for name, title in story.charts),
        "legend": "".join(
            f'<span><span class="key {kind}"></span>{words}</span>'
            for kind, words in KINDS.items()
            if any(m.kind == kind for m in story.happened)
        ),
        "sources": _by_source(story),
        "events": (rows or none) + (f'<tr><td></td><td class="quiet">{saved} saved</td></tr>'),
        "layout": layout_drawing(chunks, tp=layout.tp, dp=layout.dp, sp=layout.sp, cp=layout.cp),
        "memory": _memory(memory, last["mem-peak-bytes"], on_cpu="mfu" not in last),
        "config": html.escape(config.to_yaml()),
        "data": _script_data(story),
    }


def _of_planned(step: int, config: RunConfig) -> str:
    planned = config.train.steps
    return f"of {planned:,}" if step <= planned else f"(train.steps is {planned:,} now)"


def _by_source(story: Story) -> str:
    """The last validation loss of each data source, as HTML; empty where there are no sources."""
    if not story.by_source:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{fixed(value)}</td></tr>" for name, value in story.by_source.items()
    )
    return f'<section><h2>Validation loss by source</h2><div class="wide"><table>{rows}</table></div></section>'


def _tiles(story: Story) -> str:
    """The figures at the top of the report, as HTML."""
    kept, last = story.kept, story.last
    speed = statistics.median(r["tokens-per-second"] for r in kept)
    losses = loss_curve(kept, story.loss)
    tiles = [("loss", fixed(losses[-1][1]) if losses else "not finite")]
    held_out = "validation loss" if story.validated == story.loss else "reward on held-out prompts"
    tiles += [(held_out, fixed(story.validation[-1][1]))] if story.validation else []
    tiles += [("tokens/s, median", f"{speed:,.0f}")]
    tiles += (
        [("MFU, median", f"{statistics.median(r['mfu'] for r in kept if 'mfu' in r):.1%}")] if "mfu" in last else []
    )
    if story.config.task == "rl":
        tiles += [("reward", short(last["reward/mean"]))] if "reward/mean" in last else []
        tiles += [("rollouts", f"{last['consumed-samples']:,}")]
    else:
        tiles += [("tokens", f"{last['consumed-samples'] * story.config.train.seq_length:,}")]
    tiles += [("skipped steps", f"{last.get('skipped-steps', 0)}")]
    tiles += [("restarts", str(sum(m.kind == "restart" for m in story.happened)))]
    tiles += [("effective time (ETTR)", f"{story.ettr:.1%}")] if story.ettr is not None else []
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles)


def _points(story: Story, records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    if name == story.loss:
        return loss_curve(records, name)
    return [(r["step"], r[name]) for r in records if r.get(name) is not None and math.isfinite(r[name])]


def _chart(story: Story, name: str, title: str) -> str:
    curves = [Curve(name="given up", points=_points(story, part, name), style="given-up") for part in story.given_up]
    curves.append(Curve(name="training", points=_points(story, story.kept, name)))
    if name == story.validated:
        curves.append(Curve(name="validation", points=story.validation, style="second", dots=True))
    return chart(name, title, curves, story.happened, last_step=story.last["step"])


def _memory(memory: Sequence[RankMemory], measured: float, *, on_cpu: bool) -> str:
    planned = COMPONENTS[:-1]
    rows = [
        (f"planned, stage {stage}", [(name, getattr(m, name.replace(" ", "_"))) for name in planned])
        for stage, m in enumerate(memory[:16])
    ]
    rows.append(("measured, rank 0", [("measured", measured)]))
    what = (
        "Measured on a CPU: the most memory that the process of rank 0 held. Python and its packages take some hundred MiB "
        "of it, which the plan does not count."
        if on_cpu
        else "Measured: the most memory that the allocator of rank 0 held. The plan does not count the driver's own memory."
    )
    share = f"Planned for stage 0: {memory[0].total / measured:.1%} of what was measured." if measured else ""
    return memory_bars(rows) + f'<p class="quiet">{what} {share}</p>'


def _script_data(story: Story) -> str:
    """The JSON data that the report's script shows for the step under the pointer, thinned to about 2000 steps."""
    points = {step for step, _ in thinned(_points(story, story.kept, story.loss), 2000)}
    names = [name for name, _ in story.charts]
    rows = [[r["step"], *(r.get(name) for name in names)] for r in story.kept if r["step"] in points]
    text = json.dumps({"names": names, "rows": rows, "last": story.last["step"]}, allow_nan=False)
    return text.replace("<", "\\u003c")
