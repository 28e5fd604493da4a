"""Memory of the keys and values of texts that are generated."""

from __future__ import annotations

from flagscale_like.arch import ModelArch
from flagscale_like.planner.layout import Layout

GROWS_BY = 64  # places; model.kv_cache has as many


def cache_bytes(arch: ModelArch, layout: Layout, stage: int, *, rows: int, room: int, dtype_bytes: int) -> int:
    """Bytes of the keys and values of `rows` texts of `room` tokens on a rank of a stage."""
    layers = sum(len(chunk) for chunk in layout.chunk_layers(arch.num_layers, stage))
    kinds = 3 if arch.position.kind == "nlpe" else 2
    places = -(-room // GROWS_BY) * GROWS_BY
    return layers * kinds * rows * (arch.num_query_groups // layout.tp) * places * arch.head_dim * dtype_bytes
