"""Which ranks stand for the others: one of each kind."""

from __future__ import annotations

from flagscale_like.config import RunConfig
from flagscale_like.errors import ConfigError
from flagscale_like.planner.layout import Layout, Shape


def chosen_ranks(config: RunConfig, world_size: int, asked: str = "auto") -> list[int]:
    """The ranks to rehearse.

    Args:
        asked: `auto` takes the first rank of one stage of each kind; `stages` that of each stage; `all` every rank; or
            numbers with commas.

    Raises:
        ConfigError: a rank is not of the world, or the text is none of these; see RunConfig.data_parallel_size as well.
    """
    config.data_parallel_size(world_size)
    if asked == "all":
        return list(range(world_size))
    if asked == "stages":
        return [stage * world_size // config.parallel.pp for stage in range(config.parallel.pp)]
    if asked == "auto":
        return [stage * world_size // config.parallel.pp for stage in unlike_stages(config, world_size)]
    parts = [part.strip() for part in asked.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--ranks {asked!r}: write auto, stages, all, or ranks with commas, for example 0,3,511")
    ranks = sorted({int(part) for part in parts})
    if ranks[-1] >= world_size:
        raise ConfigError(f"--ranks: there is no rank {ranks[-1]} among {world_size}: the last one is {world_size - 1}")
    return ranks


def unlike_stages(config: RunConfig, world_size: int) -> list[int]:
    """The first stage, the last, and of the others the first of each kind: with as many layers that are alike.

    An earlier stage holds more micro-batches than a later one of its kind.
    """
    layout, pp = Layout.of(config, world_size), config.parallel.pp
    alike = Shape.of(config.model).alike
    seen: dict[tuple, int] = {}
    for stage in range(pp):
        chunks = layout.chunk_layers(config.model.num_layers, stage)
        kinds = tuple(tuple(alike[layer] for layer in chunk) for chunk in chunks)
        seen.setdefault((kinds, stage == 0, stage == pp - 1), stage)
    return sorted(seen.values())
