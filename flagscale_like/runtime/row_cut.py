"""RowCut: which part of every row a context-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from flagscale_like.config import ContextParallelKind


@dataclass(frozen=True)
class RowCut:
    """The cut of a row of s tokens over the ranks of a context-parallel group.

    With `zigzag` a row is 2 * size chunks, and a rank holds two: one from the front and its mirror image from the back.
    Causal attention then costs the same on every rank (Dubey et al. 2024, section 3.3.2). Without it, a row is `size` chunks,
    one for each rank.

    Attributes:
        rank, size: in the group.
        group: the context-parallel ranks that hold the rows; None of a cut that is only looked at.
    """

    rank: int
    size: int
    zigzag: bool
    group: dist.ProcessGroup | None

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return 2 * self.size if self.zigzag else self.size

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers of the chunks that this rank holds, in the order in which they lie."""
        return (self.rank, 2 * self.size - 1 - self.rank) if self.zigzag else (self.rank,)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of whole rows: [..., s, ...] -> [..., s / size, ...]."""
        length = x.shape[dim] // self.chunks
        return torch.cat([x.narrow(dim, chunk * length, length) for chunk in self.held], dim)

    def whole(self, x: Tensor) -> Tensor:
        """Whole rows on every rank, from the parts of all: [b, s / size, ...] -> [b, s, ...].

        Every rank is to compute the same from them: the backward pass takes this rank's part of the gradient, and does not
        add up the ranks' (equal) gradients.
        """
        parts = gather_from_sequence_parallel_region(
            x.transpose(0, 1).contiguous(), tensor_parallel_output_grad=False, group=self.group
        )
        chunks = parts.unflatten(0, (self.chunks, -1))  # [size * chunks of a rank, s / chunks, b, ...]
        lies = [chunk for rank in range(self.size) for chunk in replace(self, rank=rank).held]
        order = sorted(range(self.chunks), key=lies.__getitem__)
        return torch.cat([chunks[place] for place in order]).transpose(0, 1)


def row_cut(group: dist.ProcessGroup, kind: ContextParallelKind) -> RowCut | None:
    """The cut over a context-parallel group as parallel.cp_kind asks for it; None over one rank."""
    return RowCut(group.rank(), group.size(), kind == "gather", group) if group.size() > 1 else None
