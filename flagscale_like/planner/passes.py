"""Time of a forward and of a backward pass of a layer, and of the head, on one micro-batch: the sum of their operators."""

from __future__ import annotations

from dataclasses import dataclass

from flagscale_like.arch import MixtureOfExperts, Role, counted_keys
from flagscale_like.cluster import ClusterSpec, DeviceSpec
from flagscale_like.planner.efficiency import (
    FP32_PRODUCTS,
    Efficiency,
    all_to_all_seconds,
    gemm_seconds,
    move_seconds,
    ring_seconds,
)
from flagscale_like.planner.layout import Layout, Shape

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
    found = []
    for matrix in held:
        if matrix.role.is_layer_matrix and not matrix.experts:
            outputs, inputs = matrix.shard_shape(t)
            # What is whole on every rank has a part of the tokens with sp.
            found.append((rows_sp if matrix.cut is None else rows, outputs, inputs))
    return found


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
    return 2 * product + move_seconds(6.5 * scores, device, eff), 4 * product + move_seconds(9 * scores, device, eff)


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
    elementwise = move_seconds(2 * (per_row + per_shard), device, eff)
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
    router += move_seconds(tokens * (6 * h + ROUTER_TRAFFIC * 4 * x.count), device, eff)
    # Elements: spread over the experts (read, write), collected (read, write, read; the sums are written); with expert
    # parallelism put in the order of this rank's experts, and back.
    permuted = (5 * sent + tokens) * h + (4 * came * h if layout.ep > 1 and local > 1 else 0.0)
    if x.shared_ffn_hidden_size:
        permuted += 3 * tokens * h  # the sum with its output
    exchange = 2 * all_to_all_seconds(came * h * 2, layout.ep, cluster, eff)
    launches = [eff.layer_overhead_s * share for share in EXPERT_LAUNCHES]
    elementwise = [move_seconds(2 * (permuted + count * came * f), device, eff) for count in (3, 5)]
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
        product = max(flops, move_seconds(2 * (tokens * k + weights + tokens * n), device, eff))
        forward, backward = forward + product, backward + 2 * product
        if parameter.role is Role.ADAPTER_B:
            forward += move_seconds(2 * tokens * n, device, eff)  # the sum with the matrix's output reads that, too
            if not stacked:
                traffic += ring_seconds(rows * k * 2, t, cluster, eff)
    return Pass(forward, traffic), Pass(backward, traffic)


def head_pass(
    shape: Shape, layout: Layout, seq_length: int, cluster: ClusterSpec, eff: Efficiency, *, logits_twice: bool
) -> Pass:
    """Forward and backward of the output layer and the loss on one micro-batch."""
    device, rows = cluster.device, layout.rows(seq_length)
    v, h = shape.vocab / layout.tp, shape.hidden
    if shape.outputs is not None:  # one read of the hidden states each way; with sp the ranks gather what comes out
        gathered = rows * (4 * shape.outputs or 2 * h) if layout.sp else 0.0
        read = move_seconds(2 * rows * h * 2 / (layout.tp if layout.sp else 1), device, eff) if shape.outputs else 0.0
        return Pass(read, ring_seconds(gathered, layout.tp, cluster, eff))
    products = (
        gemm_seconds(rows, v, h, device, eff) * (2 if logits_twice else 1)
        + (0.0 if shape.adapters else gemm_seconds(v, h, rows, device, eff))
        + gemm_seconds(rows, h, v, device, eff)
    )
    # fp32 logits are written, exponentiated in place, summed, normalised; the gradient is scaled and rounded.
    loss = move_seconds(rows * v * 22, device, eff)
    return Pass(products + loss, 2 * ring_seconds(rows * h * 2, layout.tp, cluster, eff))
