"""What matched and replayed records say of a run: time of a step, tokens a second, MFU, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flagscale_like.cluster import ClusterSpec
from flagscale_like.config import RunConfig
from flagscale_like.planner.report import table
from flagscale_like.planner.search import Goal, configured_layout, evaluate
from flagscale_like.rehearsal.costs import Costs
from flagscale_like.rehearsal.matching import match
from flagscale_like.rehearsal.record import RankRecord
from flagscale_like.rehearsal.replay import Timeline, replay

# What a host takes to launch one operator of eager torch with autograd and megatron-core around it: an assumption, which no
# GPU's host has been measured for.
LAUNCH_S = 10e-6


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A replayed step.

    Attributes:
        timeline: of the last step that was rehearsed.
        stages: rank -> its pipeline stage.
        planned_s: what the planner's formulas say of the same step.
        launches: operators that the host launches in a step, on the rank with the most.
    """

    timeline: Timeline
    stages: dict[int, int]
    tokens: int
    model_flops: float
    cluster: ClusterSpec
    world_size: int
    planned_s: float
    launches: int

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.timeline.seconds / self.world_size

    @property
    def mfu(self) -> float:
        return self.model_flops / self.timeline.seconds / self.world_size / self.cluster.device.bf16_flops


def time_step(
    records: Sequence[RankRecord],
    config: RunConfig,
    cluster: ClusterSpec,
    *,
    costs: Costs | None = None,
    keep_slices: bool = False,
) -> Timed:
    """Match the records, and replay their last step.

    Args:
        records: of at least one rank of each pipeline stage, of two steps each.
        costs: of the cluster with the planner's constants where they are left out.

    Raises:
        DataError: the records do not fit together; see match().
    """
    match(records).raise_problems()
    last = len(records[0].step_starts) - 1
    timeline = replay(match(records, step=last), costs or Costs.of(cluster), keep_slices=keep_slices)
    world, train = records[0].world_size, config.train
    goal = replace(Goal.of(config, cuda=cluster.device.is_gpu), imbalance=1.0)  # rehearsed routing is even
    layout = configured_layout(config, world, goal, cluster.device.hbm_bytes if cluster.device.is_gpu else None)
    tokens = train.global_batch_size * train.seq_length
    return Timed(
        timeline=timeline,
        stages={record.rank: record.stage for record in records},
        tokens=tokens,
        model_flops=goal.shape(layout.tp).model_flops(tokens, train.seq_length),
        cluster=cluster,
        world_size=world,
        planned_s=evaluate(goal, layout, cluster).time.seconds,
        launches=max(sum(event.kind == "compute" for event in record.step(last)) for record in records),
    )


def describe_timed(timed: Timed) -> str:
    """A line on the step, and a row for each rank: what its compute stream does, in shares of the step."""
    timeline = timed.timeline
    names = list(dict.fromkeys(part for own in timeline.parts.values() for part in own if own[part] > 0))
    rows: list[tuple[str, ...]] = [("stage", "rank", *names)]
    for rank, own in timeline.parts.items():
        shares = (f"{own.get(name, 0.0) / timeline.seconds:.1%}" for name in names)
        rows.append((str(timed.stages.get(rank, 0)), str(rank), *shares))
    return (
        f"all operations meet; replayed on {timed.cluster.describe()}: {timeline.seconds:.4g} s a step (the formulas plan "
        f"{timed.planned_s:.4g}), {timed.tokens_per_s_per_device:,.0f} tokens/s/device, MFU {timed.mfu:.1%}; of the step:\n"
        + table(rows, right=range(len(names) + 2))
        + host_line(timed)
    )


def host_line(timed: Timed) -> str:
    """A line where the host may be slower than the device; nothing where it is not."""
    each = timed.timeline.seconds / max(1, timed.launches)
    if each > LAUNCH_S or not timed.cluster.device.is_gpu:
        return ""
    return (
        f"\nthe host may be too slow for it: {timed.launches:,} operators a step leave it {each * 1e6:.1f} us for each, and "
        f"eager torch is taken to need {LAUNCH_S * 1e6:.0f}; the step would then take {timed.launches * LAUNCH_S:.4g} s. "
        "Larger micro-batches have fewer"
    )
