"""The samples that dynamic data selection draws. RUN_DIR/draws.jsonl has the state of the draw at each change of weights."""

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
    from flagscale_like.data.blend import AnySource


def draw(weights: Sequence[float], credits: list[float], drawn: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (source, index in the source) of one sample after another, without end.

    Each sample comes from the source with the largest credit: the source that is furthest behind its weight.

    Args:
        weights: the weight of each source; they add up to 1.
        credits: how many samples each source is behind its weight. Updated in place.
        drawn: how many samples were drawn from each source. Updated in place.
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
    """The state from which `draw` continues after a change of the weights.

    Attributes:
        position: the number of the first sample that is drawn from this state, in the order of the run. It is larger than
            sum(drawn) if the run started without selection.
        weights: the weight of each source; they add up to 1.
        credits: how many samples each source is behind its weight.
        drawn: samples drawn from each source before `position`.
        until: the number of the first sample that is no longer drawn from this state. None in a journal of an earlier
            version: the state holds until the next one begins.
    """

    position: int
    weights: list[float]
    credits: list[float]
    drawn: list[int]
    until: int | None = None

    def samples(self) -> Iterator[tuple[int, int]]:
        """Yield (source, index in the source) of the samples from `position` on."""
        return draw(self.weights, list(self.credits), list(self.drawn))

    def append_to(self, run_dir: Path) -> None:
        """Append this state to RUN_DIR/draws.jsonl."""
        append_record(RunFolder(run_dir).draws, vars(self))


def read_draws(run_dir: Path) -> list[DrawState]:
    """Read RUN_DIR/draws.jsonl, in the order of positions.

    A run that was killed and resumed records some positions twice; the later record replaces the earlier ones.
    """
    states: list[DrawState] = []
    for record in read_records(RunFolder(run_dir).draws):
        try:
            # A journal of an earlier version has no position: such a run used selection from its first sample.
            state = DrawState(**{"position": sum(record["drawn"]), **record})
        except (TypeError, KeyError):  # not a DrawState
            continue
        while states and states[-1].position >= state.position:
            states.pop()
        states.append(state)
    return states


class DrawnOrder:
    """The order of the samples of a run with dynamic selection. `Blend` is its counterpart for fixed weights.

    Args:
        parts: the dataset of each source.
        states: the states of the draw, in the order of positions; `note` appends further ones.
    """

    def __init__(self, parts: Sequence[AnySource], states: Sequence[DrawState] = ()) -> None:
        self.parts, self.states = list(parts), list(states)
        self._plan: list[tuple[int, int]] = []
        self._of: tuple[DrawState, Iterator[tuple[int, int]]] | None = None

    def note(self, state: DrawState) -> None:
        """Append a state: the samples from its position on are drawn from it."""
        self.states.append(state)

    def place(self, position: int) -> tuple[int, int]:
        """Return (number of the source, index in the source's dataset) of the sample at `position`.

        Raises:
            DataError: no state covers this position.
        """
        number = bisect.bisect_right(self.states, position, key=lambda state: state.position) - 1
        state = self.states[number] if number >= 0 else None
        if state is None or (state.until is not None and position >= state.until):
            raise DataError(
                f"sample {position}: which sample data.selection drew here is known from the run's draws.jsonl only, up to "
                "the last step of the run, or for a few steps after a checkpoint: restore draws.jsonl"
            )
        if self._of is None or self._of[0] is not state:
            self._of, self._plan = (state, state.samples()), []
        place = position - state.position
        self._plan += itertools.islice(self._of[1], max(0, place + 1 - len(self._plan)))
        source, index = self._plan[place]
        return source, index % len(self.parts[source])
