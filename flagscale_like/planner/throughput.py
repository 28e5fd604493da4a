"""Time of a training step from the passes of its stages.

The time of a step is that of m micro-batches on the slowest stage, plus the bubble of the pipeline, and the data-parallel
traffic, point-to-point traffic and offload copies that compute does not hide (Narayanan et al. 2021, sections 2 and 3).
docs/planner.md compares the result with published rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flagscale_like.arch import Layer, Parameter
from flagscale_like.cluster import ClusterSpec
from flagscale_like.planner.efficiency import EFFICIENCIES, Efficiency, move_seconds, ring_seconds
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.passes import Pass, head_pass, layer_passes

PARTS_OF_STEP = ("compute", "recompute", "first_pass", "tp", "cp", "ep", "bubble", "p2p", "dp", "optimizer", "offload")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by part; the parts add up to `seconds`.

    Attributes:
        compute: matrix products, attention, elementwise operators, on the slowest stage.
        recompute: the part of the forward pass that is run again.
        first_pass: the forward passes that gradient caching makes before (engine.Engine).
        tp: tensor-parallel collectives that are not hidden.
        cp: context-parallel collectives that are not hidden.
        ep: tokens sent to their experts, and back; nothing is hidden.
        bubble: idle time of the pipeline.
        p2p: activations sent between stages, not hidden.
        dp: gradient reduction and parameter gather, not hidden.
        optimizer: the update.
        offload: copies that do not hide behind compute.
        model_flops: of the step, on all devices, without recompute.
    """

    compute: float
    recompute: float
    first_pass: float
    tp: float
    cp: float
    ep: float
    bubble: float
    p2p: float
    dp: float
    optimizer: float
    offload: float
    model_flops: float
    tokens: int
    devices: int
    peak_flops: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, part) for part in PARTS_OF_STEP)

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.seconds / self.devices

    @property
    def flops_per_s_per_device(self) -> float:
        return self.model_flops / self.seconds / self.devices

    @property
    def mfu(self) -> float:
        return self.flops_per_s_per_device / self.peak_flops


@dataclass(frozen=True, kw_only=True)
class Software:
    """What the training software does that changes the time of a step.

    Attributes:
        overlap_dp: gradient reduction and parameter gather run beside the backward and forward passes.
        scatter_gather: stages exchange 1/tp of an activation a rank and gather it inside the node (Narayanan et al. 2021,
            section 4.1). megatron-core sends it whole, unless sequence parallelism has split it.
        logits_twice: the backward pass computes the logits again (Operators.linear_cross_entropy).
        fused_gradients: products add their weight's gradient to what is there, as with apex; otherwise a kernel of its own
            does, for each micro-batch.
        caches_gradients: all micro-batches but the first pass forward before; with chunks, all of them.
    """

    overlap_dp: bool = True
    scatter_gather: bool = False
    logits_twice: bool = False
    fused_gradients: bool = True
    caches_gradients: bool = False


@dataclass(frozen=True)
class Held:
    """Trained parameters of one rank.

    Attributes:
        dense: of which there are Layout.replicas copies.
        experts: of which there are Layout.expert_replicas.
    """

    dense: float
    experts: float = 0.0

    @classmethod
    def of(cls, shape: Shape, layout: Layout) -> Held:
        """Those of the largest stage: its layers' and the output layer's share."""
        vocabulary = shape.hidden * shape.vocab / layout.tp
        if not shape.decoder:
            return cls(max(layout.stage_layers(shape.layers)) * shape.layer_matrix_parameters / layout.tp + vocabulary)
        of_kind = {kind: cls.of_layer(shape.decoder[kind], kind, layout) for kind in shape.kinds}
        stages = []
        for stage in range(layout.pp):
            layers = [of_kind[kind] for kind in stage_kinds(shape, layout, stage).elements()]
            stages.append(cls(sum(one.dense for one in layers) + vocabulary, sum(one.experts for one in layers)))
        return max(stages, key=lambda held: held.dense + held.experts)

    @classmethod
    def of_layer(cls, layer: Layer, number: int, layout: Layout) -> Held:
        """Those of one layer."""

        def share(parameter: Parameter) -> float:
            return parameter.numel / (1 if parameter.cut is None else layout.tp)

        held = layer.parameters(number)
        experts = sum(parameter.numel / layout.ep for parameter in held if parameter.experts)
        return cls(sum(share(parameter) for parameter in held if not parameter.experts), experts)


def stage_kinds(shape: Shape, layout: Layout, stage: int) -> Counter[int]:
    """How many layers of each kind a stage has; see Shape.alike."""
    return Counter(shape.alike[i] for chunk in layout.chunk_layers(shape.layers, stage) for i in chunk)


def step_time(
    shape: Shape,
    layout: Layout,
    cluster: ClusterSpec,
    *,
    seq_length: int,
    held: Held | None = None,
    offloaded_bytes: tuple[float, ...] = (),
    eff: Efficiency | None = None,
    software: Software = Software(),
) -> StepTime:
    """Time of one optimizer step.

    Args:
        held: parameters of the largest stage; Held.of() where they are left out.
        offloaded_bytes: that each stage copies out, and back, for a micro-batch.
        eff: the device's own where it is left out.
    """
    eff = eff or EFFICIENCIES[cluster.device.efficiency]
    device, m, pp, vpp = cluster.device, layout.num_microbatches, layout.pp, layout.vpp
    head = head_pass(shape, layout, seq_length, cluster, eff, logits_twice=software.logits_twice)
    forward, backward, again = _stage_passes(shape, layout, seq_length, cluster, eff)
    stages = [sum(passes, Pass()) for passes in zip(forward, backward, again, strict=True)]
    stages[-1] = stages[-1] + head
    slowest = max(range(pp), key=lambda stage: stages[stage].seconds)
    busy, repeated = stages[slowest], again[slowest]
    held = held or Held.of(shape, layout)
    # Where it overlaps, behind one micro-batch's passes: only the last one accumulates complete gradients.
    passes = (backward, forward) if software.overlap_dp else ()
    hides = [max(one.compute for one in stages_of) for stages_of in passes]
    offload = 0.0
    if offloaded_bytes:
        copies = [bytes_ / (device.host_gb_per_s * 1e9) for bytes_ in offloaded_bytes]
        offload = m * max(max(0.0, copy - stage.seconds) for copy, stage in zip(copies, stages, strict=True))
    before = m - (vpp == 1) if software.caches_gradients else 0
    first_pass = (before + (pp - 1) / vpp) * max(stage.seconds for stage in forward) if before else 0.0
    adding = 0.0 if software.fused_gradients else move_seconds(10 * (held.dense + held.experts), device, eff)
    tokens = layout.dp * m * layout.micro_batch_size * seq_length
    # AdamW over its part of the states: reads gradient, master and two moments, writes three and the 16-bit weight.
    owned = held.dense / layout.replicas + held.experts / layout.expert_replicas
    return StepTime(
        compute=m * (busy.compute - repeated.compute + adding),
        recompute=m * repeated.seconds,
        first_pass=first_pass,
        tp=m * (busy.tp - repeated.tp),
        cp=m * (busy.cp - repeated.cp),
        ep=m * (busy.ep - repeated.ep),
        bubble=(pp - 1) / vpp * sum(stage.seconds for stage in stages) / pp,
        p2p=_point_to_point(shape, layout, seq_length, cluster, eff, split=layout.sp or software.scatter_gather),
        dp=_data_parallel(held, layout, cluster, eff, hides),
        optimizer=move_seconds(owned * 30 + (held.dense + held.experts) * 4, device, eff),
        offload=offload,
        model_flops=shape.model_flops(tokens, seq_length),
        tokens=tokens,
        devices=layout.world_size,
        peak_flops=device.bf16_flops,
    )


def _stage_passes(
    shape: Shape, layout: Layout, seq_length: int, cluster: ClusterSpec, eff: Efficiency
) -> list[list[Pass]]:
    """Forward passes, backward passes, and what recompute repeats, of one micro-batch: of the layers of each stage."""
    of_kind = {kind: layer_passes(shape, layout, seq_length, cluster, eff, kind) for kind in shape.kinds}
    counts = [stage_kinds(shape, layout, stage) for stage in range(layout.pp)]
    return [
        [sum((of_kind[kind][which] * count for kind, count in stage.items()), Pass()) for stage in counts]
        for which in range(3)
    ]


def _point_to_point(
    shape: Shape, layout: Layout, seq_length: int, cluster: ClusterSpec, eff: Efficiency, *, split: bool
) -> float:
    """Seconds of a step for activations sent forward and gradients sent backward, a chunk each; one port a device.

    Args:
        split: a rank sends 1/tp of them.
    """
    pp, vpp, m = layout.pp, layout.vpp, layout.num_microbatches
    if pp == 1:
        return 0.0
    rows = layout.rows(seq_length) / (layout.tp if split else 1)
    inside = layout.tp * layout.replicas < cluster.devices_per_node
    rate = (cluster.device.link_gb_per_s * eff.link if inside else cluster.network_gb_per_s * eff.network) * 1e9
    one = rows * shape.hidden * 2 / rate + 4 * eff.latency_s
    # Plain 1F1B waits for both; the interleaved schedule sends beside the next chunk's compute.
    return (m + pp - 1) * 2 * one if vpp == 1 else m * vpp * 2 * one * (1 - eff.overlap)


def _data_parallel(held: Held, layout: Layout, cluster: ClusterSpec, eff: Efficiency, hides: Sequence[float]) -> float:
    """Seconds of a step for the fp32 gradients' reduction and the 16-bit parameters' gather that nothing hides.

    With several chunks a rank, one chunk's traffic runs beside pp micro-batches of the next chunk; nothing comes before the
    first chunk's gather, and nothing after the last one's reduction.

    Args:
        hides: seconds of a micro-batch's compute that each of the two runs beside; () where they run alone.
    """
    traffic = [
        ring_seconds(held.dense * bytes_, layout.replicas, cluster, eff, stride=layout.tp)
        + ring_seconds(held.experts * bytes_, layout.expert_replicas, cluster, eff, stride=layout.ep)
        for bytes_ in (4, 2)
    ]
    if not hides:
        return sum(traffic)
    if layout.vpp > 1:
        least, beside = 1 / layout.vpp, 1 + layout.pp * (1 - 1 / layout.vpp)
    else:
        least, beside = 0.1, 1.0
    return sum(max(s * least, s - eff.overlap * beside * compute) for s, compute in zip(traffic, hides, strict=True))
