"""What the order of samples has in common, whether one source or several give them."""

from __future__ import annotations

from typing import Self

from flagscale_like.errors import DataError


class OneSource:
    """The order of the samples of one source: its own."""

    @property
    def parts(self) -> list[Self]:
        """The dataset of each source, in the order of data.sources."""
        return [self]

    def place(self, position: int) -> tuple[int, int]:
        """Return (number of the source, index in the source's dataset) of the sample at `position`.

        Raises:
            DataError: `position` is outside the dataset.
        """
        return 0, checked_position(position, len(self))  # type: ignore[arg-type]


def checked_position(position: int, samples: int) -> int:
    """Return `position`.

    Raises:
        DataError: it is not below `samples`.
    """
    if not 0 <= position < samples:
        raise DataError(f"sample {position}: the order has {samples} samples, from 0")
    return position
