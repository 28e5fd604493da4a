"""A fall in rank, seen before the loss shows it: a learning rate that climbs past what the model bears.

    python -m benchmarks.rank_collapse --seeds 1 2 --out rank_collapse.json

Each seed trains twice on the same samples: at a learning rate that is right, and at one that climbs through the whole run.
Prints for the climbing one the step from which on the effective rank of its residual stream (mean of the layers) is below two
thirds of its healthy twin's at two measurements in a row, and the step at which the loss shows it by any of three rules: a
6-sigma event of the loss monitor; the smoothed loss 3 % above its own minimum; 3 % above the twin's. Steps before the end of
the twin's warm-up are left out. Draws loss and rank beside the JSON. Results are added to those that the file already has.
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
SHARE = 2 / 3
WARM_UP = 20


def one_run(folder: Path, data: dict, seed: int, climbs: bool, options: argparse.Namespace) -> dict:
    """Train once; losses, the residual stream's ranks, and the events of both monitors."""
    config = tiny_run(
        folder,
        layers=options.layers,
        hidden=64,
        steps=options.steps,
        lr=options.peak_lr if climbs else options.lr,
        data=data,
        train={"seed": seed, "micro_batch_size": 16, "global_batch_size": 16},
        optimizer={"warmup_steps": options.steps - 1 if climbs else WARM_UP, "schedule": "constant"},
        monitors={"effective_rank": {"interval": options.interval, "of": ["activations"], "layers": options.layers}},
    )
    records, events, _ = run(config)
    name = "effective-rank/activations/layers."
    ranks = [(r["step"], [r[f"{name}{layer}"] for layer in range(options.layers)]) for r in records if f"{name}0" in r]
    return {
        "seed": seed,
        "climbs": climbs,
        "losses": losses_of(records),
        "ranks": ranks,
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
    low = [
        step
        for (step, ranks), (_, wanted) in zip(result["ranks"], twin["ranks"], strict=True)
        if step > WARM_UP and sum(ranks) < SHARE * sum(wanted)
    ]
    later = range(WARM_UP, len(loss))
    interval = result["ranks"][0][0]
    rules = {
        "rank": [step for step in low if step - interval in low],
        "loss, 6 sigma": result["loss_events"],
        "loss, above its minimum": [i + 1 for i in later if loss[i] > RISE * min(loss[WARM_UP : i + 1])],
        "loss, above the twin": [i + 1 for i in later if loss[i] > RISE * healthy[i]],
    }
    return {rule: min(steps) if steps else None for rule, steps in rules.items()}


def rank_ratio(result: dict, twin: dict) -> tuple[float, int]:
    """The smallest ratio of the two runs' mean ranks after the warm-up, and its step."""
    pairs = zip(result["ranks"], twin["ranks"], strict=True)
    return min((sum(r) / sum(t), step) for (step, r), (_, t) in pairs if step > WARM_UP)


def table(results: list[dict]) -> str:
    lines = [
        "| seed | rank below 2/3 of the twin's | lowest | loss, 6 sigma | 3 % above its minimum | 3 % above the twin's |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted((r for r in results if r["climbs"]), key=lambda r: r["seed"]):
        twin = next(r for r in results if r["seed"] == result["seed"] and not r["climbs"])
        rank, *loss = ("never" if s is None else f"step {s}" for s in first_shown(result, twin).values())
        ratio, step = rank_ratio(result, twin)
        lines.append(f"| {result['seed']} | {rank} | {ratio:.2f} at step {step} | {' | '.join(loss)} |")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for climbs, color, label in ((False, "C0", "right learning rate"), (True, "C3", "climbing learning rate")):
        for order, result in enumerate(r for r in results if r["climbs"] == climbs):
            style = {"color": color, "lw": 1, "label": label if order == 0 else None}
            top.plot([step for step, _ in result["losses"]], smoothed(result["losses"]), **style)
            bottom.plot(*zip(*((step, sum(r) / len(r)) for step, r in result["ranks"]), strict=True), **style)
            if climbs:
                twin = next(r for r in results if r["seed"] == result["seed"] and not r["climbs"])
                shown = first_shown(result, twin)
                seen = [step for rule, step in shown.items() if rule != "rank" and step is not None]
                if shown["rank"]:
                    bottom.axvline(shown["rank"], color="C3", ls=":", lw=1)
                if seen:
                    top.axvline(min(seen), color="C3", ls=":", lw=1)
    top.set_ylabel("loss (nats/token, smoothed)")
    bottom.set_ylabel("effective rank of the\nresidual stream, mean of layers")
    bottom.set_xlabel("step (dotted: first seen)")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend(fontsize=8)
    figure.savefig(path, dpi=66)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--peak-lr", type=float, default=3.2e-2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("rank_collapse.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(r["seed"], r["climbs"]) for r in results}
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder) / "corpus")
        for seed in options.seeds:
            for climbs in (False, True):
                if (seed, climbs) not in done:
                    results.append(one_run(Path(folder) / f"{seed}{climbs}", data, seed, climbs, options))
                    options.out.write_text(json.dumps(results) + "\n")
    print(table(results))
    plot(results, options.plot or options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
