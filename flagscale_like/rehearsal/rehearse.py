"""A rehearsal: what a rank did, its memory, and what it would have waited for."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from flagscale_like.cluster import GIB, ClusterSpec
from flagscale_like.config import RunConfig
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import RehearsalError, required
from flagscale_like.planner.memory import CONTEXT_BYTES, RankMemory, rank_memory, state_bytes
from flagscale_like.planner.search import Goal, configured_layout
from flagscale_like.rehearsal.allocator import EXPANDABLE
from flagscale_like.rehearsal.components import MemoryReport, name_states, report
from flagscale_like.rehearsal.device import DEVICE, RehearsedPlatform
from flagscale_like.rehearsal.memory import Memory
from flagscale_like.rehearsal.record import RankRecord
from flagscale_like.rehearsal.recorder import Recorder
from flagscale_like.rehearsal.snapshot import Placed, place
from flagscale_like.rehearsal.world import rehearsed_rank
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.platforms import Platform
from flagscale_like.training.parts import Part
from flagscale_like.training.plan import StepPlan

# Runs a configuration as this rank, with what it is given as one more part of the run; it takes all engines of the run.
Run = Callable[[RunConfig, ParallelContext, Callable[..., list[Part]]], object]


@dataclass(frozen=True)
class Rehearsed:
    """One rank's rehearsal.

    Attributes:
        stage: of the pipeline.
        memory: of its steps; planned is what the planner's formulas say of it.
        placed: its memory in the allocator's model, without a limit.
        limit: bytes that the device has for tensors; None where it has no memory of its own.
        overflow: the same memory where the device has only so much; None where it fits.
        seconds: that the rehearsal took, on this machine.
        process_bytes: most bytes of this process so far.
    """

    record: RankRecord
    stage: int
    memory: MemoryReport
    planned: RankMemory
    timeline: Memory
    placed: Placed
    limit: int | None
    overflow: Placed | None
    seconds: float
    process_bytes: int

    @property
    def fits(self) -> bool:
        return self.overflow is None

    @property
    def needed_bytes(self) -> int:
        """Of the device's memory: what tensors need, and what context and communication buffers take."""
        return self.placed.needed + (CONTEXT_BYTES if self.limit is not None else 0)

    @property
    def fits_expandable(self) -> bool:
        """Whether it fits with expandable segments."""
        return self.limit is None or self.placed.expandable <= self.limit

    def waits(self) -> Counter[tuple[str, str]]:
        """Where the host waits for the device in the last step, and how often: (line, for what)."""
        return Counter((e.where, e.op) for e in self.record.step(-1) if e.kind == "host_wait")


class Steps(Part):
    """Tells the recorder of the steps, and the memory what its first allocations are."""

    def __init__(self, recorder: Recorder, memory: Memory, *engines: Engine) -> None:
        self.recorder, self.memory, self.engines = recorder, memory, engines

    def before(self, plan: StepPlan) -> None:
        self._name_states()
        self.recorder.begin_step()

    def finish(self, report: object) -> None:
        """The optimizer's states are there after the first step."""
        self._name_states()
        self.memory.end = self.memory.tick

    def _name_states(self) -> None:
        for engine in self.engines:
            name_states(self.memory, engine)


def rehearse_rank(
    config: RunConfig, cluster: ClusterSpec, kind: type[Platform], rank: int, world_size: int, run: Run
) -> Rehearsed:
    """Be one rank of a run, and take its steps.

    Args:
        config: of which the data is made up, and no checkpoint is read or written.
        kind: the platform of the cluster's devices.

    Raises:
        RehearsalError: an operator needs data, or has no implementation without.
    """
    began = time.perf_counter()
    platform = RehearsedPlatform(kind, cluster.device)
    record, memory = RankRecord(rank, world_size), Memory()
    local = rank % cluster.devices_per_node
    with rehearsed_rank(platform, config.parallel, rank, world_size, local_rank=local, seed=config.train.seed) as ctx:
        recorder = Recorder(record, device=DEVICE, memory=memory)
        recorder.name_groups(group_names(ctx))
        platform.observer = recorder
        with recorder:
            run(config, ctx, lambda *engines: [Steps(recorder, memory, *engines)])
        stage = record.stage = ctx.pp_rank
        if not record.step_starts:
            raise RehearsalError("no step was taken: train.steps is used up")
        placed = place(memory)
        limit = overflow = None
        if platform.counts_device_memory:
            limit = cluster.device.hbm_bytes - CONTEXT_BYTES
            overflow = place(memory, limit=limit) if placed.reserved > limit else None
            overflow = overflow if overflow is not None and overflow.broke is not None else None
        found = report(memory)
    return Rehearsed(
        record=record,
        stage=stage,
        memory=found,
        planned=planned_memory(config, platform, rank, world_size, stage),
        timeline=memory,
        placed=placed,
        limit=limit,
        overflow=overflow,
        seconds=time.perf_counter() - began,
        process_bytes=_process_bytes(),
    )


def planned_memory(config: RunConfig, platform: Platform, rank: int, world_size: int, stage: int) -> RankMemory:
    """What the planner's formulas say of a rank, with a critic's states; experts have an even load, as in a rehearsal."""
    goal = replace(Goal.of(config, cuda=platform.triton), imbalance=1.0)
    hbm = platform.total_memory_bytes() if platform.counts_device_memory else None
    layout = configured_layout(config, world_size, goal, hbm)
    rank %= world_size // layout.pp
    planned = rank_memory(
        goal.arch,
        layout,
        stage,
        seq_length=goal.seq_length,
        precision=goal.precision,
        ops=goal.ops,
        rank=rank,
        overhead=platform.counts_device_memory,
    )
    if config.rl is None or not config.rl.has_critic:
        return planned
    critic = state_bytes(goal.arch, layout, stage, precision=goal.precision, rank=rank, outputs=1)
    own = (planned.weights, planned.gradients, planned.optimizer)
    weights, gradients, optimizer = (a + b for a, b in zip(own, critic, strict=True))
    return replace(planned, weights=weights, gradients=gradients, optimizer=optimizer)


def group_names(ctx: ParallelContext) -> dict[str, str]:
    """torch's names of the process groups -> megatron-core's; all ranks are `world`."""
    names: dict[str, str] = {required(dist.group.WORLD, "world").group_name: "world"}
    for name in ("tp", "pp", "cp", "dp", "dp_cp", "ep", "expt_dp", "tp_ep", "tp_cp", "mp", "embd", "tp_dp_cp"):
        group = getattr(ctx.groups, name, None)
        if hasattr(group, "group_name"):
            names.setdefault(group.group_name, name)
    return names


def _process_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def growing_segments(over: Sequence[Rehearsed]) -> str:
    """A way out for ranks that do not fit: segments that grow. Empty where one does not fit with them either."""
    if not all(one.fits_expandable for one in over):
        return ""
    most = max(one.placed.expandable for one in over) + CONTEXT_BYTES
    return f"with segments that grow it fits ({most / GIB:.1f} GiB): start all ranks with {EXPANDABLE}"


def overflow_message(found: Rehearsed, cluster: ClusterSpec) -> str:
    """What did not fit, in words."""
    over, limit = required(found.overflow, "overflow"), required(found.limit, "limit")
    broke = required(over.broke, "the allocation that did not fit")
    return (
        f"stage {found.stage} (rank {found.record.rank}) does not fit {cluster.device.name}: {broke.op} at {broke.where} "
        f"({broke.part}) asks for {broke.nbytes / GIB:.2f} GiB, with {over.in_use / GIB:.2f} GiB in use and "
        f"{over.allocator.reserved / GIB:.2f} reserved of {limit / GIB:.2f}"
    )
