"""Predicted against measured step times of four ranks on this machine's CPU.

    python -m benchmarks.replay [--hidden 256] [--steps 8]

The device's rates are measured on one rank that trains the same model alone: its kernels are recorded, and the time that a
kernel takes beside its roofline, and the share of the memory's bandwidth that it reaches, are chosen so that one rank's step
comes out. gloo's cost of a call is measured on four ranks. Then layouts of four ranks, which share the CPU's cores, are
rehearsed, replayed and run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from flagscale_like.cluster import ClusterSpec
from flagscale_like.config import RunConfig
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.recipes.rehearse import rehearsal_config, rehearse, rehearsed_kind
from flagscale_like.rehearsal.costs import Costs, with_constants
from flagscale_like.rehearsal.timing import time_step
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.platforms import get_platform
from flagscale_like.runtime.roofline import measure_device
from flagscale_like.training.parts import Part
from tests.harness import run_ranks, tiny_config

LAYOUTS = ({"tp": 4, "sp": True}, {}, {"tp": 2, "sp": True}, {"cp": 4}, {"pp": 2})
RANKS = 4


class Clock(Part):
    """When each step begins."""

    def __init__(self, begun: list[float]) -> None:
        self.begun = begun

    def before(self, plan: object) -> None:
        self.begun.append(time.perf_counter())


def step_seconds(config: RunConfig) -> float:
    """The median time of a step on this rank, without the first two."""
    begun: list[float] = []
    torch.set_num_threads(1)
    with parallel_context(config.parallel) as ctx:
        pretrain(config, ctx, parts=lambda engine: [Clock(begun)])
    return statistics.median(b - a for a, b in zip(begun[2:], begun[3:], strict=False))


def call_seconds(config: RunConfig) -> float:
    """The time of a small all-reduce of all ranks."""
    with parallel_context(config.parallel):
        tensor = torch.zeros(8)
        for _ in range(20):
            dist.all_reduce(tensor)
        begun = time.perf_counter()
        for _ in range(200):
            dist.all_reduce(tensor)
        return (time.perf_counter() - begun) / 200


def run_config(hidden: int, steps: int, layout: dict, folder: str) -> RunConfig:
    model = {
        "num_layers": 4,
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "vocab_size": 2048,
    }
    model["ffn_hidden_size"] = 3 * hidden
    train = {"train__seq_length": 256, "train__global_batch_size": 8, "train__steps": steps}
    return tiny_config(folder, model=model, parallel=layout, checkpoint={"interval": 0}, **train)


def replayed(config: RunConfig, costs: Costs, world: int) -> float:
    ranks = "stages"
    kind = rehearsed_kind("cpu")
    records = [found.record for found in rehearse(config, costs.cluster, kind, world_size=world, ranks=ranks)]
    return time_step(records, config, costs.cluster, costs=costs).timeline.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = measure_device(get_platform(), "fp32")
    cores = torch.multiprocessing.cpu_count()
    one = ClusterSpec(nodes=1, devices_per_node=1, device=device, network_gb_per_s=device.network_gb_per_s)
    with tempfile.TemporaryDirectory() as folder:
        alone = run_config(given.hidden, given.steps, {}, f"{folder}/one")
        (measured,) = run_ranks(1, step_seconds, rehearsal_or(alone, given.steps, f"{folder}/alone"))
        costs = Costs.of(one)
        plain, twice = (replayed(alone, with_constants(costs, kernel_s=s), 1) for s in (0.0, 1e-5))
        kernel_s = max(0.0, (measured - plain) / (twice - plain) * 1e-5)
        call_s = max(run_ranks(RANKS, call_seconds, run_config(given.hidden, given.steps, {}, f"{folder}/call")))
        print(f"one rank: {measured:.3f} s a step, {plain:.3f} without launches: {kernel_s * 1e6:.1f} us a kernel")
        print(f"an all-reduce of {RANKS} ranks: {call_s * 1e6:.0f} us")
        crowd = max(1.0, RANKS / cores)
        shared = replace(
            device,
            bf16_flops=device.bf16_flops / crowd,
            hbm_gb_per_s=device.hbm_gb_per_s / crowd,
            link_gb_per_s=device.link_gb_per_s / crowd,
        )
        place = ClusterSpec(nodes=1, devices_per_node=RANKS, device=shared, network_gb_per_s=shared.link_gb_per_s)
        four = with_constants(Costs.of(place), kernel_s=kernel_s * crowd, call_s=call_s)
        print("layout | predicted, s | measured, s | difference")
        for number, layout in enumerate(LAYOUTS):
            config = run_config(given.hidden, given.steps, layout, f"{folder}/{number}")
            ours = replayed(config, four, RANKS)
            theirs = max(run_ranks(RANKS, step_seconds, rehearsal_or(config, given.steps, f"{folder}/run{number}")))
            print(f"{layout} | {ours:.3f} | {theirs:.3f} | {ours / theirs - 1:+.0%}", flush=True)


def rehearsal_or(config: RunConfig, steps: int, folder: str) -> RunConfig:
    """The run on tokens that are made up, for more steps than a rehearsal has."""
    own = rehearsal_config(config, folder)
    return own.model_copy(update={"train": own.train.model_copy(update={"steps": steps})})


if __name__ == "__main__":
    main()
