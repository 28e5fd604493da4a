"""What a layer makes while it runs backward, at its fullest moment: beside what planner.saved says that it has kept.

The moments are those of a rehearsal's record; `python -m benchmarks.rehearsed_bytes` compares both (docs/rehearsal.md).
"""

from __future__ import annotations

from collections.abc import Callable

from flagscale_like.arch import Block, GatedFeedForward, MixtureOfExperts
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.saved import BLOCK_SAVES, MicroBatch, Operators, norm_saves


def working_bytes(
    shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, ops: Operators, layer: int = 0
) -> float:
    """Bytes of what a layer makes while it runs backward, at its fullest moment, less what it has freed of its saves by then.

    The moments are those of a rehearsal's record: the feed-forward part runs backward first, and attention when all that
    part's saves are freed. Beside each moment lie the gradient of the layer's output and, with sequence parallelism, the
    buffer that inputs are gathered in. Only at the first moments of a layer is everything saved.

    Args:
        layer: its number.
    """
    batch = MicroBatch.of(layout, seq_length, dtype_bytes)
    attention, feed_forward = shape.decoder[layer].attention, shape.decoder[layer].feed_forward
    moments = FEED_FORWARD_MOMENTS[type(feed_forward)](feed_forward, batch, shape)
    freed = norm_saves(batch.rows_sp, shape.hidden, dtype_bytes, ops)
    freed += sum(save.bytes for save in BLOCK_SAVES[type(feed_forward)](feed_forward, batch, ops))
    saves = BLOCK_SAVES[type(attention)](attention, batch, ops)
    core = sum(save.bytes for save in saves if save.in_core_attention)  # the gradients of these are as large
    again = core if layout.recompute == "selective" else 0.0
    exchanged = context_parallel_bytes(shape, layout, seq_length, dtype_bytes, layer)
    moments.append(core + again + exchanged - freed)
    gathered = batch.rows * shape.hidden * dtype_bytes if layout.sp else 0.0
    return max(moments) + gathered + batch.rows_sp * shape.hidden * dtype_bytes


def context_parallel_bytes(shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, layer: int = 0) -> float:
    """Bytes that context parallelism needs for the layer whose attention runs backward.

    gather: keys and values of the whole rows and their gradients, and one half of these on its way. a2a: an exchanged tensor
    on its way out and in.
    """
    if layout.cp == 1:
        return 0.0
    heads, groups = shape.heads / layout.tp, max(1, shape.groups / layout.tp)
    column = layout.rows(seq_length) * shape.head_dim * dtype_bytes
    if layout.cp_kind == "a2a":
        return 2 * column * (heads + 2 * groups)
    tensors = 3 if shape.decoder[layer].attention.position.kind == "nlpe" else 2
    return 2.5 * tensors * column * layout.cp * groups


def _gated_feed_forward_moments(block: GatedFeedForward, batch: MicroBatch, shape: Shape) -> list[float]:
    """Bytes that a feed-forward part adds as it runs backward, less what it has freed: as in working_bytes()."""
    ffn = block.ffn_hidden_size / batch.tp
    return _products(batch, batch.rows, ffn, shape, 1, whole=batch.rows_sp < batch.rows)


def _experts_moments(block: MixtureOfExperts, batch: MicroBatch, shape: Shape) -> list[float]:
    """Likewise, of routed experts and then of the shared one."""
    x, came = block.experts, batch.routed(block.experts.top_k)
    moments = _products(batch, came, x.ffn_hidden_size, shape, x.count / batch.ep, whole=True)
    moments.append(2 * came * shape.hidden * batch.dtype_bytes)  # the gradient as it was sent and as it came
    if x.shared_ffn_hidden_size:
        shared = x.shared_ffn_hidden_size / batch.tp
        moments += _products(batch, batch.rows, shared, shape, 1, whole=batch.rows_sp < batch.rows)
    return moments


def _products(  # many parameters: the sides of the two products
    batch: MicroBatch, rows: float, ffn: float, shape: Shape, matrices: float, *, whole: bool
) -> list[float]:
    """The moments of the down product, of the activation, and of the gate and up product.

    Args:
        rows: that the products have.
        matrices: pairs of them, whose gradients are made at once: experts.
        whole: the gradient of the output, which is gathered, or comes from the ranks that the tokens are of, is another
            tensor than the gradient of the layer's output.
    """
    hidden = shape.hidden
    down = matrices * ffn * hidden * (not shape.adapters)  # the gradient of its matrix
    return [
        bytes_ * batch.dtype_bytes
        for bytes_ in (
            rows * hidden * whole + rows * ffn + down,
            2 * rows * ffn,  # the gradients of gate and up, and of what they give, which is freed
            rows * hidden + 2 * down - rows * ffn,  # gate, up and what they give are freed
        )
    ]


# What each class of feed-forward block makes while it runs backward.
FEED_FORWARD_MOMENTS: dict[type[Block], Callable[..., list[float]]] = {
    GatedFeedForward: _gated_feed_forward_moments,
    MixtureOfExperts: _experts_moments,
}
