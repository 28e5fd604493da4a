"""The check of weights that are handed to another engine: each tensor once, none that is not known, each of its shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from flagscale_like.errors import CheckpointError
from flagscale_like.generation.hf_weights import WeightSpec


def checked_weights(weights: Iterable[tuple[str, Tensor]], specs: Sequence[WeightSpec]) -> Iterator[tuple[str, Tensor]]:
    """The weights as they come, in the order of `specs`, each of the dtype that they say.

    Raises:
        CheckpointError: one is unknown, comes twice, has another shape or another place in the order, or some are missing.
            It is raised when the weight is reached: what came before it has been handed on.
    """
    known = {spec.name: spec for spec in specs}
    taken: set[str] = set()
    for number, (name, tensor) in enumerate(weights):
        spec = known.get(name)
        if spec is None:
            raise CheckpointError(
                f"weights: {name} is not known: the model has {len(specs)} tensors, such as {specs[0].name}"
            )
        if name in taken:
            raise CheckpointError(f"weights: {name} comes twice")
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"weights: {name} has the shape {tuple(tensor.shape)}, the model's is {spec.shape}")
        if name != specs[number].name:
            raise CheckpointError(
                f"weights: {name} comes where {specs[number].name} is announced: keep the family's order"
            )
        taken.add(name)
        yield name, tensor.to(spec.dtype).contiguous()
    if missing := [spec.name for spec in specs if spec.name not in taken]:
        raise CheckpointError(f"weights: {len(missing)} of {len(specs)} tensors are missing, such as {missing[0]}")
