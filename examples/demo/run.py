"""A demo of a few minutes on a laptop: tokenize text, train with tensor and pipeline parallelism, stop, resume on another
layout, export to a Hugging Face folder, and generate text with transformers. The script prints each command that it runs.

    python examples/demo/run.py [--run-dir runs/demo] [--steps 160]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(os.path.relpath(Path(__file__).parent))
LAYOUTS = (
    ("tp 2 + sp, pp 2, dp 1", ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2"]),
    ("tp 1, pp 2, dp 2", ["parallel.pp=2"]),
)


def run(*arguments: str) -> None:
    """Print and run `flagscale-like ARGUMENTS`. If the command fails, exit with its exit code."""
    print(f"\n$ flagscale-like {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "flagscale_like", *arguments]).returncode
    if code:
        sys.exit(code)


def unigram_entropy(prefix: Path) -> float:
    """The entropy of the token frequencies, in nats: the lowest loss of a model that ignores context."""
    counts = np.bincount(np.fromfile(f"{prefix}.bin", dtype=np.uint16))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def complete(folder: Path, prompt: str, new_tokens: int) -> str:
    """Generate a completion with transformers, greedily with a repetition penalty."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.3)
    return tokenizer.decode(out[0])


def main(arguments: Sequence[str] | None = None, run: Callable[..., None] = run) -> None:
    """Run the demo.

    Args:
        arguments: command line; None takes sys.argv.
        run: runs a flagscale-like command with the given arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs/demo"), help="run folder; an existing one is removed first"
    )
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps, half on each layout")
    parser.add_argument("--input", default="python-stdlib", help="text to train on")
    args = parser.parse_args(arguments)
    began, run_dir, half = time.perf_counter(), args.run_dir, args.steps // 2
    shutil.rmtree(run_dir, ignore_errors=True)

    prefix = run_dir / "data" / "text"
    run("preprocess", args.input, "--train-tokenizer", "4096", "--out", str(prefix), "--workers", "2")
    common = [
        "train",
        str(HERE / "demo.yaml"),
        f"run_dir={run_dir}",
        f"train.steps={args.steps}",
        f"data.sources=[{{path: {prefix}}}]",
        f"data.tokenizer={prefix}-tokenizer",
        f"checkpoint.interval={half}",
        f"train.eval_interval={half}",
    ]
    (_, first), (_, second) = LAYOUTS
    run(*common, "--nproc-per-node", "4", *first, f"train.exit_at_step={half}")
    run(*common, "--nproc-per-node", "4", *second)
    hf = run_dir / "hf"
    run("convert", "export", "--checkpoint", str(run_dir), "--out", str(hf), "--dtype", "fp32")
    prompt = "def __init__(self, "
    text = complete(hf, prompt, 24)
    report(run_dir, prefix, half, text, time.perf_counter() - began)


def report(run_dir: Path, prefix: Path, half: int, completion: str, seconds: float) -> None:
    """Print the results: losses, throughput on both layouts, the completion, and where the files are."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "lm loss" in record]
    losses = [record["lm loss/mean"] for record in records if "lm loss/mean" in record]  # mean since the record before
    validation = [record["lm loss validation"] for record in map(json.loads, lines) if "lm loss validation" in record]

    def speed(part: list[dict[str, Any]]) -> str:
        return f"{statistics.median(r['tokens-per-second'] for r in part):,.0f} tokens/s"

    first, second = ([r for r in records if r["step"] <= half], [r for r in records if r["step"] > half])
    entropy = unigram_entropy(prefix)
    rows = [
        ("loss, first and last logged", f"{losses[0]:.3f} -> {losses[-1]:.3f} nats/token"),
        ("validation loss", " -> ".join(f"{loss:.3f}" for loss in validation)),
        ("unigram entropy of the text", f"{entropy:.3f} (uniform: {math.log(4096):.3f})"),
        (f"steps 1-{half}", f"{LAYOUTS[0][0]}: {speed(first)}"),
        (f"steps {half + 1}-{2 * half}", f"{LAYOUTS[1][0]}: {speed(second)}"),
        ("completion by transformers", repr(completion)),
        ("metrics, loss plot", f"{run_dir}/metrics.jsonl, {run_dir}/loss.png"),
        (
            "TensorBoard",
            f"{Path(os.path.relpath(sys.executable)).parent / 'tensorboard'} --logdir {run_dir}/tensorboard",
        ),
        ("checkpoints, Hugging Face folder", f"{run_dir}/checkpoints, {run_dir}/hf"),
        ("whole demo", f"{seconds:.0f} s"),
    ]
    print()
    for name, value in rows:
        print(f"{name:<34}{value}")


if __name__ == "__main__":
    main()
