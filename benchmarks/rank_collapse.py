"""A collapse in rank, seen before the loss shows it: a weight decay that was typed with a digit too much.

    python -m benchmarks.rank_collapse --seeds 1 2 3 --out rank_collapse.json

Each seed trains twice on the same samples: with the right weight decay, and with one that is far too strong. Prints for both
the step at which the effective-rank monitor first reports a weight matrix, and the step at which the loss shows it by any of
three rules (a 6-sigma event of the loss monitor; the smoothed loss 3 % above its own minimum; 3 % above the healthy twin's).
Draws loss and rank beside the JSON. Results are added to those that the file already has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib
import torch

from benchmarks.tiny import losses_of, prepared, run, tiny_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHING = 0.9
RISE = 1.03


def one_run(folder: Path, data: dict, seed: int, strong: bool, options: argparse.Namespace) -> dict:
    """Train once; losses, the residual stream's ranks, and the events of both monitors."""
    config = tiny_run(
        folder,
        layers=options.layers,
        hidden=64,
        steps=options.steps,
        lr=options.lr,
        data=data,
        train={"seed": seed, "micro_batch_size": 16, "global_batch_size": 16},
        optimizer={
            "warmup_steps": 20,
            "schedule": "constant",
            "weight_decay": options.strong_decay if strong else options.weight_decay,
        },
        monitors={"effective_rank": {"interval": options.interval, "of": ["weights"], "layers": options.layers}},
    )
    records, events, _ = run(config)
    ranks = []
    for record in records:
        found = [value for name, value in record.items() if name.startswith("effective-rank/weights/")]
        if found:
            ranks.append((record["step"], found))
    return {
        "seed": seed,
        "strong": strong,
        "losses": losses_of(records),
        "ranks": ranks,
        "rank_events": [e["step"] for e in events if e["kind"].startswith("effective-rank/")],
        "loss_events": [e["step"] for e in events if e["kind"] == "loss"],
    }


def smoothed(losses: list[tuple[int, float]]) -> list[float]:
    """Exponential average with its start corrected."""
    values, total, weight = [], 0.0, 0.0
    for _, loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        values.append(total / weight)
    return values


def first_shown(result: dict, twin: dict) -> dict[str, int | None]:
    """The first step by each of the loss's rules, and by the rank's."""
    loss, healthy = smoothed(result["losses"]), smoothed(twin["losses"])
    above_own = [i + 1 for i, value in enumerate(loss) if value > RISE * min(loss[: i + 1])]
    above_twin = [i + 1 for i, value in enumerate(loss) if value > RISE * healthy[i]]
    rules = {
        "rank": result["rank_events"],
        "loss, 6 sigma": result["loss_events"],
        "loss, above its minimum": above_own,
        "loss, above the twin": above_twin,
    }
    return {rule: min(steps) if steps else None for rule, steps in rules.items()}


def table(results: list[dict]) -> str:
    lines = [
        "| seed | weight decay | rank below half | loss, 6 sigma | loss 3 % above its minimum | 3 % above the twin |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: (r["seed"], r["strong"])):
        twin = next(r for r in results if r["seed"] == result["seed"] and not r["strong"])
        steps = " | ".join("never" if s is None else f"step {s}" for s in first_shown(result, twin).values())
        lines.append(f"| {result['seed']} | {'too strong' if result['strong'] else 'right'} | {steps} |")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for strong, color, label in ((False, "C0", "right weight decay"), (True, "C3", "too strong a weight decay")):
        for order, result in enumerate(r for r in results if r["strong"] == strong):
            style = {"color": color, "lw": 1, "label": label if order == 0 else None}
            top.plot([step for step, _ in result["losses"]], smoothed(result["losses"]), **style)
            bottom.plot(*zip(*((step, sum(r) / len(r)) for step, r in result["ranks"]), strict=True), **style)
            if strong:
                twin = next(r for r in results if r["seed"] == result["seed"] and not r["strong"])
                shown = first_shown(result, twin)
                seen = [step for rule, step in shown.items() if rule != "rank" and step is not None]
                if shown["rank"]:
                    bottom.axvline(shown["rank"], color="C3", ls=":", lw=1)
                if seen:
                    top.axvline(min(seen), color="C3", ls=":", lw=1)
    top.set_ylabel("loss (nats/token, smoothed)")
    bottom.set_ylabel("effective rank of the\nweights, mean of matrices")
    bottom.set_xlabel("step (dotted: first seen)")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--strong-decay", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("rank_collapse.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(r["seed"], r["strong"]) for r in results}
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder) / "corpus")
        for seed in options.seeds:
            for strong in (False, True):
                if (seed, strong) not in done:
                    results.append(one_run(Path(folder) / f"{seed}{strong}", data, seed, strong, options))
                    options.out.write_text(json.dumps(results) + "\n")
    print(table(results))
    plot(results, options.plot or options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
