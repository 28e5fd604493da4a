"""The memory of a training step on a long sequence, measured on this machine, against the planner's.

    python -m benchmarks.step_memory --seq-length 16384

Each row is a process of its own. Measured is how far the process's resident memory rises in a step above what it holds
before: weights, gradients and optimizer states are there already. Planned is the sum of activations, logits and working
memory. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from flagscale_like.config import RunConfig
from flagscale_like.data.pretrain import build_datasets, micro_batches
from flagscale_like.engine.engine import Engine
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.planner.layout import Layout
from flagscale_like.planner.memory import rank_memory
from flagscale_like.planner.saved import operators_of
from flagscale_like.runtime.parallel import parallel_context

MIB = 2**20
RECOMPUTE = ("none", "selective", "full")


def resident(peak: bool) -> int:
    """Bytes of this process's resident memory; the most since `forget_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def config_of(options: argparse.Namespace, run_dir: str) -> RunConfig:
    hidden = options.hidden
    return RunConfig.model_validate(
        {
            "run_dir": run_dir,
            "model": {
                "num_layers": options.layers,
                "hidden_size": hidden,
                "num_attention_heads": hidden // 64,
                "num_query_groups": hidden // 128,
                "ffn_hidden_size": hidden * 11 // 4,
                "vocab_size": 1024,
            },
            "train": {
                "steps": 2,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "seq_length": options.seq_length,
                "precision": options.precision,
                "recompute": options.recompute,
            },
            "optimizer": {"lr": 1e-4},
            "data": {"synthetic": True},
            "checkpoint": {"interval": 0},
        }
    )


def one_row(options: argparse.Namespace) -> dict[str, float]:
    """Measured and planned bytes of the second of two steps."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(options, folder)
        with parallel_context(config.parallel) as ctx:
            engine = Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer)
            data, _ = build_datasets(config, ctx, train_samples=2, valid_samples=0)
            batches = micro_batches(data, config, ctx)
            for _ in range(2):
                forget_peak()
                before = resident(peak=False)
                engine.forward_backward(batches, NextToken(), 1)
                measured = resident(peak=True) - before
                engine.update(clip=0.0, grad_norm=1.0)
    planned = rank_memory(
        config.model,
        Layout.of(config, 1),
        0,
        seq_length=options.seq_length,
        precision=options.precision,
        ops=operators_of(config.kernels, cuda=False),
        overhead=False,
    )
    parts = {name: getattr(planned, name) for name in ("activations", "logits", "working")}
    return {"measured": measured, **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="measure this row alone, and print it as JSON")
    options = parser.parse_args()
    if options.recompute is not None:
        print(json.dumps(one_row(options)))
        return
    print("| recompute | measured, MiB | planned, MiB | activations + logits + working | planned / measured |")
    print("|---|---|---|---|---|")
    # Freed memory goes back to the system at once, so that what is resident is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for kind in RECOMPUTE:
        words = [sys.executable, "-m", "benchmarks.step_memory", *sys.argv[1:], "--recompute", kind]
        found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        row = json.loads(found.stdout.splitlines()[-1])
        parts = [row[name] / MIB for name in ("activations", "logits", "working")]
        planned, measured = sum(parts), row["measured"] / MIB
        each = " + ".join(f"{part:.0f}" for part in parts)
        print(f"| {kind} | {measured:.0f} | {planned:.0f} | {each} | {planned / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
