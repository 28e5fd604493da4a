"""What the order of samples has in common, whether one source or several give them."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Self

from torch.utils.data import Dataset

from flagscale_like.errors import DataError

# A row of a dataset, as data.batch collates it: tensors by their names, and under extras others.
Row = dict[str, Any]


class Samples(Dataset[Row]):
    """A dataset that knows how many samples it has."""

    def __len__(self) -> int:
        raise NotImplementedError


class OneSource:
    """The order of the samples of one source: its own."""

    @property
    def parts(self) -> list[Self]:
        """The dataset of each source, in the order of data.sources."""
        return [self]

    def place(self: Sized, position: int) -> tuple[int, int]:
        """Return (number of the source, index in the source's dataset) of the sample at `position`.

        Raises:
            DataError: `position` is outside the dataset.
        """
        return 0, checked_position(position, len(self))


def checked_position(position: int, samples: int) -> int:
    """Return `position`.

    Raises:
        DataError: it is not below `samples`.
    """
    if not 0 <= position < samples:
        raise DataError(f"sample {position}: the order has {samples} samples, from 0")
    return position
