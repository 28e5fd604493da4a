"""The rows of a run on disk: JSON lines as they come, then one JSON file and plots."""

import importlib.metadata
import json
import platform
import threading
from pathlib import Path

import goals
import torch

PACKAGES = ("torch", "triton", "liger-kernel", "flash-attn", "flash-attn-3", "flag-attn", "quack-kernels",
            "transformer-engine")  # fmt: skip
SHARES = {"gb_per_s": ("of_copy", "copy_gb_per_s"), "tflop_per_s": ("of_matrix_rate", "matrix_tflop_per_s")}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Report:
    """Takes each row as it comes, from several threads, and writes it to `path`.jsonl before it returns.

    `judge`: whether it says of each goal that it is reached, or that nothing decided it.
    """

    def __init__(self, path: Path, ours: str, *, judge: bool = True) -> None:
        self.path, self.ours, self.judge, self.rows, self.card = path, ours, judge, [], {}
        self.told: set[str] = set()  # goals that have been judged
        self.lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = open(path.with_suffix(".jsonl"), "w", encoding="utf-8")  # noqa: SIM115  closed by `finish`

    def add(self, row: dict) -> None:
        """Write the row, with its share of the card's own rate, and the goals that it decides."""
        with self.lock:
            if row["kind"] == "card":
                self.card = row
            for unit, (share, rate) in SHARES.items():
                if unit in row and rate in self.card:
                    row = row | {share: row[unit] / self.card[rate]}
            self._write(row)
            if self.judge and row["kind"] == "time" and row["provider"] == self.ours:
                for goal in goals.judged(self.rows, self.card.get("device", ""), self.ours):
                    if goal["measured"] is not None and goal["goal"] not in self.told:
                        self.told.add(goal["goal"])
                        self._write(goal)

    def _write(self, row):
        self.rows.append(row)
        self.lines.write(json.dumps(row) + "\n")
        self.lines.flush()
        print(short(row), flush=True)

    def has_failure_of_ours(self) -> bool:
        """Whether a row failed that does not time another implementation."""
        failed = [row["name"] for row in self.rows if row["kind"] == "failure"]
        return any(self.ours in name or not name.startswith("time ") for name in failed)

    def finish(self, about: dict, not_run: list[str]) -> str:
        """Write the goals that nothing decided, the rows that did not run, and the whole report. Returns the summary."""
        for goal in goals.judged(self.rows, self.card.get("device", ""), self.ours) if self.judge else ():
            if goal["goal"] not in self.told:
                self._write(goal)
        if not_run:
            self._write({"kind": "not run", "names": not_run})
        self.lines.close()
        report = about | {"versions": versions(), "card": self.card, "rows": self.rows}
        self.path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot([row for row in self.rows if row["kind"] == "time"], self.path)
        return summary(self.rows)


def short(row: dict) -> str:
    """A row in one line for the terminal."""
    kind = row["kind"]
    if kind == "time":
        rate = f"{row['tflop_per_s']:.0f} TFLOP/s" if "tflop_per_s" in row else f"{row['gb_per_s']:.0f} GB/s"
        share = next((f", {row[s]:.0%} of the card's" for s in ("of_copy", "of_matrix_rate") if s in row), "")
        slow_host = row["host_milliseconds"] > row["milliseconds"]
        host = f"; the host needs {row['host_milliseconds']:.4f} ms" if slow_host else ""
        where = f"{row['operator']} {row['shape']} {row['direction']}"
        return f"{where}: {row['provider']} {row['milliseconds']:.4f} ms, {rate}{share}{host}"
    if kind == "goal":
        said = {True: "reached", False: "NOT reached", None: "not measured"}[row["reached"]]
        measured = "" if row["measured"] is None else f", measured {row['measured']:.4g}"
        return f"goal {row['goal']}{measured}: {said}"
    if kind == "config":
        config = " ".join(f"{name}={value}" for name, value in row["config"].items())
        mark = " (default)" if row["default"] else "" if row["listed"] else " (not listed)"
        time = f"{row['milliseconds']:.4f} ms" if "milliseconds" in row else row["error"]
        return f"{row['kernel']} {row['shape']} {config}{mark}: {time}"
    if kind == "check":
        return f"right: {row['name']}"
    if kind == "failure":
        return f"FAILED {row['name']}: {row['error']}"
    if kind == "not run":
        return f"not run for want of time: {len(row['names'])} rows, from {row['names'][0]!r} on"
    return f"{kind}: {row.get('text') or json.dumps({k: v for k, v in row.items() if k != 'kind'})}"


def summary(rows: list[dict]) -> str:
    """Failures, goals and counts: what to read first."""

    def of(kind):
        return [row for row in rows if row["kind"] == kind]

    measured = [row for row in of("goal") if row["reached"] is not None]
    return "\n".join([
        "", "summary",
        f"{len(of('check'))} variants are right, {len(of('time'))} times, {len(of('config'))} configs, "
        f"{len(of('failure'))} failures",
        *(short(row) for row in of("failure")),
        f"{sum(row['reached'] for row in measured)} of {len(measured)} measured goals are reached",
        *(short(row) for row in of("goal")),
        *(short(row) for row in of("not run")),
    ])  # fmt: skip


def plot(rows, path):
    """Write one picture, `path`.png, with the bars of each operator and direction."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operators = sorted({row["operator"] for row in rows})
    if not operators:
        return
    figure, axes = plt.subplots(len(operators), 2, figsize=(14, 5 * len(operators)), squeeze=False)
    for operator, pair in zip(operators, axes):
        for direction, axis in zip(("forward", "backward"), pair):
            part = [row for row in rows if (row["operator"], row["direction"]) == (operator, direction)]
            _bars(axis, part, f"{operator} {direction}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=80)
    plt.close(figure)


def _bars(axis, rows, title):
    """A group of bars for each shape, one bar for each provider."""
    axis.set_title(title)
    if not rows:
        return
    unit = "tflop_per_s" if "tflop_per_s" in rows[0] else "gb_per_s"
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    for i, name in enumerate(names):
        rates = {row["shape"]: row[unit] for row in rows if row["provider"] == name}
        places = [j + i * 0.8 / len(names) for j in range(len(shapes))]
        axis.bar(places, [rates.get(s, 0.0) for s in shapes], width=0.8 / len(names), label=name)
    axis.set_xticks([j + 0.4 for j in range(len(shapes))], shapes, rotation=30, ha="right", fontsize=7)
    axis.set_ylabel(unit)
    axis.legend(fontsize=7)
