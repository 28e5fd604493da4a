"""Predicted against measured step times of four ranks on this machine's CPU.

    python -m benchmarks.replay [--hidden 256] [--steps 10] [--layouts 0,1,2,3,4] [--out FILE.json]

Four ranks share the CPU's cores, and other work may share the machine, so what a prediction needs is measured beside each
layout, in the same four processes, before and after its steps: a small decoder layer forward and backward, which says how
much slower ranks compute together than one alone; and the calls of gloo that the layout makes, by operation, number of ranks
and bytes. What one kernel takes beside its roofline is chosen so that the step of one rank alone comes out. Layouts are
rehearsed, and replayed with these numbers; the steps themselves are not looked at before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flagscale_like.cluster import ClusterSpec, DeviceSpec
from flagscale_like.config import RunConfig
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.recipes.rehearse import record, rehearsal_config, rehearsed_kind
from flagscale_like.rehearsal.costs import MESSAGE, Costs, with_constants
from flagscale_like.rehearsal.record import RankRecord
from flagscale_like.rehearsal.replay import CALLS
from flagscale_like.rehearsal.timing import time_step
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.platforms import get_platform
from flagscale_like.runtime.roofline import measure_device
from flagscale_like.training.parts import Part
from tests.harness import run_ranks, tiny_config

LAYOUTS = ({"tp": 4, "sp": True}, {}, {"tp": 2, "sp": True}, {"cp": 4}, {"pp": 2})
RANKS = 4
CORES = os.cpu_count() or 1
SIZES = (1 << 10, 1 << 20)  # bytes of a call that are measured; others lie on the line through them
Calls = dict[tuple[str, int], tuple[float, float]]


class Clock(Part):
    """When each step begins."""

    def __init__(self, begun: list[float]) -> None:
        self.begun = begun

    def before(self, plan: object) -> None:
        self.begun.append(time.perf_counter())


def step_seconds(config: RunConfig) -> float:
    """The median time of a step on this rank, without the first two."""
    begun: list[float] = []
    pretrain(config, CONTEXT[0], parts=lambda engine: [Clock(begun)])
    return statistics.median(b - a for a, b in zip(begun[2:], begun[3:], strict=False))


CONTEXT: list = []  # the parallel context of this process


def median_seconds(work: Callable[[], object], budget_s: float) -> float:
    """The median of as many runs as fit the budget, on all ranks at once; the same number on all ranks."""
    work()
    began = time.perf_counter()
    work()
    one = torch.tensor(time.perf_counter() - began)
    if dist.is_initialized():
        dist.all_reduce(one, op=dist.ReduceOp.MAX)
    runs, taken = max(5, int(budget_s / one.item())), []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.mean(sorted(taken)[: -max(1, runs // 20)])  # a rank that was put aside once is left out


def unit(hidden: int, rows: int) -> Callable[[], None]:
    """A decoder layer's kernels and an output layer, forward and backward, with torch alone."""
    layer = torch.nn.TransformerEncoderLayer(hidden, 4, 3 * hidden, dropout=0.0, batch_first=True)
    head = torch.nn.Linear(hidden, 2048)
    tokens, labels = torch.randn(1, rows, hidden), torch.randint(2048, (rows,))

    def work() -> None:
        loss = torch.nn.functional.cross_entropy(head(layer(tokens))[0], labels)
        loss.backward()

    return work


def call(name: str, group: dist.ProcessGroup, peers: tuple[int, int], nbytes: int) -> Callable[[], object]:
    """One call of gloo over a group; of messages, a send and a receive."""
    ranks = dist.get_world_size(group)
    small, whole = torch.zeros(max(1, nbytes // 4)), torch.zeros(max(1, nbytes // 4) * ranks)
    if name == MESSAGE:
        target, source = peers

        def exchange() -> None:
            for handle in (dist.isend(small, target), dist.irecv(whole[: small.numel()], source)):
                handle.wait()

        return exchange
    return {
        "all_reduce": lambda: dist.all_reduce(small, group=group),
        "broadcast": lambda: dist.broadcast(small, src=dist.get_process_group_ranks(group)[0], group=group),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, small, group=group),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(small, whole, group=group),
    }[name]


def gloo_calls(wanted: Sequence[tuple[str, int]]) -> Calls:
    """Seconds of a call and of a byte of it, for operations and numbers of ranks; all ranks call it."""
    found: Calls = {}
    if not wanted:
        return found
    rank = dist.get_rank()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, RANKS, 2)]
    for name, ranks in wanted:
        group = pairs[rank // 2] if ranks == 2 else dist.group.WORLD
        peers = ((rank + 1) % RANKS, (rank - 1) % RANKS)
        times = [median_seconds(call(name, group, peers, nbytes), 0.15) for nbytes in SIZES]
        # An operation's bytes are those of its input; an exchange is two messages.
        inputs = [nbytes * (ranks if name == "reduce_scatter_tensor" else 1) for nbytes in SIZES]
        halves = 2 if name == MESSAGE else 1
        each = max(0.0, times[1] - times[0]) / (inputs[1] - inputs[0])
        found[name, ranks] = max(0.0, times[0] - each * inputs[0]) / halves, each / halves
    return found


def measured(config: RunConfig, hidden: int, wanted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """On a rank: what it reaches before and after its steps, and the time of a step."""
    torch.set_num_threads(1)
    with parallel_context(config.parallel) as ctx:
        CONTEXT[:] = [ctx]
        work = unit(hidden, config.train.seq_length)
        units, calls, load = [median_seconds(work, 0.7)], [gloo_calls(wanted)], os.getloadavg()[0]
        step = step_seconds(config)
        units, calls = [*units, median_seconds(work, 0.7)], [*calls, gloo_calls(wanted)]
        both = {
            key: tuple(sum(pair) / 2 for pair in zip(calls[0][key], calls[1][key], strict=True)) for key in calls[0]
        }
        return {"step_s": step, "unit_s": sum(units) / 2, "units_s": units, "calls": both, "load": load}


def waiting(seconds: float) -> float:
    """Seconds of the processor that a rank takes while it waits for another one."""
    with parallel_context(tiny_config("unused").parallel):
        dist.barrier()
        before = time.process_time()
        if dist.get_rank() == 0:
            time.sleep(seconds)
        dist.all_reduce(torch.zeros(8))
        return time.process_time() - before


def run_config(hidden: int, layout: dict, folder: str) -> RunConfig:
    model = {
        "num_layers": 4,
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "vocab_size": 2048,
    }
    model["ffn_hidden_size"] = 3 * hidden
    train = {"train__seq_length": 256, "train__global_batch_size": 8, "train__steps": 2}
    return tiny_config(folder, model=model, parallel=layout, checkpoint={"interval": 0}, **train)


def longer(config: RunConfig, steps: int, folder: str) -> RunConfig:
    """The run on tokens that are made up, for more steps than a rehearsal has."""
    own = rehearsal_config(config, folder)
    return own.model_copy(update={"train": own.train.model_copy(update={"steps": steps})})


def records_of(jobs: Sequence[tuple[RunConfig, ClusterSpec]]) -> list[list[RankRecord]]:
    """Rehearsals, in a process of their own."""
    kind = rehearsed_kind("cpu")
    return [list(record(config, place, kind, world_size=place.devices)) for config, place in jobs]


def crowded(k: float, together: float) -> float:
    """How much slower a rank computes where k ranks compute at once, if it is `together` times slower with all of them."""
    return 1.0 if k <= CORES else 1 + (together - 1) * (k / CORES - 1) / (RANKS / CORES - 1)


def predict(records: list[RankRecord], config: RunConfig, costs: Costs, together: float) -> tuple[float, float]:
    """Seconds of a step, and how many ranks compute at a time, which is what their kernels' time depends on."""
    k = float(RANKS)
    for _ in range(4):
        line = time_step(records, config, costs.cluster, costs=replace(costs, crowd=crowded(k, together))).timeline
        busy = line.share("compute") + line.share(CALLS)
        k = 1 + (RANKS - 1) * busy
    return line.seconds, k


def measure_alone(config: RunConfig, hidden: int) -> tuple[DeviceSpec, dict[str, Any]]:
    """The device of one rank that has the machine for itself, and its step."""
    torch.set_num_threads(1)
    return measure_device(get_platform(), "fp32"), measured(config, hidden, ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layouts", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chosen = [LAYOUTS[int(number)] for number in given.layouts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        alone = run_config(given.hidden, {}, f"{folder}/one")
        configs = [run_config(given.hidden, layout, f"{folder}/{i}") for i, layout in enumerate(chosen)]
        ((device, one),) = run_ranks(1, measure_alone, longer(alone, given.steps, f"{folder}/alone"), given.hidden)
        places = [ClusterSpec(nodes=1, devices_per_node=n, device=device, network_gb_per_s=1.0) for n in (1, RANKS)]
        jobs = [(alone, places[0]), *((config, places[1]) for config in configs)]
        (records,) = run_ranks(1, records_of, jobs)
        costs = Costs.of(places[0])
        plain, more = (
            time_step(records[0], alone, places[0], costs=with_constants(costs, kernel_s=s)).timeline.seconds
            for s in (0.0, 1e-5)
        )
        kernel_s = max(0.0, (one["step_s"] - plain) / (more - plain) * 1e-5)
        idle = max(run_ranks(2, waiting, 1.0))
        print(f"one rank alone: {one['step_s']:.3f} s a step, {kernel_s * 1e6:.1f} us a kernel; load {one['load']:.1f}")
        print(f"a rank that waits for 1 s takes {idle:.3f} s of the processor")
        print(
            "layout | computes at once | slower together | predicted, s | measured, s | difference | load", flush=True
        )
        found = []
        for number, (layout, config, own) in enumerate(zip(chosen, configs, records[1:], strict=True)):
            events = [event for one_record in own for event in one_record.step(-1)]
            wanted = sorted(
                {
                    (e.op, len(e.group))
                    for e in events
                    if e.kind == "collective" and e.op != "barrier" and len(e.group) > 1
                }
                | {(MESSAGE, 2) for e in events if e.kind == "send"}
                | {("all_reduce", RANKS)}
            )
            real = longer(config, given.steps, f"{folder}/run{number}")
            ranks = run_ranks(RANKS, measured, real, given.hidden, wanted)
            calls = {
                key: tuple(statistics.mean(rank["calls"][key][i] for rank in ranks) for i in (0, 1)) for key in wanted
            }
            together = statistics.mean(rank["unit_s"] for rank in ranks) / one["unit_s"]
            four = with_constants(Costs.of(places[1]), kernel_s=kernel_s, calls=calls)
            ours, k = predict(own, config, four, together)
            theirs = max(rank["step_s"] for rank in ranks)
            found.append(
                {"layout": layout, "predicted_s": ours, "measured_s": theirs, "together": together, "at_once": k}
            )
            found[-1] |= {
                "calls": [[*key, *value] for key, value in calls.items()],
                "ranks": [r["units_s"] for r in ranks],
            }
            print(
                f"{layout} | {k:.1f} | {together:.2f} | {ours:.3f} | {theirs:.3f} | {ours / theirs - 1:+.0%} | "
                f"{ranks[0]['load']:.1f}",
                flush=True,
            )
    if given.out is not None:
        given.out.write_text(
            json.dumps({"alone": one, "kernel_s": kernel_s, "layouts": found}, indent=1, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
