"""Memory of a rank while it generates: weights, and the keys and values of the texts under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagscale_like.arch import ModelArch
from flagscale_like.cluster import GIB
from flagscale_like.planner.layout import DTYPE_BYTES, Layout
from flagscale_like.planner.memory import RankMemory

GROWS_BY = 64  # places; model.kv_cache has as many


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes of one rank while it generates.

    Attributes:
        weights: as in training.
        cache: keys and values of as many texts as are under way at a time, of the longest length.
        training: gradients and optimizer states: on the device where they stay, in host memory where they wait there.
    """

    weights: float
    cache: float
    training: float


def cache_bytes(arch: ModelArch, layout: Layout, stage: int, *, rows: int, room: int, dtype_bytes: int) -> int:
    """Bytes of the keys and values of `rows` texts of `room` tokens on a rank of a stage."""
    layers = sum(len(chunk) for chunk in layout.chunk_layers(arch.num_layers, stage))
    kinds = 3 if arch.position.kind == "nlpe" else 2
    places = -(-room // GROWS_BY) * GROWS_BY
    return layers * kinds * rows * (arch.num_query_groups // layout.tp) * places * arch.head_dim * dtype_bytes


def generation_memory(
    arch: ModelArch, layout: Layout, memory: Sequence[RankMemory], *, precision: str, rows: int, room: int
) -> list[GenerationMemory]:
    """Of each stage of a plan."""
    size = {"rows": rows, "room": room, "dtype_bytes": DTYPE_BYTES[precision]}
    return [
        GenerationMemory(m.weights, cache_bytes(arch, layout, stage, **size), m.gradients + m.optimizer)
        for stage, m in enumerate(memory)
    ]


def describe_generation(found: Sequence[GenerationMemory], *, rows: int, room: int) -> str:
    """One line, of the stage that needs most."""
    most = max(found, key=lambda m: m.weights + m.cache)
    weights, cache, training = (value / GIB for value in (most.weights, most.cache, most.training))
    return (
        f"generating {rows} texts of {room} tokens at a time: weights {weights:.2f} + keys and values {cache:.2f} = "
        f"{weights + cache:.2f} GiB; gradients and optimizer take {training:.2f} GiB more unless they wait in host memory"
    )
