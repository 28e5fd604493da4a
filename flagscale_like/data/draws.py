"""Which samples dynamic selection drew: a function of the weights, kept in RUN_DIR/draws.jsonl whenever they change."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale_like.errors import DataError
from flagscale_like.json_files import append_record, read_records
from flagscale_like.run_folder import RunFolder

if TYPE_CHECKING:
    from flagscale_like.data.blend import SourceDataset


def draw(weights: Sequence[float], credits: list[float], drawn: list[int]) -> Iterator[tuple[int, int]]:
    """(source, index in the source) of samples without end: each is of the source that is furthest behind its weight.

    Args:
        credits, drawn: how far each source is behind, and how many samples it gave; both go on with each sample.
    """
    while True:
        for source, weight in enumerate(weights):
            credits[source] += weight
        source = max(range(len(credits)), key=credits.__getitem__)
        credits[source] -= 1.0
        drawn[source] += 1
        yield source, drawn[source] - 1


@dataclass(frozen=True)
class DrawState:
    """Where the draw stood when the weights became what they are.

    Attributes:
        position: in the order of the run, of the first sample that it draws; more than the samples of `drawn` where the run
            began without selection.
        weights: they add up to 1.
        credits: how far each source is behind its weight, in samples.
        drawn: samples taken of each source.
        until: the first position that it says nothing of; None, of an old journal: where the next state begins.
    """

    position: int
    weights: list[float]
    credits: list[float]
    drawn: list[int]
    until: int | None = None

    def samples(self) -> Iterator[tuple[int, int]]:
        """(source, index in the source), from `position` on."""
        return draw(self.weights, list(self.credits), list(self.drawn))

    def append_to(self, run_dir: Path) -> None:
        """Note it in the run's journal."""
        append_record(RunFolder(run_dir).draws, vars(self))


def read_draws(run_dir: Path) -> list[DrawState]:
    """The journal in the order of positions; what a killed run drew and drew again after it was resumed counts once."""
    states: list[DrawState] = []
    for record in read_records(RunFolder(run_dir).draws):
        try:
            state = DrawState(**{"position": sum(record["drawn"]), **record})  # old journals: selection from the start
        except (TypeError, KeyError):  # a record of another kind
            continue
        while states and states[-1].position >= state.position:
            states.pop()
        states.append(state)
    return states


class DrawnOrder:
    """The samples of a run with dynamic selection by their position; what `Blend` is to fixed weights.

    Args:
        parts: the sources' datasets.
        states: in the order of positions; more may be noted.
    """

    def __init__(self, parts: Sequence[SourceDataset], states: Sequence[DrawState] = ()) -> None:
        self.parts, self.states = list(parts), list(states)
        self._plan: list[tuple[int, int]] = []
        self._of: tuple[DrawState, Iterator[tuple[int, int]]] | None = None

    def note(self, state: DrawState) -> None:
        """Go on from another state."""
        self.states.append(state)

    def place(self, position: int) -> tuple[int, int]:
        """(source, index in the source) of a sample.

        Raises:
            DataError: no state says what was drawn there.
        """
        number = bisect.bisect_right(self.states, position, key=lambda state: state.position) - 1
        state = self.states[number] if number >= 0 else None
        if state is None or (state.until is not None and position >= state.until):
            raise DataError(
                f"sample {position}: which one data.selection drew is known from the run's draws.jsonl only, as far as the "
                "run came, or shortly after a checkpoint"
            )
        if self._of is None or self._of[0] is not state:
            self._of, self._plan = (state, state.samples()), []
        place = position - state.position
        self._plan += itertools.islice(self._of[1], max(0, place + 1 - len(self._plan)))
        source, index = self._plan[place]
        return source, index % len(self.parts[source])
