"""RowPlan: texts or answers packed into rows once, and the rows spread over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flagscale_like.data.best_fit import best_fit_decreasing
from flagscale_like.model.spec import ModelSpec


@dataclass(frozen=True)
class RowPlan:
    """Which items share a row, and which rows each data-parallel rank runs.

    Attributes:
        rows: the numbers of the items in each row.
        count: micro-batches of each rank.
        size: rows of a micro-batch.
        dp: number of data-parallel ranks.
    """

    rows: list[list[int]]
    count: int
    size: int
    dp: int

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray, spec: ModelSpec, dp: int) -> RowPlan:
        """Pack items of these lengths, each at most spec.seq_length, into as few rows as best fit finds, for `dp` ranks."""
        rows, size = best_fit_decreasing(lengths, spec.seq_length), spec.micro_batch_size
        step = spec.parallel.pp if spec.parallel.vpp > 1 else 1  # the interleaved schedule wants a multiple of it
        return cls(rows, -(-len(rows) // (size * dp * step)) * step, size, dp)

    def micro_batches(self, dp_rank: int) -> list[list[list[int]]]:
        """Of each micro-batch of a rank, the items of each row. Rows start again after the last, to fill the last ones."""
        firsts = ((turn * self.dp + dp_rank) * self.size for turn in range(self.count))
        return [[self.rows[number % len(self.rows)] for number in range(first, first + self.size)] for first in firsts]

    def order(self, dp_rank: int) -> list[int]:
        """The items in the order in which a rank runs them."""
        return [item for micro_batch in self.micro_batches(dp_rank) for row in micro_batch for item in row]
