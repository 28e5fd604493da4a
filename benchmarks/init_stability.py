"""Compares the stability of training a deep, narrow model from several initialisations, at several learning rates and seeds.

    python -m benchmarks.init_stability --layers 48 --seeds 1 2 --lrs 0.003 0.01 --out init_stability.json

For each initialisation, the script prints the mean loss of the last tenth of the run, the number of steps with a spike of
6 sigma, and the number of runs that diverged. It plots the training losses. Results are appended to the JSON file, so
that `--schemes` can run a comparison in parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib
import torch

from benchmarks.tiny import losses_of, prepared, run, tiny_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCHEMES = {
    "standard": {"scheme": "standard"},
    "depth-scaled": {"scheme": "depth_scaled"},
    "salience": {"scheme": "standard", "salience": {"samples": 16, "rounds": 4, "settle": 6}},
    "depth-scaled + salience": {"scheme": "depth_scaled", "salience": {"samples": 16, "rounds": 4, "settle": 6}},
}
INIT_STD_AT_4096 = 0.02  # scaled to the width, so that a matrix of the narrow model has the gain of one in a wide model
DIVERGED = 1.0  # a run whose final loss is this many nats above its best loss counts as diverged


def one_run(folder: Path, data: dict, scheme: str, lr: float, seed: int, options: argparse.Namespace) -> dict:
    """Train one model. Return its losses, the number of spikes, and whether it diverged."""
    config = tiny_run(
        folder,
        layers=options.layers,
        hidden=options.hidden,
        steps=options.steps,
        lr=lr,
        data=data,
        init=SCHEMES[scheme],
        model={"init_std": INIT_STD_AT_4096 * (4096 / options.hidden) ** 0.5},
        train={"seed": seed, "micro_batch_size": 16, "global_batch_size": 16},
        optimizer={"warmup_steps": options.warmup, "schedule": "constant"},
    )
    began = time.perf_counter()
    records, events, stopped = run(config)
    losses = [loss for _, loss in losses_of(records)]
    tail = losses[-max(1, options.steps // 10) :]
    end = statistics.fmean(tail)
    return {
        "scheme": scheme,
        "lr": lr,
        "seed": seed,
        "layers": options.layers,
        "steps": options.steps,
        "end_loss": end,
        "best_loss": min(losses),
        "spikes": sum(event["kind"] in ("grad_norm", "loss") for event in events),
        "diverged": bool(stopped) or not end < min(losses) + DIVERGED,
        "losses": [round(loss, 4) for loss in losses],
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(results: list[dict]) -> str:
    """A Markdown table with one line for each scheme and learning rate: final loss over the seeds, spikes, divergences."""
    lines = ["| initialisation | lr | final loss, mean (min to max) | spikes | diverged |", "|---|---|---|---|---|"]
    for lr in sorted({r["lr"] for r in results}):
        for scheme in SCHEMES:
            found = [r for r in results if r["lr"] == lr and r["scheme"] == scheme]
            if found:
                ends = [r["end_loss"] for r in found]
                lines.append(
                    f"| {scheme} | {lr:g} | {statistics.fmean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f}) | "
                    f"{sum(r['spikes'] for r in found)} | {sum(r['diverged'] for r in found)} of {len(found)} |"
                )
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Plot the loss curves, with one panel for each learning rate."""
    rates = sorted({r["lr"] for r in results})
    figure, panels = plt.subplots(1, len(rates), figsize=(3.6 * len(rates), 3.2), sharey=True, layout="constrained")
    for lr, axes in zip(rates, panels if len(rates) > 1 else [panels], strict=True):
        for color, scheme in enumerate(SCHEMES):
            for order, found in enumerate(r for r in results if r["lr"] == lr and r["scheme"] == scheme):
                label = scheme if order == 0 else None
                axes.plot(range(1, len(found["losses"]) + 1), found["losses"], f"C{color}", lw=0.8, label=label)
        axes.set_title(f"learning rate {lr:g}", fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    (panels[0] if len(rates) > 1 else panels).set_ylabel("training loss (nats/token)")
    (panels[0] if len(rates) > 1 else panels).legend(fontsize=7)
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--out", type=Path, default=Path("init_stability.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(r["scheme"], r["lr"], r["seed"], r["layers"], r["steps"]) for r in results}
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder) / "corpus")
        for scheme in options.schemes:
            for lr in options.lrs:
                for seed in options.seeds:
                    if (scheme, lr, seed, options.layers, options.steps) in done:
                        continue
                    results.append(one_run(Path(folder) / f"{scheme}{lr}{seed}", data, scheme, lr, seed, options))
                    options.out.write_text(json.dumps(results) + "\n")
                    last = results[-1]
                    print({k: v for k, v in last.items() if k != "losses"}, flush=True)
    print(table(results))
    plot(results, options.plot or options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
