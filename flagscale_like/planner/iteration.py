"""An iteration of reinforcement learning on one layout: memory of each phase, and a time for each.

Weights, gradients, optimizer states, keys and values are exact (planner.memory, planner.generation). Drawing is bound by the
memory's bandwidth: a step of it reads the weights once for all texts under way, and their keys and values (Pope et al. 2022,
section 2.1). Scoring is forward passes; learning is a step of training, for each update. What a phase holds beside that, and
all times, are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from flagscale_like.arch import ModelArch, Role
from flagscale_like.cluster import GIB, ClusterSpec
from flagscale_like.config import RunConfig
from flagscale_like.planner.efficiency import EFFICIENCIES, gemm_seconds, move_seconds, ring_seconds
from flagscale_like.planner.generation import cache_bytes
from flagscale_like.planner.layout import DTYPE_BYTES, Layout, Shape
from flagscale_like.planner.memory import RankMemory, chunk_parameters, frozen_bytes, shard_numel, state_bytes
from flagscale_like.planner.passes import Pass, head_pass, layer_passes
from flagscale_like.planner.report import table
from flagscale_like.planner.search import Goal, evaluate
from flagscale_like.planner.throughput import stage_kinds

PHASES = ("draw", "score", "learn")


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A model that a rank holds beside the policy, on the same layout.

    Attributes:
        name: critic, reference or reward.
        heads: of a value head; 0 for a language model.
        trained: it has gradients and optimizer states.
        resident: its weights lie on the device, and not in host memory.
    """

    name: str
    arch: ModelArch
    heads: int = 0
    precision: str = "bf16"
    trained: bool = False
    resident: bool = True

    def states(self, layout: Layout, stage: int, rank: int = 0) -> tuple[int, int, int]:
        """Bytes of weights, gradients and optimizer states on a rank of a stage; exact."""
        if self.trained:
            return state_bytes(
                self.arch, layout, stage, precision=self.precision, rank=rank, outputs=self.heads or None
            )
        return frozen_bytes(self.arch, layout, stage, precision=self.precision, outputs=self.heads or None), 0, 0


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """Bytes of one rank in a phase, by component; `host` is pinned host memory, and not part of `total`."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    cache: float = 0.0
    activations: float = 0.0
    overhead: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What an iteration draws, at most: every rollout fills its room.

    Attributes:
        rollouts: of all ranks.
        prompt, new: tokens of each.
        rows: texts under way at a time on each copy.
        apart: ranks that only draw, beside those that learn.
    """

    rollouts: int
    samples: int
    prompt: int
    new: int
    rows: int
    apart: int = 0

    def each(self, layout: Layout) -> int:
        """Rollouts of each copy that draws."""
        copies = self.apart // (layout.world_size // layout.dp) if self.apart else layout.dp
        return math.ceil(self.rollouts / copies)

    @classmethod
    def of(cls, config: RunConfig, prompt: int) -> Drawn:
        """An iteration of a run whose prompts have so many tokens on average."""
        drawing = config.required_rl.rollout
        return cls(
            rollouts=config.train.global_batch_size,
            samples=drawing.samples,
            prompt=prompt,
            new=drawing.max_new_tokens,
            rows=drawing.rows,
            apart=drawing.apart,
        )


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """A plan of an iteration.

    Attributes:
        memory: by phase, of each stage.
        seconds: by phase; empty where no cluster is known.
        drawn: what the seconds are of.
    """

    memory: dict[str, tuple[PhaseMemory, ...]]
    seconds: dict[str, float]
    drawn: Drawn

    @property
    def whole(self) -> float:
        """Seconds of an iteration. Ranks that only draw do so beside the others."""
        draw, *others = (self.seconds[phase] for phase in PHASES)
        return max(draw, sum(others)) if self.drawn.apart else draw + sum(others)

    @property
    def peak_bytes(self) -> float:
        return max(one.total for stages in self.memory.values() for one in stages)


def beside_policy(config: RunConfig, rewards: Sequence[Beside], *, cuda: bool) -> list[Beside]:
    """The models of a run beside its policy, as rl.models builds them.

    Args:
        rewards: its reward models.
    """
    arch, precision, rl = config.model, config.train.precision, config.required_rl
    kl = rl.kl
    found = [Beside(name="critic", arch=arch, heads=1, precision=precision, trained=True)] * rl.has_critic
    if kl.coefficient and config.lora is None:
        resident = kl.memory == "device" or (kl.memory == "auto" and not cuda)
        found.append(Beside(name="reference", arch=arch, precision=precision, resident=resident))
    return [*found, *rewards]


def phase_memory(
    config: RunConfig,
    layout: Layout,
    memory: RankMemory,
    stage: int,
    beside: Sequence[Beside],
    *,
    cuda: bool,
    rank: int = 0,
) -> dict[str, PhaseMemory]:
    """Of one rank, by phase.

    Args:
        memory: of the policy's training on that stage.
    """
    drawing, arch = config.required_rl.rollout, config.model
    e = DTYPE_BYTES[config.train.precision]
    states = [one.states(layout, stage, rank) for one in beside]
    resident = sum(own[0] for one, own in zip(beside, states, strict=True) if one.resident)
    host = sum(own[0] for one, own in zip(beside, states, strict=True) if not one.resident)
    gradients = memory.gradients + sum(own[1] for own in states)
    optimizer = memory.optimizer + sum(own[2] for own in states)
    weights, overhead = memory.weights + resident, memory.overhead
    asleep = drawing.training_sleeps and cuda  # a CPU's optimizer states stay where they are
    size = {"rows": drawing.rows, "room": config.train.seq_length, "dtype_bytes": e}
    logits = drawing.rows * arch.padded_vocab_size(layout.tp) * 4 if stage == layout.pp - 1 else 0
    cache, common = cache_bytes(arch, layout, stage, **size), {"weights": weights, "overhead": overhead}
    copy = 0.0  # of the whole model, which draws with engine refit
    if drawing.engine == "refit":
        copy = arch.parameter_count(arch.padded_vocab_size()) * e
        logits, cache = drawing.rows * arch.padded_vocab_size() * 4, cache_bytes(arch, Layout(), 0, **size)
    drawn = PhaseMemory(
        weights=weights + copy,
        overhead=overhead,
        gradients=0.0 if drawing.training_sleeps else gradients,
        optimizer=0.0 if asleep else optimizer,
        cache=cache,
        activations=logits,
        host=host + (optimizer if asleep else 0.0),
    )
    if drawing.apart:  # ranks of their own, with the policy's weights alone
        drawn = PhaseMemory(weights=memory.weights + copy, cache=cache, activations=logits, overhead=overhead)
    return {
        "draw": drawn,
        "score": PhaseMemory(
            **common, gradients=gradients, optimizer=optimizer, activations=memory.logits + memory.working, host=host
        ),
        "learn": PhaseMemory(
            **common,
            gradients=gradients,
            optimizer=optimizer,
            activations=memory.dynamic,
            host=host + memory.host,
        ),
    }


def forward_seconds(shape: Shape, layout: Layout, cluster: ClusterSpec, *, seq_length: int) -> float:
    """Seconds of `layout.num_microbatches` forward passes: the slowest stage's, and the filling of the pipeline."""
    eff = EFFICIENCIES[cluster.device.efficiency]
    of_kind = {kind: layer_passes(shape, layout, seq_length, cluster, eff, kind)[0] for kind in shape.kinds}
    stages = [
        sum((of_kind[kind] * count for kind, count in stage_kinds(shape, layout, stage).items()), Pass()).seconds
        for stage in range(layout.pp)
    ]
    if shape.outputs is None:
        rows, traffic = (
            layout.rows(seq_length),
            head_pass(shape, layout, seq_length, cluster, eff, logits_twice=False).tp,
        )
        stages[-1] += gemm_seconds(rows, shape.vocab / layout.tp, shape.hidden, cluster.device, eff) + traffic / 2
    return (layout.num_microbatches + layout.pp - 1) * max(stages)


def drawing_step_seconds(arch: ModelArch, layout: Layout, cluster: ClusterSpec, drawn: Drawn, precision: str) -> float:
    """Seconds of one token of each text under way: of all stages in turn.

    Of a stage the larger of the time to read its weights, keys and values and that of its products, each layer's launches,
    and two all-reduces a layer. Of a layer's experts those are read that a token of the step goes to.
    """
    device, eff = cluster.device, EFFICIENCIES[cluster.device.efficiency]
    rows = min(drawn.rows, drawn.each(layout))
    room = drawn.prompt + drawn.new // 2  # of a text under way, on average
    size = DTYPE_BYTES[precision]
    read = 1.0 if arch.experts is None else 1.0 - (1.0 - arch.experts.top_k / arch.experts.count) ** rows
    whole = 0.0
    for stage in range(layout.pp):
        held = [p for chunk in range(layout.vpp) for p in chunk_parameters(arch, layout, stage, chunk)]
        if stage == 0 and not (arch.tie_embeddings and layout.pp == 1):
            held = [p for p in held if p.role is not Role.EMBEDDING]  # a row for each token
        elements = sum(shard_numel(p, layout) * (read if p.experts else 1.0) for p in held)
        texts = cache_bytes(arch, layout, stage, rows=rows, room=room, dtype_bytes=size)
        moved = move_seconds(elements * size + texts, device, eff)
        products = 2.0 * rows * elements / (device.bf16_flops * eff.gemm)
        layers = sum(len(chunk) for chunk in layout.chunk_layers(arch.num_layers, stage))
        traffic = 2 * layers * ring_seconds(rows * arch.hidden_size * size, layout.tp, cluster, eff)
        whole += max(moved, products) + layers * eff.layer_overhead_s + traffic
    return whole


def phase_seconds(
    config: RunConfig, goal: Goal, layout: Layout, cluster: ClusterSpec, beside: Sequence[Beside], drawn: Drawn
) -> dict[str, float]:
    """Seconds of each phase, one after the other."""
    options, arch, seq = config.required_rl, config.model, config.train.seq_length
    own, each = math.ceil(drawn.rollouts / layout.dp), drawn.each(layout)  # of a copy that learns, and that draws
    steps = max(drawn.new, math.ceil(each * drawn.new / min(drawn.rows, each)))

    def passes(tokens: float) -> Layout:
        return replace(layout, num_microbatches=max(1, math.ceil(tokens / (seq * layout.micro_batch_size))))

    def forward(over: Layout, model: Beside | None = None) -> float:
        shape = Shape.of(model.arch, layout.tp, outputs=model.heads or None) if model else goal.shape(layout.tp)
        return forward_seconds(shape, over, cluster, seq_length=seq)

    prompts = passes(each / drawn.samples * drawn.prompt)
    whole = passes(own * (drawn.prompt + drawn.new))
    updates = options.epochs * options.minibatches
    recomputed = options.old == "trainer" and (updates > 1 or options.staleness > 0)
    adapters_off = bool(options.kl.coefficient) and config.lora is not None  # a pass of the policy is the reference's
    scored = [forward(whole, model) for model in beside] + [forward(whole)] * (recomputed + adapters_off)
    learning = passes(own * (drawn.prompt + drawn.new) / options.minibatches)
    learners = [goal]
    if options.has_critic:
        learners.append(replace(goal, ops=replace(goal.ops, lora=None, outputs=1)))
    step = sum(evaluate(one, learning, cluster, overhead=False).time.seconds for one in learners)
    return {
        "draw": steps * drawing_step_seconds(arch, layout, cluster, drawn, goal.precision) + forward(prompts),
        "score": sum(scored),
        "learn": updates * step,
    }


def plan_iteration(
    config: RunConfig,
    layout: Layout,
    memory: Sequence[RankMemory],
    rewards: Sequence[Beside],
    *,
    prompt: int,
    cluster: ClusterSpec | None,
    cuda: bool,
) -> Iteration:
    """Plan the iterations of a run on a layout.

    Args:
        memory: of the policy's training, of each stage.
        rewards: the run's reward models.
        prompt: tokens of a prompt on average.
        cluster: None where no time is asked for.
    """
    beside = beside_policy(config, rewards, cuda=cuda)
    stages = [phase_memory(config, layout, own, stage, beside, cuda=cuda) for stage, own in enumerate(memory)]
    drawn, seconds = Drawn.of(config, prompt), {}
    if cluster is not None:
        seconds = phase_seconds(config, Goal.of(config, cuda=cuda), layout, cluster, beside, drawn)
    return Iteration(
        memory={phase: tuple(one[phase] for one in stages) for phase in PHASES}, seconds=seconds, drawn=drawn
    )


def describe_phases(found: Iteration) -> str:
    """A row for each phase, of the stage that needs most in it."""
    rows = {phase: max(stages, key=lambda one: one.total) for phase, stages in found.memory.items()}
    unit, name = (GIB, "GiB") if max(one.total for one in rows.values()) > GIB else (1 << 20, "MiB")
    names = [field.name for field in fields(PhaseMemory) if any(getattr(one, field.name) for one in rows.values())]
    order = [*(n for n in names if n != "host"), "total", *(["host"] if "host" in names else [])]
    titles = {"cache": "keys and values", "host": "(host)"}
    lines = [(f"phase ({name})", *(titles.get(n, n) for n in order))]
    lines += [(phase, *(f"{getattr(one, n) / unit:.2f}" for n in order)) for phase, one in rows.items()]
    return table(lines, right=range(1, len(order) + 1))


def describe_seconds(found: Iteration) -> str:
    """Seconds of an iteration, and the share of each phase."""
    drawn, whole = found.drawn, found.whole
    shares = ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in found.seconds.items())
    return (
        f"{whole:.3g} s an iteration where all of its {drawn.rollouts} rollouts have {drawn.prompt} + {drawn.new} tokens "
        f"({drawn.rollouts * drawn.new / whole:,.0f} drawn tokens/s): {shares}"
        + (", the first beside the others" if drawn.apart else "")
    )
