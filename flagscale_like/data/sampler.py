"""The samples that each data-parallel rank reads. They depend only on the number of samples consumed so far."""

from __future__ import annotations

from collections.abc import Iterator


class MicroBatchSampler:
    """Yields the sample numbers of one data-parallel rank's micro-batches, in the dataset's order.

    Consecutive micro-batches go to consecutive ranks. A global batch therefore holds the same samples for every
    data-parallel size, and the sampler does not depend on the batch-size ramp-up.

    Args:
        total: samples in the dataset.
        consumed: samples that training has read; the first micro-batch follows them.
        micro_batch_size: samples of a micro-batch.
        dp_rank, dp: this data-parallel rank, and the number of data-parallel ranks.
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
