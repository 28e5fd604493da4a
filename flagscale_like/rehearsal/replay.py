"""Replays matched records on a cluster: when each kernel, collective and message of a step begins and ends.

Kernels of a stream run one after another; collectives and messages run beside them, on streams of their own, once all that
take part have got to them. What the records ask for is the software's own overlap: a wait is where megatron-core waits. Two
transfers of one rank to other nodes in one direction share its port while both run, each at half its speed; a ring sends and
receives. Links inside a node are not shared: two transfers there have the full bandwidth each.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from flagscale_like.errors import DataError
from flagscale_like.rehearsal.costs import Costs
from flagscale_like.rehearsal.execution import Execution
from flagscale_like.rehearsal.meetings import End, Matched, Meeting
from flagscale_like.rehearsal.record import Event

BUBBLE, SKEW, CALLS = "bubble", "waiting for slower ranks", "calls"


@dataclass(frozen=True, slots=True)
class Slice:
    """A row of a timeline from `start` to `end`, in seconds.

    Attributes:
        row: `compute`, the name of another stream, or a group's: its traffic.
    """

    rank: int
    row: str
    name: str
    start: float
    end: float
    where: str


@dataclass
class Timeline:
    """What happens when.

    Attributes:
        seconds: of the whole, from the first rank's begin to the last rank's end.
        parts: rank -> seconds of its compute stream by what they go to: `compute`, a group's name (traffic that nothing
            hides), `bubble` (a message that is not there yet), `waiting for slower ranks`, `copies`, `calls` (work for
            exchanges; see Costs.calls).
        kernels: rank -> seconds of kernels by the part of the step they belong to.
        slices: in no order; [] where they are not kept.
    """

    seconds: float
    parts: dict[int, dict[str, float]]
    kernels: dict[int, dict[str, float]]
    slices: list[Slice] = field(default_factory=list)

    def share(self, part: str) -> float:
        """The mean share of the step that the ranks spend on something."""
        return sum(own.get(part, 0.0) for own in self.parts.values()) / len(self.parts) / self.seconds


def replay(matched: Matched, costs: Costs, *, keep_slices: bool = False) -> Timeline:
    """The timeline of matched records.

    Raises:
        DataError: the records do not fit together.
    """
    matched.raise_problems()
    run = _Replay(matched, costs, keep_slices=keep_slices)
    run.run()
    if run.waits:  # match() finds all hangs
        raise DataError(f"{len(run.waits)} ranks wait for ever")
    ends = [end for clocks in run.clocks.values() for end in clocks.values()]
    return Timeline(
        max([*ends, *(end for _, end in run.times.values())], default=0.0),
        {rank: dict(parts) for rank, parts in run.parts.items()},
        {rank: dict(parts) for rank, parts in run.kernels.items()},
        run.slices,
    )


def row_of(event: Event) -> str:
    """The row of a transfer: its group, and of messages that they are some."""
    name = event.group_name or f"{len(event.group)} ranks"
    return name if event.kind == "collective" else f"{name} messages"


def _ports_of(end: End) -> Sequence[tuple[int, str]]:
    """A rank's port in the directions that its part in a meeting takes."""
    rank, kind = end
    return [(rank, kind)] if kind != "collective" else [(rank, "send"), (rank, "receive")]


class _Replay(Execution):
    """Attributes:
    clocks: rank -> stream -> when it is free.
    times: identity of a meeting -> when it begins and ends.
    """

    def __init__(self, matched: Matched, costs: Costs, *, keep_slices: bool) -> None:
        super().__init__(matched)
        self.costs, self._keeps = costs, keep_slices
        self.clocks: dict[int, dict[str, float]] = {rank: defaultdict(float) for rank in matched.events}
        self.times: dict[int, tuple[float, float]] = {}
        self.parts: dict[int, dict[str, float]] = {rank: defaultdict(float) for rank in matched.events}
        self.kernels: dict[int, dict[str, float]] = {rank: defaultdict(float) for rank in matched.events}
        self.slices: list[Slice] = []
        self._asked_at: dict[tuple[int, End], tuple[float, Event]] = {}
        self._marks: dict[tuple[int, int], float] = {}
        self._hosts: dict[int, float] = defaultdict(float)  # rank -> when its host has come back from the last wait
        # A rank and a direction -> the last transfers.
        self._ports: dict[tuple[int, str], deque[int]] = defaultdict(lambda: deque(maxlen=8))
        # Queue -> when it is free for the exchange at its front, when that ends, and which one it is.
        self._free: dict[tuple, tuple[float, float, object]] = {}

    def _now(self, rank: int, stream: str) -> float:
        return max(self.clocks[rank][stream], self._hosts[rank])

    def passed(self, rank: int, event: Event) -> None:
        clocks, stream = self.clocks[rank], event.stream
        begin = self._now(rank, stream)
        if event.kind == "compute":
            seconds = self.costs.compute(event)
            self.kernels[rank][event.part] += seconds
            self._spend(rank, event, begin, seconds, "compute")
        elif event.kind == "copy":
            self._spend(rank, event, begin, self.costs.copy(event), "copies")
        elif event.kind == "mark" and event.handle is not None:
            self._marks[rank, event.handle] = begin
        elif event.kind == "wait" and event.handle is not None:
            clocks[stream] = max(begin, self._marks.pop((rank, event.handle), 0.0))
        elif event.kind == "host_wait":
            self._hosts[rank] = max([begin, *clocks.values()])

    def _spend(self, rank: int, event: Event, begin: float, seconds: float, what: str) -> None:
        self.clocks[rank][event.stream] = begin + seconds
        if event.stream == "compute":
            self.parts[rank][what] += seconds
        if self._keeps and seconds:
            name = event.op if not event.part else f"{event.part}: {event.op}"
            self.slices.append(Slice(rank, event.stream, name, begin, begin + seconds, event.where))

    def asked(self, rank: int, place: int, event: Event, meeting: Meeting) -> None:
        begin = self._now(rank, event.stream)
        if seconds := self.costs.call(event):
            self.clocks[rank][event.stream] = begin = begin + seconds
            self.parts[rank][CALLS] += seconds if event.stream == "compute" else 0.0
        self._asked_at[id(meeting), (rank, event.kind)] = begin, event

    def met(self, meeting: Meeting, queues: dict[End, tuple]) -> None:
        begin = 0.0
        for end, name in queues.items():
            ready, event = self._asked_at[id(meeting), end]
            before, last, exchange = self._free.get(name, (0.0, 0.0, None))
            own = (event.where, event.handle if event.kind == "collective" else ready)
            if exchange != own:
                before, exchange = last, own
            self._free[name] = before, last, exchange
            begin = max(begin, ready, before)
        seconds = max(
            self.costs.meeting(self._asked_at[id(meeting), end][1], end[0]) for end in queues
        )  # of one size on all ranks, but for experts' tokens
        if any(self.costs.crosses(self._asked_at[id(meeting), end][1], end[0]) for end in queues):
            seconds = self._share_ports(meeting, [port for end in queues for port in _ports_of(end)], begin, seconds)
        self.times[id(meeting)] = begin, begin + seconds
        for end, name in queues.items():
            before, last, exchange = self._free[name]
            self._free[name] = before, max(last, begin + seconds), exchange
            _, event = self._asked_at.pop((id(meeting), end))
            if self._keeps and seconds:
                named = f"{event.op} {event.bytes:,} bytes"
                self.slices.append(Slice(end[0], row_of(event), named, begin, begin + seconds, event.where))

    def _share_ports(self, meeting: Meeting, ports: Sequence[tuple[int, str]], begin: float, seconds: float) -> float:
        """How long a transfer takes beside those that its ports are busy with, which it slows down as well.

        Those whose end a rank has waited for already are slowed down no more: ranks are not executed in order of time.
        """
        others = {one: self.times[one] for port in ports for one in self._ports[port]}
        longer = 0.0
        for one, (start, end) in others.items():
            together = min(end, begin + seconds) - max(start, begin)
            if together > 0:
                self.times[one] = start, end + together
                longer = max(longer, together)
        for port in ports:
            self._ports[port].append(id(meeting))
        return seconds + longer

    def waited(self, rank: int, event: Event, meeting: Meeting) -> None:
        begin, end = self.times[id(meeting)]
        now = self._now(rank, event.stream)
        self.clocks[rank][event.stream] = max(now, end)
        if event.stream != "compute" or end <= now:
            return
        transfer = min(end - now, end - begin)
        own = next(self.matched.events[rank][place] for who, place in meeting.places.items() if who[0] == rank)
        name = own.group_name or f"{len(own.group)} ranks"
        self.parts[rank][name] += transfer
        self.parts[rank][SKEW if own.kind == "collective" else BUBBLE] += end - now - transfer
