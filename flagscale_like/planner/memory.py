"""Bytes a rank needs, by component.

Weights, gradients and optimizer states are exact: they repeat how megatron-core lays parameters out in its buffers and how
its distributed optimizer (ZeRO-1, Rajbhandari et al. 2020) splits them over the ranks that hold the same weights: the data-
and context-parallel ones, and of experts those that expert parallelism leaves. Activations come from the table in saved.py
(Korthikanti et al. 2022). Short-lived tensors and the allocator's losses are estimates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

from flagscale_like.arch import OUTPUT_NAME, ModelArch, Parameter, Role, parameters
from flagscale_like.cluster import GIB
from flagscale_like.config import Lora
from flagscale_like.planner.layout import DTYPE_BYTES, IMBALANCE, Layout, Shape
from flagscale_like.planner.saved import (
    FUSED,
    Operators,
    embedding_saves,
    head_saves,
    layer_bytes,
    loss_bytes,
)
from flagscale_like.planner.working import working_bytes

# CUDA context, cuBLAS workspace and NCCL's buffers: a fixed amount.
CONTEXT_BYTES = int(1.5 * GIB)
# Memory that torch's allocator holds and cannot use, a share of all but states. Which tensors lie beside each other decides
# it, and no formula of shapes gives it: FRAGMENTATIONS is what rehearsals of published models found (docs/rehearsal.md).
FRAGMENTATION = 0.02
FRAGMENTATIONS = (0.003, 0.10)
# Layers whose offloaded activations have a copy on the device: forward the one that runs and the one before it, whose copies
# out may still run; backward the one that runs and the one after it, whose copies come in.
LAYERS_ON_THE_WAY = 2


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank, by component. They add up to `total`, the planned peak.

    Attributes:
        weights: the parameter buffers, padding counted.
        gradients: the fp32 gradient buffers, padding counted.
        optimizer: this rank's fp32 master weights (none in fp32 training), Adam's two moments and its step counters.
        activations: saved for the backward pass by all micro-batches in flight, less what is offloaded.
        logits: what the output layer and the loss save, and the logits, or a chunk of them, that they hold while they run,
            with the gradients that a fused loss makes, where the peak is in it.
        working: of the layer that runs: activation gradients, one weight gradient, gathered inputs, a recomputed layer, with
            context parallelism the whole rows' keys and values and their gradients; 0 where the peak is in the loss.
        offload_buffers: device copies on their way out and back.
        overhead: CUDA context, communication buffers, fragmentation.
        host: pinned host memory; not part of `total`.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float = 0.0
    logits: float = 0.0
    working: float = 0.0
    offload_buffers: float = 0.0
    overhead: float = 0.0
    host: float = 0.0

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def dynamic(self) -> float:
        """What a step makes: all but states and overhead."""
        return self.activations + self.logits + self.working + self.offload_buffers

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


@functools.lru_cache(maxsize=256)
def _by_layer(arch: ModelArch) -> dict[int | None, tuple[Parameter, ...]]:
    """The table of parameters by layer; None holds those outside the layers."""
    found: dict[int | None, list[Parameter]] = {}
    for parameter in parameters(arch):
        found.setdefault(parameter.layer, []).append(parameter)
    return {layer: tuple(held) for layer, held in found.items()}


def chunk_parameters(
    arch: ModelArch, layout: Layout, stage: int, chunk: int, outputs: int | None = None
) -> list[Parameter]:
    """The parameters of a model chunk, in the built model's order.

    A tied embedding on one stage is one parameter; over several stages the last holds a copy, listed last.

    Args:
        outputs: see Operators.
    """
    held = _by_layer(arch)
    embedding, *rest = held[None]
    found = [embedding] if stage == 0 and chunk == 0 else []
    for layer in layout.chunk_layers(arch.num_layers, stage)[chunk]:
        found += held[layer]
    if stage == layout.pp - 1 and chunk == layout.vpp - 1:
        if outputs is not None:
            head = Parameter(OUTPUT_NAME, (outputs, arch.hidden_size), Role.VALUE, None)
            return [*found, *(p for p in rest if p.name != OUTPUT_NAME), *([head] if outputs else [])]
        found += rest
        if arch.tie_embeddings and layout.pp > 1:
            found.append(embedding)
    return found


def chunk_adapters(arch: ModelArch, lora: Lora, layout: Layout, stage: int, chunk: int) -> list[Parameter]:
    """The adapters of a model chunk, in the built model's order."""
    layers = set(layout.chunk_layers(arch.num_layers, stage)[chunk])
    return [parameter for parameter in lora.parameters(arch) if parameter.layer in layers]


def shard_numel(parameter: Parameter, layout: Layout) -> int:
    """Elements on one rank."""
    return math.prod(parameter.shard_shape(layout.tp, layout.ep))


@dataclass(frozen=True)
class Buffer:
    """Where megatron-core puts a chunk's parameters: (start, end) of each, bucket bounds, and the padded length.

    Attributes:
        replicas: ranks that hold the same parameters, and update a part of each bucket.
        experts: whether it holds the experts that are reduced by themselves.
    """

    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]
    replicas: int
    experts: bool = False

    @property
    def numel(self) -> int:
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self, rank: int) -> tuple[int, int]:
        """Elements and parameters of which one of the replicas updates a part: its share of every bucket."""
        elements = parameters = 0
        for begin, end in self.buckets:
            size = (end - begin) // self.replicas
            low, high = begin + rank * size, begin + (rank + 1) * size
            for start, stop in self.spans:
                inside = min(stop, high) - max(start, low)
                if inside > 0:
                    elements += inside
                    parameters += 1
        return elements, parameters


def buffer_of(
    numels: Sequence[int], replicas: int, *, bucket_numel: int | None, alone: Collection[int] = frozenset()
) -> Buffer:
    """megatron-core 0.16's _ParamAndGradBuffer under the distributed optimizer.

    Parameters lie in reverse order, each at a multiple of 64 elements; a bucket ends at a multiple of lcm(replicas, 128).

    Args:
        numels: elements of each parameter on one rank.
        bucket_numel: a bucket closes at this many elements; None is one bucket.
        alone: indices of parameters that have a bucket to themselves.
    """
    multiple = math.lcm(replicas, 128)
    spans, buckets, position, bucket_start, filled = [], [], 0, 0, False

    def close(end: int) -> int:
        nonlocal bucket_start, filled
        padded = -(-end // multiple) * multiple
        buckets.append((bucket_start, padded))
        bucket_start, filled = padded, False
        return padded

    end = 0
    for index in reversed(range(len(numels))):
        position = -(-position // 64) * 64
        if index in alone and filled:
            position = close(position)
        end, filled = position + numels[index], True
        spans.append((position, end))
        full = bucket_numel is not None and end - bucket_start >= bucket_numel
        position = close(end) if full or index in alone else end
    if filled:
        close(end)
    return Buffer(tuple(spans), tuple(buckets), replicas)


def stage_buffers(
    arch: ModelArch, layout: Layout, stage: int, lora: Lora | None = None, outputs: int | None = None
) -> list[Buffer]:
    """The buffers of a stage's chunks, as wrap_chunks() makes them: buckets on the first stage's first chunk only.

    With LoRA the adapters alone are in buffers, and a value head. Experts have a buffer of their own, unless their copies lie
    where the dense parameters' do (see model.experts.mark_expert).
    """
    buffers = []
    for chunk in range(layout.vpp):
        held = chunk_parameters(arch, layout, stage, chunk, outputs)
        if lora is not None:
            own_head = [p for p in held if p.role is Role.VALUE]
            held = chunk_adapters(arch, lora, layout, stage, chunk) + own_head
        held = [parameter for parameter in held if parameter.role is not Role.ROUTER_BIAS]
        apart = [bool(parameter.experts) and layout.cuts_experts for parameter in held]
        shared = (
            arch.tie_embeddings and layout.pp > 1 and outputs is None
        )  # a tied embedding on two stages has a bucket to itself
        bucketed = layout.replicas > 1 and stage == 0 and chunk == 0
        for experts in sorted(set(apart)):
            own = [parameter for parameter, is_apart in zip(held, apart, strict=True) if is_apart == experts]
            buffer = buffer_of(
                [shard_numel(parameter, layout) for parameter in own],
                layout.expert_replicas if experts else layout.replicas,
                bucket_numel=max(40_000_000, 1_000_000 * layout.dp) if bucketed else None,
                alone={i for i, parameter in enumerate(own) if shared and parameter.role.is_vocabulary},
            )
            buffers.append(replace(buffer, experts=experts))
    return buffers


def states_layout(layout: Layout) -> Layout:
    """A layout without what states do not depend on, so that they are computed once for many layouts."""
    fixed = {"sp": False, "micro_batch_size": 1, "num_microbatches": 1, "recompute": "none", "offload": ()}
    return replace(layout, imbalance=IMBALANCE, **fixed)


@functools.lru_cache(maxsize=4096)
def alike_stage(arch: ModelArch, layout: Layout, stage: int) -> int:
    """The first stage whose parameters are like those of `stage`, so that they are counted once for all such stages."""
    if stage in (0, layout.pp - 1):
        return stage
    shape = Shape.of(arch)

    def kinds(other: int) -> list[list[int]]:
        return [[shape.alike[i] for i in chunk] for chunk in layout.chunk_layers(arch.num_layers, other)]

    own = kinds(stage)
    return next(other for other in range(1, stage + 1) if kinds(other) == own)


def state_bytes(
    arch: ModelArch,
    layout: Layout,
    stage: int,
    *,
    precision: str,
    rank: int = 0,
    lora: Lora | None = None,
    outputs: int | None = None,
) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of one rank; exact. With LoRA the base has weights alone.

    Args:
        rank: of the stage's ranks, which are numbered tp fastest, then cp and dp.
        outputs: see Operators.
    """
    stage = stage if lora is not None else alike_stage(arch, layout, stage)
    return _state_bytes(arch, layout, stage, precision, rank, lora, outputs)


def frozen_bytes(arch: ModelArch, layout: Layout, stage: int, *, precision: str, outputs: int | None = None) -> int:
    """Bytes of the weights of a model that is not trained, on one rank; exact. They lie in no buffers.

    Args:
        outputs: see Operators.
    """
    held = [p for chunk in range(layout.vpp) for p in chunk_parameters(arch, layout, stage, chunk, outputs)]
    size = DTYPE_BYTES[precision]
    return sum(shard_numel(p, layout) * (4 if p.role is Role.ROUTER_BIAS else size) for p in held)


@functools.lru_cache(maxsize=4096)
def _state_bytes(
    arch: ModelArch, layout: Layout, stage: int, precision: str, rank: int, lora: Lora | None, outputs: int | None
) -> tuple[int, int, int]:
    gradients = optimizer = weights = 0
    for chunk in range(layout.vpp):
        held = chunk_parameters(arch, layout, stage, chunk, outputs)
        weights += _frozen_bytes(held, layout, precision, lora)
    for buffer in stage_buffers(arch, layout, stage, lora, outputs):
        weights += buffer.numel * DTYPE_BYTES[precision]
        gradients += buffer.numel * 4
        # Experts lie over neighbours: the ranks of a copy of them are ep ranks that follow one another.
        elements, parameters = buffer.owned(rank // (layout.ep if buffer.experts else layout.tp))
        optimizer += elements * (8 if precision == "fp32" else 12) + parameters * 4
    return weights, gradients, optimizer


@functools.lru_cache(maxsize=4096)
def trained_elements(
    arch: ModelArch, layout: Layout, stage: int, lora: Lora | None = None, outputs: int | None = None
) -> tuple[int, int]:
    """Elements of one rank's gradient buffers: of dense parameters, and of experts that are reduced by themselves."""
    buffers = stage_buffers(arch, layout, stage, lora, outputs)
    dense, experts = (sum(buffer.numel for buffer in buffers if buffer.experts == own) for own in (False, True))
    return dense, experts


def _frozen_bytes(held: Sequence[Parameter], layout: Layout, precision: str, lora: Lora | None) -> int:
    """Bytes of a chunk's weights that no gradient changes: the routers' biases, in fp32, and with LoRA all of the base."""
    biases = [parameter for parameter in held if parameter.role is Role.ROUTER_BIAS]
    base = [p for p in held if p.role not in (Role.ROUTER_BIAS, Role.VALUE)] if lora is not None else []
    base_bytes = sum(shard_numel(parameter, layout) for parameter in base) * DTYPE_BYTES[precision]
    return base_bytes + 4 * sum(parameter.numel for parameter in biases)


def layers_on(shape: Shape, layout: Layout, stage: int) -> set[int]:
    """The kinds of the layers of a stage; see Shape.alike."""
    return {shape.alike[i] for chunk in layout.chunk_layers(shape.layers, stage) for i in chunk}


def largest_layer(shape: Shape, layout: Layout, stage: int, seq_length: int, dtype_bytes: int, ops: Operators) -> float:
    """Bytes that the layer of a stage that saves the most saves."""
    kinds = layers_on(shape, layout, stage)
    return max((layer_bytes(shape, layout, seq_length, dtype_bytes, ops, kind) for kind in kinds), default=0.0)


def microbatch_bytes(
    arch: ModelArch | Shape, layout: Layout, stage: int, seq_length: int, precision: str, ops: Operators
) -> tuple[list[float], float]:
    """Bytes that one micro-batch saves on a stage: the layers of each chunk, and the loss (0 where it is not the last)."""
    shape = arch if isinstance(arch, Shape) else Shape.of(arch, layout.tp, ops.lora)
    e = DTYPE_BYTES[precision]
    saved = {kind: layer_bytes(shape, layout, seq_length, e, ops, kind) for kind in layers_on(shape, layout, stage)}
    chunks = layout.chunk_layers(shape.layers, stage)
    each = [sum(saved[shape.alike[i]] for i in layers) for layers in chunks]
    head = sum(s.bytes for s in head_saves(shape, layout, seq_length, e, ops)) if stage == layout.pp - 1 else 0.0
    return each, head


def saved_activation_bytes(
    arch: ModelArch, layout: Layout, stage: int, *, seq_length: int, precision: str, ops: Operators
) -> float:
    """Most bytes that autograd holds at once on a stage, embedding and loss included, nothing offloaded.

    With recompute, the layer that is being recomputed holds all that it saves without.
    """
    shape, e = Shape.of(arch, layout.tp, ops.lora), DTYPE_BYTES[precision]
    chunks, head = microbatch_bytes(arch, layout, stage, seq_length, precision, ops)
    in_flight = layout.chunks_in_flight(stage)
    bytes_ = layout.most_in_flight(stage, chunks)
    if stage == 0:
        # Micro-batches whose first chunk is in flight.
        first = in_flight if layout.vpp == 1 else min(in_flight, layout.num_microbatches, 2 * layout.pp)
        bytes_ += first * sum(s.bytes for s in embedding_saves(layout, seq_length))
    again = 0.0
    if layout.recompute != "none":
        again = largest_layer(shape, replace(layout, recompute="none"), stage, seq_length, e, ops)
        if layout.recompute == "selective" or ops.rms_norm == "fused":
            # What is kept is not saved twice; under full recompute that is the layer's input, where its norm saves it.
            again -= largest_layer(shape, layout, stage, seq_length, e, ops)
    return bytes_ + max(head, again)


def rank_memory(
    arch: ModelArch,
    layout: Layout,
    stage: int,
    *,
    seq_length: int,
    precision: str,
    ops: Operators = FUSED,
    rank: int = 0,
    overhead: bool = True,
) -> RankMemory:
    """All components of one rank.

    Args:
        rank: see state_bytes().
        overhead: count context, communication buffers and fragmentation: a CUDA device's, not a CPU process's.
    """
    shape, e = Shape.of(arch, layout.tp, ops.lora), DTYPE_BYTES[precision]
    cut = states_layout(layout)
    weights, gradients, optimizer = state_bytes(
        arch, cut, stage, precision=precision, rank=rank, lora=ops.lora, outputs=ops.outputs
    )
    chunks, head = microbatch_bytes(arch, layout, stage, seq_length, precision, ops)
    rows_sp = layout.rows(seq_length) / (layout.tp if layout.sp else 1)
    in_flight = layout.chunks_in_flight(stage)
    layers = layout.most_in_flight(stage, chunks)
    saved = layers
    # A received stage input lives until its backward pass; a norm that saves its input has it counted already.
    if layout.pp > 1 and ops.rms_norm == "torch" and layout.recompute != "full":
        saved += in_flight * rows_sp * shape.hidden * e
    share = layout.offload_share(stage)
    moved = share * layers
    layer = largest_layer(shape, layout, stage, seq_length, e, ops)
    on_the_way = min(moved, LAYERS_ON_THE_WAY * min(share, 1.0) * layer)
    kinds = layers_on(shape, layout, stage)
    working = max((working_bytes(shape, layout, seq_length, e, ops, kind) for kind in kinds), default=0.0)
    if layout.recompute == "full":
        working += largest_layer(shape, replace(layout, recompute="none"), stage, seq_length, e, ops)
        working -= layer if ops.rms_norm == "fused" else 0.0  # its input is saved already
    if stage == 0 and not shape.adapters:  # the embedding runs backward when its chunk has freed all of a micro-batch
        working = max(working, shape.hidden * shape.vocab / layout.tp * e - chunks[0])
    logits = head
    if head:
        loss = loss_bytes(shape, layout, seq_length, e, ops)
        if not ops.linear_cross_entropy or ops.outputs is not None:
            logits += loss
        elif loss > working:  # the peak is in the loss, and not in a layer
            logits, working = head + loss, 0.0
    dynamic = saved - moved + on_the_way + logits + working
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=saved - moved,
        logits=logits,
        working=working,
        offload_buffers=on_the_way,
        overhead=CONTEXT_BYTES + FRAGMENTATION * dynamic if overhead else 0.0,
        host=moved,
    )


def needed_offload(
    arch: ModelArch, layout: Layout, *, seq_length: int, precision: str, ops: Operators, budget_bytes: float
) -> tuple[float, ...] | None:
    """The least share of its activations that each stage has to move to fit `budget_bytes`; None where all is too little.

    Overheads count as in rank_memory(). Moving everything frees all but the copies of LAYERS_ON_THE_WAY layers.
    """
    shares = []
    for stage in range(layout.pp):
        memory = rank_memory(arch, layout, stage, seq_length=seq_length, precision=precision, ops=ops)
        over = memory.total - budget_bytes
        if over <= 0:
            shares.append(0.0)
            continue
        chunks, _ = microbatch_bytes(arch, layout, stage, seq_length, precision, ops)
        shape, e = Shape.of(arch, layout.tp, ops.lora), DTYPE_BYTES[precision]
        layer = largest_layer(shape, layout, stage, seq_length, e, ops)
        frees = (layout.most_in_flight(stage, chunks) - LAYERS_ON_THE_WAY * layer) * (1 + FRAGMENTATION)
        if frees <= 0 or over > frees:
            return None
        shares.append(over / frees)
    return tuple(shares)


def waiting_share(layout: Layout, stage: int) -> float:
    """The share of a stage's activations that belongs to all micro-batches in flight but one. 0 on the last stage."""
    return 1.0 - 1.0 / max(1.0, layout.chunks_in_flight(stage) / layout.vpp)
