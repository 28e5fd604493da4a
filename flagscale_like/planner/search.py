"""The layouts of a model on a cluster, ranked by speed, and why each is slower than the first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flagscale_like.arch import ModelArch
from flagscale_like.cluster import GIB, ClusterSpec, with_devices
from flagscale_like.config import ContextParallelKind, RunConfig, parts_of_row
from flagscale_like.config.objectives import AnyObjective
from flagscale_like.errors import ConfigError
from flagscale_like.planner.efficiency import Efficiency
from flagscale_like.planner.layout import DTYPE_BYTES, IMBALANCE, RECOMPUTE, Layout, Shape
from flagscale_like.planner.memory import (
    RankMemory,
    alike_stage,
    microbatch_bytes,
    needed_offload,
    rank_memory,
    states_layout,
    trained_elements,
    waiting_share,
)
from flagscale_like.planner.saved import FUSED_ON_GPU, Operators, operators_of
from flagscale_like.planner.throughput import Held, Software, StepTime, step_time

# Context parallelism is for long rows: the search cuts none into parts of fewer tokens than this.
MIN_TOKENS_OF_A_PART = 4096
# Of the device's memory: the driver and other processes hold the rest.
USABLE = 0.97

PARTS = {
    "compute": "compute",
    "recompute": "recomputing activations",
    "first_pass": "the first pass of gradient caching",
    "tp": "tensor-parallel traffic",
    "cp": "context-parallel traffic",
    "ep": "expert-parallel traffic",
    "bubble": "pipeline bubble",
    "p2p": "traffic between stages",
    "dp": "data-parallel traffic",
    "optimizer": "the update",
    "offload": "copies to host memory",
}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is trained: all that no layout changes.

    Attributes:
        imbalance: that is expected of the experts' load; see Layout.
    """

    arch: ModelArch
    seq_length: int
    global_batch_size: int
    precision: str = "bf16"
    ops: Operators = FUSED_ON_GPU
    imbalance: float = IMBALANCE

    @classmethod
    def of(cls, config: RunConfig, *, cuda: bool) -> Goal:
        """What a configuration trains, with the operators that its kernels are.

        Args:
            cuda: the devices are GPUs.
        """
        return cls(
            arch=config.model,
            seq_length=config.train.seq_length,
            global_batch_size=config.train.global_batch_size,
            precision=config.train.precision,
            ops=replace(
                operators_of(config.kernels, cuda=cuda), lora=config.lora, outputs=outputs_of(config.objective)
            ),
        )

    def shape(self, tp: int) -> Shape:
        """The model's, its vocabulary padded for `tp`."""
        return Shape.of(self.arch, tp, self.ops.lora, self.ops.outputs)


def outputs_of(objective: AnyObjective) -> int | None:
    """Numbers a token that the head of an objective's model computes; see Operators."""
    if objective.head == "language_model":
        return None
    return getattr(objective, "heads", 1) if objective.head == "value" else 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout, the time of its step and the memory of each of its stages."""

    layout: Layout
    time: StepTime
    memory: tuple[RankMemory, ...]

    @property
    def peak_bytes(self) -> float:
        return max(memory.total for memory in self.memory)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The plans that fit, the fastest first, and those that exceed the memory by the least."""

    plans: tuple[Plan, ...]
    misfits: tuple[Plan, ...]
    budget_bytes: float

    def why(self, plan: Plan) -> str:
        """Why a plan is not the first, in a few words."""
        if plan.peak_bytes > self.budget_bytes:
            stage = max(range(plan.layout.pp), key=lambda i: plan.memory[i].total)
            largest = max(("states", "activations", "logits"), key=lambda name: getattr(plan.memory[stage], name))
            return (
                f"does not fit: stage {stage} needs {plan.peak_bytes / GIB:.1f} of {self.budget_bytes / GIB:.1f} GiB, "
                f"most of it {largest}"
            )
        best = self.plans[0]
        if plan is best:
            return "the fastest"
        slower = plan.time.seconds / best.time.seconds - 1
        part = max(PARTS, key=lambda name: getattr(plan.time, name) - getattr(best.time, name))
        extra = getattr(plan.time, part) - getattr(best.time, part)
        return f"{slower:.1%} slower: {PARTS[part]} +{extra:.2f} s"


def evaluate(
    goal: Goal, layout: Layout, cluster: ClusterSpec, eff: Efficiency | None = None, *, overhead: bool = True
) -> Plan:
    """Time and memory of one layout."""
    arch = goal.arch
    memory = tuple(
        rank_memory(
            arch,
            layout,
            stage,
            seq_length=goal.seq_length,
            precision=goal.precision,
            ops=goal.ops,
            overhead=overhead,
        )
        for stage in range(layout.pp)
    )
    moved: tuple[float, ...] = ()
    if layout.offload:
        moved = tuple(
            layout.offload_share(stage)
            * sum(microbatch_bytes(arch, layout, stage, goal.seq_length, goal.precision, goal.ops)[0])
            for stage in range(layout.pp)
        )
    cut = states_layout(layout)
    alike = {alike_stage(arch, cut, stage) for stage in range(layout.pp)}
    elements = [trained_elements(arch, cut, stage, goal.ops.lora, goal.ops.outputs) for stage in alike]
    time = step_time(
        goal.shape(layout.tp),
        layout,
        cluster,
        seq_length=goal.seq_length,
        held=Held(*max(elements, key=sum)),
        offloaded_bytes=moved,
        eff=eff,
        software=Software(
            logits_twice=goal.ops.linear_cross_entropy,
            fused_gradients=False,
            caches_gradients=goal.ops.outputs == 0,  # a model of vectors learns from all of the batch's at once
        ),
    )
    return Plan(layout=layout, time=time, memory=memory)


def configured_layout(config: RunConfig, world_size: int, goal: Goal, hbm_bytes: int | None) -> Layout:
    """The layout that a configuration gives on `world_size` ranks, its offload shares resolved.

    Args:
        hbm_bytes: device memory that `offload: {share: auto}` is to fit; None, of a CPU, keeps one micro-batch's activations.
    """
    layout = replace(Layout.of(config, world_size), imbalance=goal.imbalance)
    if config.offload is None:
        return layout
    share = config.offload.share
    if share != "auto":
        return replace(layout, offload=tuple(share) if isinstance(share, list) else (float(share),) * layout.pp)
    needed = None
    if hbm_bytes is not None:
        needed = needed_offload(
            goal.arch,
            layout,
            seq_length=goal.seq_length,
            precision=goal.precision,
            ops=goal.ops,
            budget_bytes=hbm_bytes * USABLE,
        )
    waiting = tuple(waiting_share(layout, stage) for stage in range(layout.pp))
    return replace(layout, offload=waiting if needed is None else needed)


def layouts(goal: Goal, cluster: ClusterSpec, *, max_vpp: int | None = None) -> Iterator[Layout]:
    """Every layout that divides the model, the batch and the cluster. tp stays inside a node."""
    for grid in _grids(goal, cluster):
        for micro in (1, 2, 4, 8):
            if goal.global_batch_size % (micro * grid.dp):
                continue
            count = goal.global_batch_size // (micro * grid.dp)
            for staged in _staged(
                replace(grid, micro_batch_size=micro, num_microbatches=count), goal.arch.num_layers, max_vpp
            ):
                yield from _variants(goal, staged)


def _grids(goal: Goal, cluster: ClusterSpec) -> Iterator[Layout]:
    """Every tp, pp, cp and dp that divide the model and the cluster, whatever the batch is."""
    arch, devices = goal.arch, cluster.devices
    # Beyond the KV groups ranks compute the same keys and values; the search leaves such layouts out.
    sizes = [arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size]
    sizes += [arch.experts.shared_ffn_hidden_size] if arch.experts else []
    most = min(cluster.devices_per_node, arch.num_attention_heads)
    tps = [tp for tp in range(1, most + 1) if not any(n % tp for n in sizes)]
    pps = [pp for pp in range(1, arch.num_layers + 1) if devices % pp == 0]
    for tp, pp, (cp, kind) in itertools.product(tps, pps, _context_parallel(goal, devices)):
        if devices % (tp * pp * cp) or (kind == "a2a" and arch.num_query_groups // tp % cp):
            continue
        dp = devices // (tp * pp * cp)
        yield Layout(tp=tp, pp=pp, dp=dp, cp=cp, cp_kind=kind, imbalance=goal.imbalance)


def _staged(layout: Layout, num_layers: int, max_vpp: int | None) -> Iterator[Layout]:
    """A layout with each number of chunks a stage that divides the layers, and with ends of other lengths."""
    pp, m = layout.pp, layout.num_microbatches
    for vpp in range(1, min(max_vpp or num_layers, num_layers // pp) + 1):
        if num_layers % (pp * vpp) == 0 and (vpp == 1 or (pp > 1 and m % pp == 0)):
            yield replace(layout, vpp=vpp)
    for first, last in uneven_ends(num_layers, pp):
        yield replace(layout, first_stage_layers=first, last_stage_layers=last)


def uneven_ends(num_layers: int, pp: int) -> list[tuple[int | None, int | None]]:
    """Layers of the first and the last stage, None where a stage has as many as those between them.

    The stages between the ends have the same number of layers: the mean, rounded up. The ends have the rest: a shorter last
    stage, which has the output layer as well; and both ends, the last one with at most a layer less than the first. Ends are
    never longer than the other stages. [] where no such ends are.
    """
    if pp == 1:
        return []
    found: list[tuple[int | None, int | None]] = []
    mean = -(-num_layers // pp)
    for middle in (
        mean,
        mean + 1,
    ):  # with as many layers a stage more, the ends have room for embedding and output layer
        if 0 < (last := num_layers - (pp - 1) * middle) < middle:
            found.append((None, last))
        rest = num_layers - (pp - 2) * middle
        first, last = rest - rest // 2, rest // 2
        if pp > 2 and 0 < last <= first < middle:
            found.append((first, last))
    return found


def _variants(goal: Goal, layout: Layout) -> Iterator[Layout]:
    """A layout with each ep, with and without sequence parallelism, and with each recompute choice."""
    experts, tp = goal.arch.experts, layout.tp
    ranks = layout.world_size // layout.pp
    eps = [ep for ep in range(1, experts.count + 1) if not (experts.count % ep or ranks % ep)] if experts else [1]
    for sp, recompute, ep in itertools.product((False, True), RECOMPUTE, eps):
        if sp and (tp == 1 or goal.seq_length % (tp * parts_of_row(layout.cp, layout.cp_kind))):
            continue
        if experts and tp > 1 and not sp:
            continue
        yield replace(layout, sp=sp, recompute=recompute, ep=ep)


def _context_parallel(goal: Goal, devices: int) -> list[tuple[int, ContextParallelKind]]:
    """The degrees and kinds of context parallelism that cut the rows into parts that are long enough."""
    cps = [n for n in range(2, goal.seq_length // MIN_TOKENS_OF_A_PART + 1) if devices % n == 0]
    # Gathered keys are computed with for causal attention alone.
    kinds: tuple[ContextParallelKind, ...] = ("gather", "a2a") if goal.arch.attention == "causal" else ("a2a",)
    found = [(cp, kind) for cp in cps for kind in kinds if goal.seq_length % parts_of_row(cp, kind) == 0]
    return [(1, "gather"), *found]


def rank_layouts(
    goal: Goal,
    cluster: ClusterSpec,
    *,
    offload: bool = False,
    max_vpp: int | None = None,
    eff: Efficiency | None = None,
    misfits: int = 3,
) -> Ranking:
    """All layouts, ranked by tokens a second.

    Args:
        offload: plan a layout that does not fit with as much activation offload as makes it fit.
        max_vpp: most model chunks a stage; 1 leaves the interleaved schedule out.
        misfits: how many plans that do not fit to return.

    Raises:
        ConfigError: no layout divides model, batch and cluster, or none fits. The message names one that would.
    """
    budget = cluster.device.hbm_bytes * USABLE
    fitting, others = [], []
    for layout in layouts(goal, cluster, max_vpp=max_vpp):
        plan = evaluate(goal, layout, cluster, eff)
        if plan.peak_bytes <= budget:
            fitting.append(plan)
            continue
        others.append(plan)
        if offload and layout.recompute != "full":
            shares = needed_offload(
                goal.arch,
                layout,
                seq_length=goal.seq_length,
                precision=goal.precision,
                ops=goal.ops,
                budget_bytes=budget,
            )
            if shares is not None:
                plan = evaluate(goal, replace(layout, offload=shares), cluster, eff)
                if plan.peak_bytes <= budget:
                    fitting.append(plan)
    if not fitting and not others:
        raise ConfigError(_no_layout(goal, cluster))
    if not fitting:
        raise ConfigError(_no_fit(goal, cluster, min(others, key=lambda plan: plan.peak_bytes), budget))
    # Of equally fast plans the leaner, then the simpler.
    fitting.sort(key=lambda p: (p.time.seconds, p.peak_bytes, p.layout.vpp))
    others.sort(key=lambda p: p.peak_bytes)
    return Ranking(plans=tuple(fitting), misfits=tuple(others[:misfits]), budget_bytes=budget)


def _no_layout(goal: Goal, cluster: ClusterSpec) -> str:
    """The message for a batch that no layout divides, with the nearest that one would."""
    batch, layers = goal.global_batch_size, goal.arch.num_layers
    # Each copy of the model takes as many rows as the others.
    copies = {grid.dp for grid in _grids(goal, cluster) if any(_staged(grid, layers, 1))}
    head = f"no layout divides {layers} layers and a global batch of {batch} over {cluster.devices} devices"
    near = min((max(1, round(batch / dp)) * dp for dp in sorted(copies)), key=lambda found: abs(found - batch))
    return f"{head}: train.global_batch_size {near} would do"


def _no_fit(goal: Goal, cluster: ClusterSpec, nearest: Plan, budget: float) -> str:
    """The message for a model that fits nowhere: the nearest layout, its memory, and a cluster that is large enough."""
    stage = max(range(nearest.layout.pp), key=lambda i: nearest.memory[i].total)
    memory = nearest.memory[stage]
    head = (
        f"no layout fits {cluster.describe()}: the nearest, {nearest.layout.describe()}, needs "
        f"{memory.total / GIB:.1f} of {budget / GIB:.1f} GiB on stage {stage} "
        f"(weights, gradients and optimizer {memory.states / GIB:.1f}, activations {memory.activations / GIB:.1f}, "
        f"logits {memory.logits / GIB:.1f})"
    )
    larger = cluster
    # The least that all devices together hold: weights, and of what is trained gradients, masters and moments.
    each = DTYPE_BYTES[goal.precision]
    least = goal.arch.parameter_count() * (each if goal.ops.lora else 16 if each == 4 else 18)
    for _ in range(8):
        larger = with_devices(larger, 2 * larger.devices) if larger.nodes > 1 else replace(larger, nodes=2)
        if least > budget * larger.devices:
            continue
        found = [
            plan
            for layout in layouts(goal, larger)
            if layout.micro_batch_size == 1 and (plan := evaluate(goal, layout, larger)).peak_bytes <= budget
        ]
        if found:
            best = min(found, key=lambda plan: plan.time.seconds)
            return f"{head}; {larger.describe()} would do, with {best.layout.describe()}"
    return f"{head}; no cluster of up to {larger.devices} such devices would do"
