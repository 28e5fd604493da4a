"""Executes the ranks' records together, one operation after another, until none can go on.

A blocking operation, and a wait for an asynchronous one, holds its rank up until all that take part have begun it. What is
asked of one communicator runs in the order in which it was asked, as in NCCL: torch has a communicator for each group, and
one more for each pair of ranks that exchange messages outside of a batch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from flagscale_like.rehearsal.meetings import MEETS, End, Matched, Meeting
from flagscale_like.rehearsal.record import Event

# A rank's part in a meeting, in its queue.
Part = tuple[End, Meeting]


def batch_length(events: Sequence[Event], place: int) -> int:
    """How many events, from `place` on, are one exchange: sends and receives of one call."""
    first, end = events[place], place + 1
    if first.kind == "collective":
        return 1
    while end < len(events) and events[end].kind in ("send", "receive"):
        if (events[end].where, events[end].group) != (first.where, first.group):
            break
        end += 1
    return end - place


class Execution:
    """All ranks at once. Nothing takes time: see replay.Replay for that.

    Attributes:
        at: rank -> place of the event that comes next.
        waits: rank -> what it waits for; {} after `run` where all ranks have come to their ends.
    """

    def __init__(self, matched: Matched) -> None:
        self.matched = matched
        self.at = dict.fromkeys(matched.events, 0)
        self.waits: dict[int, Meeting] = {}
        self._handles: dict[tuple[int, int], Meeting] = {}
        self._queues: dict[tuple, deque[list[Part]]] = defaultdict(deque)
        self._queue_of: dict[tuple[int, End], tuple] = {}  # by identity of the meeting
        self._begun: dict[int, set[End]] = defaultdict(set)
        self._done: set[int] = set()

    # What a subclass may add to.

    def passed(self, rank: int, event: Event) -> None:
        """A rank has done something by itself."""

    def asked(self, rank: int, place: int, event: Event, meeting: Meeting) -> None:
        """A rank has asked for its part in a meeting."""

    def met(self, meeting: Meeting, queues: dict[End, tuple]) -> None:
        """All have begun their parts. `queues` names the communicator of each."""

    def waited(self, rank: int, event: Event, meeting: Meeting) -> None:
        """A rank has waited for a meeting at `event`, and goes on."""

    # The execution.

    def run(self) -> None:
        """Until no rank can go on."""
        ready = deque(self.at)
        while ready:
            ready.extend(self._advance(ready.popleft()))

    def begun(self, meeting: Meeting) -> set[End]:
        """Who has begun its part."""
        return self._begun[id(meeting)]

    def _advance(self, rank: int) -> list[int]:
        """Go on with a rank until it waits; ranks that can go on because of it."""
        events, meetings, woken = self.matched.events[rank], self.matched.meetings[rank], []
        while self.at[rank] < len(events):
            place = self.at[rank]
            event, waits_for = events[place], None
            if event.kind in MEETS:
                if rank not in self.waits:
                    count = batch_length(events, place)
                    woken += self._ask(rank, range(place, place + count))
                    self.at[rank] += count - 1
                    event, place = events[place + count - 1], place + count - 1
                waits_for = None if event.asynchronous else meetings[place]
            elif event.kind == "wait" and event.handle is not None:
                waits_for = self._handles.get((rank, event.handle))
            if waits_for is not None:
                if id(waits_for) not in self._done:
                    self.waits[rank] = waits_for
                    return woken
                self.waits.pop(rank, None)
                self.waited(rank, event, waits_for)
            elif event.kind not in MEETS:
                self.passed(rank, event)
            self.at[rank] += 1
        return woken

    def _ask(self, rank: int, places: range) -> list[int]:
        events = self.matched.events[rank]
        first, batch = events[places[0]], []
        name: tuple = (rank, first.group_name, first.group)
        if first.kind != "collective" and len(places) == 1:
            name = (*name, first.peer)
        for place in places:
            event, meeting = events[place], self.matched.meetings[rank][place]
            end = (rank, event.kind)
            batch.append((end, meeting))
            self._queue_of[id(meeting), end] = name
            if event.handle is not None:
                self._handles[rank, event.handle] = meeting
            self.asked(rank, place, event, meeting)
        queue = self._queues[name]
        queue.append(batch)
        return self._begin(batch) if len(queue) == 1 else []

    def _begin(self, batch: list[Part]) -> list[int]:
        """Operations have come to the front of their queue; ranks that go on because meetings are complete."""
        woken: list[int] = []
        todo = deque([batch])
        while todo:
            for end, meeting in todo.popleft():
                begun = self._begun[id(meeting)]
                begun.add(end)
                if len(begun) < len(meeting.ends):
                    continue
                self._done.add(id(meeting))
                queues = {other: self._queue_of[id(meeting), other] for other in meeting.ends}
                self.met(meeting, queues)
                for other, name in queues.items():
                    todo.extend(self._leave(self._queues[name]))
                    if self.waits.get(other[0]) is meeting:
                        woken.append(other[0])
        return woken

    def _leave(self, queue: deque[list[Part]]) -> list[list[Part]]:
        """The next batch of a queue, where the one at its front is done."""
        if queue and all(id(meeting) in self._done for _, meeting in queue[0]):
            queue.popleft()
            return [queue[0]] if queue else []
        return []
