"""Compares when the effective rank and when the loss show that residual branches are too large for the depth of the model.

    python -m benchmarks.rank_collapse --seeds 1 2 3 4 --out rank_collapse.json

For each seed, the script trains twice on the same samples and from the same random numbers. The healthy run has residual
branches scaled down by the depth. The other run has not (init.scheme standard), and its tokens become more alike from
layer to layer (Dong et al. 2021, arXiv:2103.03404; Noci et al. 2022, arXiv:2206.03126). The script prints the first step
at which each of these rules finds the problem:

- the effective rank of the residual stream, as geometric mean over the measured layers, is below two thirds of the
  healthy run's in two consecutive measurements after the warm-up;
- an event of the monitor's `least`;
- the smoothed loss is 3 % above the healthy run's;
- an event of the loss monitor.

Ranks are measured every --interval steps, the loss at each step. The script plots both, and appends results to the JSON
file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import matplotlib
import torch

from benchmarks.tiny import losses_of, prepared, run, tiny_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHING = 0.9
LOSS_RATIO = 1.03
RANK_RATIO = 2 / 3
MIN_RANK = 2.0
MEASURED_LAYERS = 5
WARM_UP = 20
SCHEMES = {"depth_scaled": "healthy", "standard": "collapses"}


def one_run(folder: Path, data: dict, seed: int, scheme: str, options: argparse.Namespace) -> dict:
    """Train one model. Return its losses, the ranks of the residual stream, and the events of both monitors."""
    config = tiny_run(
        folder,
        layers=options.layers,
        hidden=64,
        steps=options.steps,
        lr=3e-3,
        data=data,
        model={"init_std": options.init_std},
        init={"scheme": scheme},
        train={"seed": seed},
        optimizer={"warmup_steps": WARM_UP, "schedule": "constant"},
        monitors={
            "effective_rank": {
                "interval": options.interval,
                "of": ["activations"],
                "layers": MEASURED_LAYERS,
                "after": options.steps,
                "least": MIN_RANK,
            }
        },
    )
    records, events, _ = run(config)
    prefix = "effective-rank/activations/"
    ranks = [(r["step"], [v for k, v in r.items() if k.startswith(prefix)]) for r in records]
    return {
        "seed": seed,
        "scheme": scheme,
        "losses": losses_of(records),
        "ranks": [(step, statistics.geometric_mean(found)) for step, found in ranks if found],
        "events": {
            "rank": [e["step"] for e in events if e["kind"].startswith(prefix)],
            "loss": [e["step"] for e in events if e["kind"] == "loss"],
        },
    }


def smoothed(losses: list[tuple[int, float]]) -> list[float]:
    """The exponential moving average of the losses, with bias correction."""
    values, total, weight = [], 0.0, 0.0
    for _, loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        values.append(total / weight)
    return values


def ratios(result: dict, twin: dict) -> list[tuple[int, float]]:
    """(step, rank of the run / rank of the healthy run)."""
    return [(step, rank / other) for (step, rank), (_, other) in zip(result["ranks"], twin["ranks"], strict=True)]


def first_shown(result: dict, twin: dict) -> dict[str, int | None]:
    """The first step at which each rule finds the problem; None: never."""
    loss, healthy = smoothed(result["losses"]), smoothed(twin["losses"])
    pairs = ratios(result, twin)
    low = [
        step for (_, before), (step, ratio) in zip(pairs, pairs[1:], strict=False) if max(before, ratio) < RANK_RATIO
    ]
    rules = {
        "rank, twin": [step for step in low if step > WARM_UP],
        "rank, monitor": result["events"]["rank"],
        "loss, twin": [i + 1 for i in range(WARM_UP, len(loss)) if loss[i] > LOSS_RATIO * healthy[i]],
        "loss, monitor": result["events"]["loss"],
    }
    return {rule: min(steps) if steps else None for rule, steps in rules.items()}


def pairs_of(results: list[dict]) -> list[tuple[dict, dict]]:
    """(the run that collapses, the healthy run) of each seed."""
    by_key = {(r["seed"], r["scheme"]): r for r in results}
    seeds = sorted({seed for seed, _ in by_key})
    return [(by_key[seed, "standard"], by_key[seed, "depth_scaled"]) for seed in seeds]


def table(results: list[dict]) -> str:
    lines = [
        "| seed | rank below 2/3 of the healthy run's | event of `least: 2` | the same event in the healthy run "
        "| loss 3 % above the healthy run's | event of the loss monitor "
        "| at the first of these steps: rank and loss, relative to the healthy run |",
        "|---|---|---|---|---|---|---|",
    ]
    for result, twin in pairs_of(results):
        shown = first_shown(result, twin)
        healthy = min(twin["events"]["rank"], default=None)
        words = ["never" if step is None else f"step {step}" for step in (*shown.values(), healthy)]
        rank, monitor, loss, loss_monitor, in_twin = words
        at = min(step for step in shown.values() if step is not None)
        share = dict(ratios(result, twin)).get(at, float("nan"))
        rise = smoothed(result["losses"])[at - 1] / smoothed(twin["losses"])[at - 1]
        cells = (result["seed"], rank, monitor, in_twin, loss, loss_monitor, f"{share:.2f} and {rise:.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for number, pair in enumerate(pairs_of(results)):
        for result, color in zip(pair, ("C3", "C0"), strict=True):
            style = {"color": color, "lw": 1, "label": SCHEMES[result["scheme"]] if number == 0 else None}
            top.plot([step for step, _ in result["losses"]], smoothed(result["losses"]), **style)
            bottom.plot(*zip(*result["ranks"], strict=True), **style)
        shown = first_shown(*pair)
        for axes, rule in ((bottom, "rank, twin"), (top, "loss, twin")):
            if shown[rule]:
                axes.axvline(shown[rule], color="C3", ls=":", lw=1)
    top.set_ylabel("loss (nats/token, smoothed)")
    bottom.set_ylabel("effective rank of the residual\nstream, mean of layers")
    bottom.set_yscale("log")
    bottom.set_xlabel("step (dotted: the first that differs from the healthy run)")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend(fontsize=8)
    figure.savefig(path, dpi=66)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--init-std", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("rank_collapse.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(r["seed"], r["scheme"]) for r in results}
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder) / "corpus")
        for seed in options.seeds:
            for scheme in SCHEMES:
                if (seed, scheme) not in done:
                    results.append(one_run(Path(folder) / f"{seed}{scheme}", data, seed, scheme, options))
                    options.out.write_text(json.dumps(results) + "\n")
    print(table(results))
    plot(results, options.plot or options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
