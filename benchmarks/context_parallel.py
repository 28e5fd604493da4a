"""Compares a training step of two context-parallel ranks with a step of one process on the same row, alternating in one run.

    python -m benchmarks.context_parallel [--seq-length 4096] [--kind gather|a2a] [--rounds 5] [--json FILE]

Every process computes with one thread, so that two ranks have two cores. The ranks of both launches stay up; while one launch
steps, the other waits. The script prints the median step time of each, and the median of the ratios of consecutive steps:
two ranks at no cost for their messages would reach 2.0. It prints the same of CPU seconds of the busiest process, which other
work on the machine changes less; they leave out the time in which a rank waits for the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("FLAGSCALE_LIKE_DEVICE", "cpu")

MODEL = {
    "num_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 1376,
    "vocab_size": 8192,
}


def step_on_request(pipe: Connection, rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    """One rank: a step and its seconds for every message, until the pipe closes."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from flagscale_like.config import RunConfig
    from flagscale_like.recipes.benchmark import our_steps
    from flagscale_like.runtime.parallel import parallel_context

    torch.set_num_threads(1)
    config = RunConfig.model_validate(
        {
            "run_dir": "unused",
            "model": MODEL,
            "parallel": {"cp": ranks, "cp_kind": options.kind},
            "train": {
                "steps": 1 + options.rounds,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "seq_length": options.seq_length,
                "precision": "fp32",
            },
            "optimizer": {"lr": 1e-4},
            "data": {"synthetic": True},
            "checkpoint": {"interval": 0},
        }
    )
    with parallel_context(config.parallel) as ctx:
        steps = our_steps(config, ctx)
        while True:
            began, worked = time.perf_counter(), time.process_time()
            loss = next(steps)
            pipe.send((time.perf_counter() - began, time.process_time() - worked, loss))
            if not pipe.recv():
                return


class Launch:
    """Ranks that step when they are asked to."""

    def __init__(self, ranks: int, options: argparse.Namespace) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        processes = multiprocessing.get_context("spawn")
        self.pipes, self.ranks = [], []
        for rank in range(ranks):
            ours, theirs = processes.Pipe()
            self.ranks.append(
                processes.Process(target=step_on_request, args=(theirs, rank, ranks, port, options), daemon=True)
            )
            self.ranks[-1].start()
            self.pipes.append(ours)
        self._answers()  # to the first step, which makes the optimizer's states

    def step(self) -> tuple[float, float, float]:
        """Seconds of a step on the slowest rank, CPU seconds on the busiest, and the loss."""
        for pipe in self.pipes:
            pipe.send(True)
        return self._answers()

    def _answers(self) -> tuple[float, float, float]:
        seconds, worked, losses = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        return max(seconds), max(worked), losses[0]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(False)
        for rank in self.ranks:
            rank.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--kind", choices=("gather", "a2a"), default="gather")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    one, two = Launch(1, options), Launch(2, options)
    rounds = [(one.step(), two.step()) for _ in range(options.rounds)]
    for launch in (one, two):
        launch.end()
    assert all(abs(a[2] - b[2]) < 1e-4 * a[2] for a, b in rounds), f"other losses: {rounds}"
    found = {"kind": options.kind, "seq_length": options.seq_length}
    for place, name in enumerate(("wall", "CPU")):
        alone, together = (statistics.median(side[place] for side in sides) for sides in zip(*rounds, strict=True))
        ratios = sorted(a[place] / b[place] for a, b in rounds)
        found[name] = {"one_process_s": alone, "two_ranks_s": together, "ratios": ratios}
        print(
            f"{options.kind}, {options.seq_length} tokens, {name} seconds of a step: one process {alone:.2f}, two ranks "
            f"{together:.2f}; ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
