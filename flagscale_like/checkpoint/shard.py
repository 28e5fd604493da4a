"""Shard: what one rank saves and loads of one parameter, as the store and the loaders see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flagscale_like.checkpoint.fragments import Fragment

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """A fragment of a global tensor, and where its elements lie in this rank's memory.

    Attributes:
        primary: whether this rank's copy is the one to save, and no replica of another rank's.
        tensors: by kind, 1-D views of the fragment's elements: `param`, and Adam's `exp_avg` and `exp_avg_sq` where the
            parameter is trained.
    """

    fragment: Fragment
    primary: bool
    tensors: dict[str, Tensor]
