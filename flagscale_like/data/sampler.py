"""Which samples a rank reads: a function of the samples consumed so far, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator


class MicroBatchSampler:
    """Micro-batches of one data-parallel rank, in the dataset's order, from `consumed` on.

    The ranks take turns, a micro-batch each. A global batch is therefore the same samples for every data-parallel size, and
    batch-size ramp-up needs no word here.

    Args:
        total: samples in the dataset.
        consumed: samples that training has used.
    """

    def __init__(self, total: int, consumed: int, micro_batch_size: int, dp_rank: int, dp: int) -> None:
        self.total, self.consumed = total, consumed
        self.micro_batch_size, self.dp_rank, self.dp = micro_batch_size, dp_rank, dp

    def __len__(self) -> int:
        return max(0, (self.total - self.consumed) // (self.micro_batch_size * self.dp))

    def __iter__(self) -> Iterator[range]:
        stride = self.micro_batch_size * self.dp
        first = self.consumed + self.dp_rank * self.micro_batch_size
        for turn in range(len(self)):
            start = first + turn * stride
            yield range(start, start + self.micro_batch_size)
