"""Operations of several ranks that belong together: collectives and messages, as matching finds them in records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flagscale_like.errors import DataError
from flagscale_like.rehearsal.record import Event

MEETS = ("collective", "send", "receive")
# A group's ranks, and of a message its two ends.
Key = tuple
# A rank's part in a meeting: ("collective", "send" or "receive").
End = tuple[int, str]


@dataclass(slots=True)
class Meeting:
    """One collective, or one message: the events of several ranks that belong together.

    Attributes:
        ends: all that take part.
        places: where each one's event is in its rank's list; those that are missing never come.
    """

    ends: tuple[End, ...]
    places: dict[End, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What does not fit, and the places in the code.

    Attributes:
        text: for people, all in one paragraph.
        places: rank -> the line of the code.
    """

    text: str
    places: dict[int, str]


@dataclass
class Matched:
    """Records whose operations have been brought together.

    Attributes:
        events: rank -> its events of the steps that were matched.
        meetings: of each rank, by the place of the event.
        problems: what does not fit; nothing else is to be trusted where there is one.
    """

    events: dict[int, Sequence[Event]]
    meetings: dict[int, dict[int, Meeting]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Raises DataError with the first problem, if there is one."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise DataError(self.problems[0].text + more)
