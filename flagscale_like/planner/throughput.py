"""Time of a training step from FLOPs, bytes and links: a roofline with a few measured or fitted efficiencies.

The time of a micro-batch on a stage is the sum of its operators' times. The time of a step is that of m micro-batches on the
slowest stage, plus the pipeline's bubble, plus the data-parallel traffic, point-to-point traffic and offload copies that
compute does not hide (Narayanan et al. 2021, sections 2 and 3). docs/planner.md compares the result with published rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flagscale_like.arch import Layer, MixtureOfExperts, Parameter, Role, counted_keys
from flagscale_like.cluster import ClusterSpec, DeviceSpec, EfficiencyKind
from flagscale_like.planner.layout import Layout, Shape


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The share of each roofline that kernels and collectives reach.

    Attributes:
        gemm: of the dense peak, by a very large product.
        gemm_k: inner dimension at which a product reaches half of that (each tile has a prologue and an epilogue).
        gemm_mn: output elements at which a product reaches half of that (its tiles do not fill the device).
        attention: of the dense peak, by a fused causal attention that skips the upper triangle.
        memory: of the memory bandwidth, by elementwise operators.
        link, network: of a link's bandwidth, by large collectives inside a node and between nodes.
        overlap: share of a backward matrix product that communication can hide behind.
        latency_s: of one step of a collective's ring.
        layer_overhead_s: of a layer's kernel launches and host work, one pass.
    """

    gemm: float = 0.80
    gemm_k: float = 64.0
    gemm_mn: float = 1.6e6
    attention: float = 0.65
    memory: float = 0.85
    link: float = 0.5
    network: float = 0.85
    overlap: float = 0.9
    latency_s: float = 3e-6
    layer_overhead_s: float = 180e-6


# AMPERE is fitted to published rows by benchmarks/planner/fit.py. HOPPER differs in `gemm` and in the launch overhead, set by
# hand with the rows of GPT-3 175B on H100 (Megatron-LM's README) in view. docs/planner.md compares both with their rows.
AMPERE = Efficiency()
HOPPER = Efficiency(gemm=0.70, layer_overhead_s=90e-6)
# Where the peak is the measured rate of a large matrix product: a CPU, and a GPU that is not known.
UNKNOWN = replace(AMPERE, gemm=1.0)
MEASURED = Efficiency(gemm=1.0, gemm_k=32.0, gemm_mn=2e4, attention=0.4, link=1.0, network=1.0, overlap=0.0)


# fp32 products without tensor cores, of the bf16 peak: 19.5 of 312 TFLOP/s on an A100, 67 of 989 on an H100.
FP32_PRODUCTS = 1 / 16
# Rows of a grouped product's tile. Of each expert the last one is half empty on average.
TILE_ROWS = 128
# Keys of an attention kernel's tile. Where a window ends, and at the diagonal, half of a tile is masked on average; without a
# window the efficiency of attention holds for the diagonal.
KEYS_OF_A_TILE = 64
# fp32 numbers that the router and the dispatcher read and write for each token and expert, one pass: scores, choice, weights,
# maps and the auxiliary loss.
ROUTER_TRAFFIC = 20
# Operators of a router and its experts, forward and backward, relative to those of a dense layer. Counted in a layer with the
# auxiliary loss and ep 2: 70 beside 26, and 33 beside 25, that are no views.
EXPERT_LAUNCHES = (70 / 26, 33 / 25)

EFFICIENCIES: dict[EfficiencyKind, Efficiency] = {
    "ampere": AMPERE,
    "ada": AMPERE,  # no row is published that its own could be chosen by: those of the generation before it
    "hopper": HOPPER,
    "blackwell": HOPPER,  # likewise
    "cpu": MEASURED,
    "unknown": UNKNOWN,
}


PARTS_OF_STEP = ("compute", "recompute", "tp", "cp", "ep", "bubble", "p2p", "dp", "optimizer", "offload")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by part; the parts add up to `seconds`.

    Attributes:
        compute: matrix products, attention, elementwise operators, on the slowest stage.
        recompute: the part of the forward pass that is run again.
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


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward or backward pass: compute, and the tensor-, context- and expert-parallel traffic that it does not
    hide.
    """

    compute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.compute + other.compute, self.tp + other.tp, self.cp + other.cp, self.ep + other.ep)

    def __mul__(self, factor: float) -> Pass:
        return Pass(self.compute * factor, self.tp * factor, self.cp * factor, self.ep * factor)

    @property
    def seconds(self) -> float:
        return self.compute + self.tp + self.cp + self.ep


def gemm_seconds(  # many parameters: the sides of the product are three of them
    m: float,
    n: float,
    k: float,
    device: DeviceSpec,
    eff: Efficiency,
    *,
    dtype_bytes: int = 2,
    groups: float = 1,
    rate: float = 1.0,
) -> float:
    """One [m, k] x [k, n] product: compute or memory bound.

    Args:
        groups: as many of them at once, in one kernel.
        rate: of the peak that the data type has.
    """
    reached = rate * eff.gemm * k / (k + eff.gemm_k) * (groups * m * n) / (groups * m * n + eff.gemm_mn)
    traffic = groups * (m * k + k * n + m * n) * dtype_bytes
    return max(2.0 * groups * m * n * k / (device.bf16_flops * reached), _move(traffic, device, eff))


def _move(bytes_: float, device: DeviceSpec, eff: Efficiency) -> float:
    return bytes_ / (device.hbm_gb_per_s * 1e9 * eff.memory)


def ring_seconds(bytes_: float, ranks: int, cluster: ClusterSpec, eff: Efficiency, *, stride: int = 1) -> float:
    """One all-gather or reduce-scatter of `bytes_` (the whole tensor) over a ring; an all-reduce is two."""
    if ranks == 1 or not bytes_:
        return 0.0
    inside = ranks * stride <= cluster.devices_per_node
    rate = cluster.link_gb_per_s(ranks, stride) * 1e9 * (eff.link if inside else eff.network)
    return bytes_ * (ranks - 1) / ranks / rate + (ranks - 1) * eff.latency_s


def all_to_all_seconds(bytes_: float, ranks: int, cluster: ClusterSpec, eff: Efficiency) -> float:
    """One exchange in which each of `ranks` neighbours sends, and gets, `bytes_`, an equal part for each rank.

    What goes to other nodes takes the network, beside what stays inside the node.
    """
    if ranks == 1:
        return 0.0
    near = min(ranks, cluster.devices_per_node)
    inside = bytes_ * (near - 1) / ranks / (cluster.device.link_gb_per_s * 1e9 * eff.link)
    outside = bytes_ * (ranks - near) / ranks / (cluster.network_gb_per_s * 1e9 * eff.network)
    return max(inside, outside) + (ranks - 1) * eff.latency_s


def _layer_products(
    shape: Shape, layout: Layout, rows: float, rows_sp: float, layer: int
) -> list[tuple[float, float, float]]:
    """(m, n, k) of a layer's products, without those of a router and of experts."""
    t, h, d = layout.tp, shape.hidden, shape.head_dim
    if not shape.decoder:
        return [
            (rows, (shape.heads + 2 * shape.groups) * d / t, h),
            (rows, h, shape.heads * d / t),
            (rows, (2 if shape.gated else 1) * shape.ffn / t, h),
            (rows, h, shape.ffn / t),
        ]
    held = shape.decoder[layer].parameters(layer)
    matrices = [p for p in held if p.role.is_layer_matrix and not p.experts]
    # What is whole on every rank has a part of the tokens with sp.
    return [(rows_sp if p.cut is None else rows, *p.shard_shape(t)) for p in matrices]


def _core_attention(
    shape: Shape, layout: Layout, seq_length: int, device: DeviceSpec, eff: Efficiency
) -> tuple[float, float]:
    """Forward and backward seconds of a layer's attention without its projections."""
    b, d = layout.micro_batch_size, shape.head_dim
    heads = (
        shape.heads / layout.tp / layout.cp
    )  # over cp the tokens are cut in place of the heads, with equal parts of the work
    if shape.flash:  # causal: half of the products; backward recomputes the scores: five products for two
        window = shape.window + KEYS_OF_A_TILE if shape.window else None
        keys = counted_keys(seq_length, window) * (1 if shape.causal else 2)
        forward = 2.0 * b * heads * seq_length * keys * d / (device.bf16_flops * eff.attention)
        return forward, 2.5 * forward
    scores = b * heads * seq_length**2 * 2
    product = 2.0 * b * heads * seq_length**2 * d / (device.bf16_flops * eff.gemm * d / (d + eff.gemm_k))
    # Forward: softmax reads and writes the scores, dropout reads, writes and stores a mask, products read and write them.
    return 2 * product + _move(6.5 * scores, device, eff), 4 * product + _move(9 * scores, device, eff)


def layer_passes(
    shape: Shape, layout: Layout, seq_length: int, cluster: ClusterSpec, eff: Efficiency, layer: int = 0
) -> tuple[Pass, Pass, Pass]:
    """Forward pass, backward pass, and the part that recompute repeats, of one layer on one micro-batch.

    Args:
        layer: its number.
    """
    device, t = cluster.device, layout.tp
    rows = layout.rows(seq_length)
    rows_sp = rows / t if layout.sp else rows
    products = _layer_products(shape, layout, rows, rows_sp, layer)
    matmul = sum(gemm_seconds(m, n, k, device, eff) for m, n, k in products)
    grad_weight = 0.0 if shape.adapters else sum(gemm_seconds(n, k, m, device, eff) for m, n, k in products)
    grad_input = sum(gemm_seconds(m, k, n, device, eff) for m, n, k in products)
    core_forward, core_backward = _core_attention(shape, layout, seq_length, device, eff)
    block = shape.decoder[layer].feed_forward if shape.decoder else None
    ffn = block.experts.shared_ffn_hidden_size if isinstance(block, MixtureOfExperts) else shape.ffn
    # Elementwise traffic, 2 bytes an element. Rows of h: two norms (read, write) and two residual sums (two reads, a write;
    # with dropout a mask). Shards: rotation or bias of q, k, v; activation.
    per_row = (2 * 2 + 2 * (3.5 if shape.dropout else 3)) * rows_sp * shape.hidden
    per_shard = 2 * rows * (shape.heads + 2 * shape.groups) * shape.head_dim / t
    per_shard += (3 if shape.gated else 2) * rows * ffn / t
    elementwise = _move(2 * (per_row + per_shard), device, eff)
    forward = matmul + core_forward + elementwise + eff.layer_overhead_s
    backward = grad_weight + grad_input + core_backward + 1.6 * elementwise + eff.layer_overhead_s
    # An all-reduce a pass of each half of a layer that is cut, or an all-gather and a reduce-scatter with sequence
    # parallelism. The one of the input's gradient runs beside the weight's product; with sp so does the second gather of the
    # input.
    collectives = ring_seconds(rows * shape.hidden * 2, t, cluster, eff) * (2 if ffn else 1)
    hidden_behind = eff.overlap * grad_weight
    alone = collectives if layout.sp else 0.0
    exposed = alone + max(0.0, 2 * collectives - alone - hidden_behind)
    shared = 0.0  # ranks that share a KV group gather the rows of q, k and v, and scatter their gradients
    if shape.groups < t:
        shared = ring_seconds(rows * (shape.heads + 2 * shape.groups) * shape.head_dim * 2, t, cluster, eff)
    gather, scatter = _context_parallel(shape, layout, seq_length, cluster, eff, core_forward, core_backward)
    fwd, bwd = Pass(forward, 2 * collectives + shared, gather), Pass(backward, exposed + shared, scatter)
    for extra in (
        _expert_passes(shape, layout, rows_sp, cluster, eff, layer),
        _adapter_passes(shape, layout, rows, cluster, eff, layer),
    ):
        fwd, bwd = fwd + extra[0], bwd + extra[1]
    again = {"none": Pass(), "selective": Pass(core_forward, 0.0, gather), "full": fwd}[layout.recompute]
    return fwd, bwd, again


def _expert_passes(
    shape: Shape, layout: Layout, tokens: float, cluster: ClusterSpec, eff: Efficiency, layer: int
) -> tuple[Pass, Pass]:
    """Forward and backward of a layer's router and experts on the rank that the most tokens come to; nothing where it has
    none.

    Args:
        tokens: of this rank.
    """
    block = shape.decoder[layer].feed_forward if shape.decoder else None
    if not isinstance(block, MixtureOfExperts):
        return Pass(), Pass()
    device, x, h, f = cluster.device, block.experts, shape.hidden, block.experts.ffn_hidden_size
    sent = tokens * x.top_k
    came, local = sent * layout.fullest, x.count / layout.ep
    each = came / local + TILE_ROWS / 2
    sides = ((2 * f, h), (h, f))
    forward = sum(gemm_seconds(each, n, k, device, eff, groups=local) for n, k in sides)
    grads = sum(gemm_seconds(each, k, n, device, eff, groups=local) for n, k in sides)
    if not shape.adapters:
        grads += sum(gemm_seconds(n, k, each, device, eff, groups=local) for n, k in sides)
    # The router's product is of fp32, and so are its input's copy and the numbers of each token and expert.
    router = gemm_seconds(tokens, x.count, h, device, eff, dtype_bytes=4, rate=FP32_PRODUCTS)
    router += _move(tokens * (6 * h + ROUTER_TRAFFIC * 4 * x.count), device, eff)
    # Elements: spread over the experts (read, write), collected (read, write, read; the sums are written); with expert
    # parallelism put in the order of this rank's experts, and back.
    permuted = (5 * sent + tokens) * h + (4 * came * h if layout.ep > 1 and local > 1 else 0.0)
    if x.shared_ffn_hidden_size:
        permuted += 3 * tokens * h  # the sum with its output
    exchange = 2 * all_to_all_seconds(came * h * 2, layout.ep, cluster, eff)
    launches = [eff.layer_overhead_s * share for share in EXPERT_LAUNCHES]
    elementwise = [_move(2 * (permuted + count * came * f), device, eff) for count in (3, 5)]
    return (
        Pass(forward + router + elementwise[0] + launches[0], ep=exchange),
        Pass(grads + 2 * router + elementwise[1] + launches[1], ep=exchange),
    )


def _context_parallel(  # many parameters: the layer's, and what its attention hides
    shape: Shape,
    layout: Layout,
    seq_length: int,
    cluster: ClusterSpec,
    eff: Efficiency,
    core_forward: float,
    core_backward: float,
) -> tuple[float, float]:
    """Seconds of context-parallel traffic that a layer's forward and backward passes do not hide.

    gather: keys and values forward; again backward, unless the layer is recomputed, and their gradients. Half of the gather
    forward, and half of the gradients, are on their way while a rank computes its front chunk; see front_share(). a2a: q, k
    and v, and the output, in each direction; nothing is hidden.
    """
    if layout.cp == 1:
        return 0.0, 0.0
    column = layout.rows(seq_length) * shape.head_dim * 2 / layout.tp

    def seconds(bytes_: float) -> float:
        return ring_seconds(bytes_, layout.cp, cluster, eff, stride=layout.tp)

    if layout.cp_kind == "a2a":
        both_ways = seconds(column * (shape.heads + 2 * shape.groups)) + seconds(column * shape.heads)
        return both_ways, both_ways
    tensors = 3 if shape.decoder and shape.decoder[0].attention.position.kind == "nlpe" else 2
    whole = seconds(column * layout.cp * tensors * shape.groups)

    def exposed(core: float) -> float:
        return whole - min(whole / 2, eff.overlap * core * front_share(seq_length, layout.cp, shape.window))

    again = whole if layout.recompute == "none" else 0.0
    return exposed(core_forward), again + exposed(core_backward)


def front_share(seq_length: int, cp: int, window: int | None) -> float:
    """What the first of a row's 2 cp chunks is of the attention of the rank that holds it and the last chunk.

    1 / (4 cp) where each token sees all keys before it, and more with a window, which cuts the last chunk's keys alone.
    """
    chunk, seen = seq_length / (2 * cp), min(window or seq_length, seq_length)
    front = counted_keys(int(chunk), int(min(seen, chunk))) * chunk
    before = max(0.0, seq_length - chunk)  # tokens before the last chunk
    growing = max(0.0, seen - before)  # tokens of the last chunk that see all keys before them
    back = 2 * growing * (before + growing / 2) + 2 * (chunk - growing) * seen
    return front / (front + back)


def _adapter_passes(
    shape: Shape, layout: Layout, rows: float, cluster: ClusterSpec, eff: Efficiency, layer: int
) -> tuple[Pass, Pass]:
    """Forward and backward of a layer's LoRA adapters: two products each, and the gradients of both sides.

    A product with a side of `rank` moves more than it computes, so its time is that of its operands.
    """
    device, t = cluster.device, layout.tp
    forward = backward = traffic = 0.0
    for parameter in shape.adapters_of(layer):
        if parameter.role is Role.ADAPTER_MAGNITUDE:
            continue
        *stacked, n, k = parameter.shard_shape(t, layout.ep)
        tokens = rows / (t if layout.sp else 1) * shape.top_k * layout.fullest if stacked else rows
        flops = 2.0 * tokens * n * k / (device.bf16_flops * eff.gemm)
        weights = n * k * (stacked[0] if stacked else 1)
        product = max(flops, _move(2 * (tokens * k + weights + tokens * n), device, eff))
        forward, backward = forward + product, backward + 2 * product
        if parameter.role is Role.ADAPTER_B:
            forward += _move(2 * tokens * n, device, eff)  # the sum with the matrix's output reads that, too
            if not stacked:
                traffic += ring_seconds(rows * k * 2, t, cluster, eff)
    return Pass(forward, traffic), Pass(backward, traffic)


def head_pass(
    shape: Shape, layout: Layout, seq_length: int, cluster: ClusterSpec, eff: Efficiency, *, logits_twice: bool
) -> Pass:
    """Forward and backward of the output layer and the loss on one micro-batch."""
    device, rows = cluster.device, layout.rows(seq_length)
    v, h = shape.vocab / layout.tp, shape.hidden
    products = (
        gemm_seconds(rows, v, h, device, eff) * (2 if logits_twice else 1)
        + (0.0 if shape.adapters else gemm_seconds(v, h, rows, device, eff))
        + gemm_seconds(rows, h, v, device, eff)
    )
    # fp32 logits are written, exponentiated in place, summed, normalised; the gradient is scaled and rounded.
    loss = _move(rows * v * 22, device, eff)
    return Pass(products + loss, 2 * ring_seconds(rows * h * 2, layout.tp, cluster, eff))


@dataclass(frozen=True, kw_only=True)
class Software:
    """What the training software does that changes the time of a step.

    Attributes:
        overlap_dp: gradient reduction and parameter gather run beside the backward and forward passes.
        scatter_gather: stages exchange 1/tp of an activation a rank and gather it inside the node (Narayanan et al. 2021,
            section 4.1). megatron-core sends it whole, unless sequence parallelism has split it.
        logits_twice: the backward pass computes the logits again (Operators.linear_cross_entropy).
    """

    overlap_dp: bool = True
    scatter_gather: bool = False
    logits_twice: bool = False


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
    tokens = layout.dp * m * layout.micro_batch_size * seq_length
    # AdamW over its part of the states: reads gradient, master and two moments, writes three and the 16-bit weight.
    owned = held.dense / layout.replicas + held.experts / layout.expert_replicas
    return StepTime(
        compute=m * (busy.compute - repeated.compute),
        recompute=m * repeated.seconds,
        tp=m * (busy.tp - repeated.tp),
        cp=m * (busy.cp - repeated.cp),
        ep=m * (busy.ep - repeated.ep),
        bubble=(pp - 1) / vpp * sum(stage.seconds for stage in stages) / pp,
        p2p=_point_to_point(shape, layout, seq_length, cluster, eff, split=layout.sp or software.scatter_gather),
        dp=_data_parallel(held, layout, cluster, eff, hides),
        optimizer=_move(owned * 30 + (held.dense + held.experts) * 4, device, eff),
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

    Args:
        hides: seconds of compute that each of the two runs beside; () where they run alone.
    """
    traffic = [
        ring_seconds(held.dense * bytes_, layout.replicas, cluster, eff, stride=layout.tp)
        + ring_seconds(held.experts * bytes_, layout.expert_replicas, cluster, eff, stride=layout.ep)
        for bytes_ in (4, 2)
    ]
    if not hides:
        return sum(traffic)
    return sum(max(s * 0.1, s - eff.overlap * compute) for s, compute in zip(traffic, hides, strict=True))
