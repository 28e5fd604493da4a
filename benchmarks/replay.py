"""Predicted against measured step times of four ranks on this machine's CPU.

    python -m benchmarks.replay [--hidden 256] [--steps 10] [--layouts 0,1,2,3,4] [--out FILE.json]

Four ranks share the CPU's cores, and other work may share the machine, so what a prediction needs is measured beside each
layout, in the same four processes, before and after its steps: a small decoder layer forward and backward, which says how
much slower ranks compute together than one alone; and the calls of gloo that the layout makes, by operation, number of
ranks and bytes, with the share of their time in which a rank has a core: one that waits leaves it to the others. What one
kernel takes beside its roofline is chosen so that the step of one rank alone comes out. Layouts are rehearsed, and replayed
with these numbers; the steps themselves are not looked at before.
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
from flagscale_like.errors import required
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
SIZES = (1 << 10, 1 << 17, 1 << 20, 1 << 24)  # bytes that a rank gives to the calls that are measured
BATCHES = 5
Calls = dict[tuple[str, int], list[tuple[float, float]]]


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


def seconds_of(work: Callable[[], object], budget_s: float) -> float:
    """Seconds of a run where all ranks run it at once, until the last one has done: the median of BATCHES of runs."""
    several = dist.get_world_size() > 1
    meet = dist.barrier if several else lambda: None
    work()
    meet()
    began = time.perf_counter()
    work()
    one = torch.tensor(time.perf_counter() - began)
    if several:
        dist.all_reduce(one, op=dist.ReduceOp.MAX)
    runs, taken = max(2, int(budget_s / one.item() / BATCHES)), []
    for _ in range(BATCHES):
        meet()
        began = time.perf_counter()
        for _ in range(runs):
            work()
        meet()
        taken.append((time.perf_counter() - began) / runs)
    return statistics.median(taken)


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
                required(handle, "handle").wait()

        return exchange
    return {
        "all_reduce": lambda: dist.all_reduce(small, group=group),
        "broadcast": lambda: dist.broadcast(small, src=dist.get_process_group_ranks(group)[0], group=group),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, small, group=group),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(small, whole, group=group),
    }[name]


def gloo_calls(wanted: Sequence[tuple[str, int]]) -> Calls:
    """Seconds of calls by their bytes, for operations and numbers of ranks; all ranks call it."""
    found: Calls = {}
    if not wanted:
        return found
    rank = dist.get_rank()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, RANKS, 2)]
    for name, ranks in wanted:
        group = required(pairs[rank // 2] if ranks == 2 else dist.group.WORLD, "group")
        peers = ((rank + 1) % RANKS, (rank - 1) % RANKS)
        # An operation's bytes are those of its input; an exchange is two messages.
        parts, halves = ranks if name == "reduce_scatter_tensor" else 1, 2 if name == MESSAGE else 1
        works = [(nbytes, call(name, group, peers, nbytes // parts)) for nbytes in SIZES]
        found[name, ranks] = [(nbytes, seconds_of(work, 0.1) / halves) for nbytes, work in works]
    return found


def calls_and_processor(wanted: Sequence[tuple[str, int]]) -> tuple[Calls, float]:
    """gloo_calls(), and the share of their time in which this rank had a core: the rest it waited for the others."""
    wall, processor = time.perf_counter(), time.process_time()
    found = gloo_calls(wanted)
    return found, min(1.0, (time.process_time() - processor) / (time.perf_counter() - wall))


def between(several: Sequence[Calls]) -> Calls:
    """The means of what was measured several times."""
    return {
        key: [(nbytes, statistics.mean(one[key][i][1] for one in several)) for i, (nbytes, _) in enumerate(points)]
        for key, points in several[0].items()
    }


def measured(config: RunConfig, hidden: int, wanted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """On a rank: what it reaches before and after its steps, and the time of a step."""
    torch.set_num_threads(1)
    with parallel_context(config.parallel) as ctx:
        CONTEXT[:] = [ctx]
        work = unit(hidden, config.train.seq_length)
        units, load = [seconds_of(work, 0.7)], os.getloadavg()[0]
        before, busy_before = calls_and_processor(wanted)
        step = step_seconds(config)
        units = [*units, seconds_of(work, 0.7)]
        after, busy_after = calls_and_processor(wanted)
        found = {"step_s": step, "unit_s": sum(units) / 2, "units_s": units, "load": load}
        return found | {"calls": between([before, after]), "calls_busy": (busy_before + busy_after) / 2}


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


def predict(
    records: list[RankRecord], config: RunConfig, costs: Costs, together: float, calls_busy: float
) -> tuple[float, float]:
    """Seconds of a step, and how many ranks want a core at a time, which is what their kernels' time depends on.

    Args:
        together: how many times slower a rank computes when all do.
        calls_busy: share of the calls' time in which a rank has a core.
    """
    k = float(RANKS)
    for _ in range(4):
        line = time_step(records, config, costs.cluster, costs=replace(costs, crowd=crowded(k, together))).timeline
        busy = line.share("compute") + calls_busy * line.share(CALLS)
        k = 1 + (RANKS - 1) * busy
    return line.seconds, k


def measure_alone(config: RunConfig, hidden: int) -> tuple[DeviceSpec, dict[str, Any]]:
    """The device of one rank that has the machine for itself, and its step."""
    torch.set_num_threads(1)
    return measure_device(get_platform(), "fp32"), measured(config, hidden, ())


def calls_of(records: Sequence[RankRecord]) -> list[tuple[str, int]]:
    """The operations of a step, with the ranks of their groups."""
    events = [event for one in records for event in one.step(-1) if len(event.group) > 1]
    found = {(event.op, len(event.group)) for event in events if event.kind == "collective" and event.op != "barrier"}
    found |= {(MESSAGE, 2) for event in events if event.kind == "send"}
    return sorted(found | {("all_reduce", RANKS)})


def kernel_seconds(records: list[RankRecord], config: RunConfig, place: ClusterSpec, step_s: float) -> float:
    """What a kernel takes beside its roofline, if the step of one rank takes so long."""
    costs = [with_constants(Costs.of(place), kernel_s=s) for s in (0.0, 1e-5)]
    plain, more = (time_step(records, config, place, costs=own).timeline.seconds for own in costs)
    return max(0.0, (step_s - plain) / (more - plain) * 1e-5)


def compare(
    records: list[RankRecord], config: RunConfig, real: RunConfig, costs: Costs, unit_s: float, hidden: int
) -> dict[str, Any]:
    """A layout's predicted and measured step.

    Args:
        real: the run to measure.
        costs: of one rank that computes alone.
        unit_s: that it takes for the unit.
    """
    ranks = run_ranks(RANKS, measured, real, hidden, calls_of(records))
    calls = between([rank["calls"] for rank in ranks])
    together = statistics.mean(rank["unit_s"] for rank in ranks) / unit_s
    calls_busy = statistics.mean(rank["calls_busy"] for rank in ranks)
    predicted_s, at_once = predict(records, config, replace(costs, calls=calls), together, calls_busy)
    return {
        "predicted_s": predicted_s,
        "measured_s": max(rank["step_s"] for rank in ranks),
        "together": together,
        "at_once": at_once,
        "calls_busy": calls_busy,
        "load": ranks[0]["load"],
        "units_s": [rank["units_s"] for rank in ranks],
        "calls": [[*key, points] for key, points in calls.items()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layouts", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chosen, found = [LAYOUTS[int(number)] for number in given.layouts.split(",")], []
    with tempfile.TemporaryDirectory() as folder:
        alone = run_config(given.hidden, {}, f"{folder}/one")
        configs = [run_config(given.hidden, layout, f"{folder}/{i}") for i, layout in enumerate(chosen)]
        ((device, one),) = run_ranks(1, measure_alone, longer(alone, given.steps, f"{folder}/alone"), given.hidden)
        places = [ClusterSpec(nodes=1, devices_per_node=n, device=device, network_gb_per_s=1.0) for n in (1, RANKS)]
        (records,) = run_ranks(1, records_of, [(alone, places[0]), *((config, places[1]) for config in configs)])
        kernel_s = kernel_seconds(records[0], alone, places[0], one["step_s"])
        idle = max(run_ranks(2, waiting, 1.0))
        print(f"one rank alone: {one['step_s']:.3f} s a step, {kernel_s * 1e6:.1f} us a kernel; load {one['load']:.1f}")
        print(f"a rank that waits for 1 s takes {idle:.3f} s of the processor")
        print("layout | compute at once | slower together | predicted, s | measured, s | difference | load", flush=True)
        costs = with_constants(Costs.of(places[1]), kernel_s=kernel_s)
        for number, (layout, config, own) in enumerate(zip(chosen, configs, records[1:], strict=True)):
            real = longer(config, given.steps, f"{folder}/run{number}")
            row = compare(own, config, real, costs, one["unit_s"], given.hidden)
            found.append({"layout": layout, **row})
            ours, theirs = row["predicted_s"], row["measured_s"]
            print(
                f"{layout} | {row['at_once']:.1f} | {row['together']:.2f} | {ours:.3f} | {theirs:.3f} | "
                f"{ours / theirs - 1:+.0%} | {row['load']:.1f}",
                flush=True,
            )
    if given.out is not None:
        told = {"alone": {**one, "calls": []}, "kernel_s": kernel_s, "waiting_s": idle, "layouts": found}
        given.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
