"""Compares fixed weights with dynamic data selection on a blend of code and noise, by the held-out loss at equal tokens.

    python -m benchmarks.data_selection --steps 800 --out data_selection.json

Half of the blend is code of the Python standard library, the other half is random letters. With each rule, the same model is
trained from the same seed on the same number of tokens. The loss is measured on packages that are in no training source. The
script prints a table, and plots the weight of the noise and the held-out loss. Results are appended to the JSON file.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import tempfile
from pathlib import Path

import matplotlib
import torch

from benchmarks.tiny import VOCABULARY, run, stdlib_patterns, tiny_run
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.config import Parallel
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.pretrain import prepare_once
from flagscale_like.data.stream import TokenStream, read_stream
from flagscale_like.recipes.evaluate import evaluate_stream
from flagscale_like.runtime.parallel import parallel_context

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RULES = ("fixed", "progress", "target", "loss")
SPLITS = {"target": ("sqlite3", "wsgiref", "xmlrpc"), "held_out": ("xml/sax", "multiprocessing")}
HELD_OUT_TOKENS = 20_000


def prepare(folder: Path) -> tuple[str, dict[str, str]]:
    """Tokenize the sources, the target and the held-out set.

    Returns:
        The tokenizer folder, and the path of each .bin/.idx pair without the suffix, by name.
    """
    code = prepare_once(tiny_run(folder, layers=1, hidden=16, steps=2, lr=1e-3))
    tokenizer = code.data.required_tokenizer
    noise, rng = folder / "noise.jsonl", random.Random(0)
    letters = string.ascii_lowercase + " "
    texts = ("".join(rng.choices(letters, k=2000)) for _ in range(600))
    noise.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([noise], tokenizer, folder / "noise")
    prefixes = {"code": code.data.sources[0].path, "noise": str(folder / "noise")}
    for name, packages in SPLITS.items():
        files = [path for pattern in stdlib_patterns(packages) for path in Path("/").glob(pattern.lstrip("/"))]
        preprocess(sorted(files), tokenizer, folder / name)
        prefixes[name] = str(folder / name)
    return tokenizer, prefixes


def one_run(folder: Path, rule: str, seed: int, tokenizer: str, prefixes: dict, options: argparse.Namespace) -> dict:
    """Train with one rule and seed. Return the weights over the steps, and the held-out loss at each checkpoint."""
    data: dict = {"sources": [{"path": prefixes[name]} for name in ("code", "noise")], "tokenizer": tokenizer}
    if rule != "fixed":
        data["selection"] = {"rule": rule, "interval": 10}
        if rule == "target":
            data["selection"]["target"] = prefixes["target"]
    config = tiny_run(
        folder / "run",
        layers=2,
        hidden=64,
        steps=options.steps,
        lr=3e-3,
        data=data,
        train={"seed": seed, "micro_batch_size": 16, "global_batch_size": 16},
        checkpoint={"interval": options.steps // 5, "keep": 9},
    )
    records, _, _ = run(config)
    weights = [(r["step"], r["selection/weight/noise"]) for r in records if "selection/weight/noise" in r]
    stream = read_stream(Path(prefixes["held_out"]), None, vocab_size=VOCABULARY)
    stream = TokenStream(stream.tokens[:HELD_OUT_TOKENS], None)
    curve = []
    for checkpoint in sorted((folder / "run/checkpoints").glob("step_*")):
        reader = CheckpointReader(checkpoint)
        with parallel_context(Parallel()) as ctx:
            loss = evaluate_stream(reader, stream, ctx, seq_length=64, micro_batch_size=16).loss
        curve.append((int(reader.state["step"]), loss))
    seconds = sum(r["iteration-time"] for r in records if "iteration-time" in r)
    return {"rule": rule, "seed": seed, "noise_weight": weights, "held_out": curve, "seconds": round(seconds, 1)}


def table(results: list[dict]) -> str:
    lines = ["| rule | weight of the noise at the end | held-out loss, each seed | mean |", "|---|---|---|---|"]
    for rule in RULES:
        found = [r for r in results if r["rule"] == rule]
        if found:
            weight = statistics.fmean(r["noise_weight"][-1][1] if r["noise_weight"] else 0.5 for r in found)
            ends = [r["held_out"][-1][1] for r in found]
            each = ", ".join(f"{end:.3f}" for end in ends)
            lines.append(f"| {rule} | {weight:.3f} | {each} | {statistics.fmean(ends):.3f} |")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for color, rule in enumerate(RULES):
        for order, found in enumerate(r for r in results if r["rule"] == rule):
            style = {"color": f"C{color}", "lw": 1, "label": rule if order == 0 else None}
            steps = [step for step, _ in found["held_out"]]
            weights = found["noise_weight"] or [(0, 0.5), (steps[-1], 0.5)]
            left.plot(*zip(*weights, strict=True), **style)
            right.plot(*zip(*found["held_out"], strict=True), marker="o", markersize=3, **style)
    left.set_ylabel("weight of the noise")
    left.set_ylim(0, 1)
    right.set_ylabel("held-out loss (nats/token)")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--out", type=Path, default=Path("data_selection.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(r["rule"], r["seed"], r["held_out"][-1][0]) for r in results}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, prefixes = prepare(Path(folder) / "corpus")
        for rule in options.rules:
            for seed in options.seeds:
                if (rule, seed, options.steps) in done:
                    continue
                results.append(one_run(Path(folder) / f"{rule}{seed}", rule, seed, tokenizer, prefixes, options))
                options.out.write_text(json.dumps(results) + "\n")
                print(rule, seed, results[-1]["noise_weight"][-1:], results[-1]["held_out"][-1], flush=True)
    print(table(results))
    plot(results, options.plot or options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
