"""Do the ranks' records fit together? A collective has all members of its group, a send its receive, and nothing hangs.

The n-th operation that a rank asks of a process group meets the n-th of each other member; the n-th message from one rank to
another over a group meets the n-th receive. Three things are then looked at:

1. what meets has the same operation, dtype and size, and a message sent to the next stage is received from the one before;
2. the records, executed together, come to their ends: a blocking operation waits for all that meet in it;
3. ranks that share several groups use them in one order, even where an asynchronous operation hides another one today.

Ranks of one pipeline stage do the same up to the names of ranks, so that one record of each stage stands for all ranks of it.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import linecache
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flagscale_like.errors import DataError
from flagscale_like.rehearsal.execution import Execution
from flagscale_like.rehearsal.meetings import MEETS, End, Key, Matched, Meeting, Problem
from flagscale_like.rehearsal.record import Event, RankRecord

# Collectives in which the members' sizes differ by nature: one rank's list of parts, or as many tokens as go to an expert.
UNEVEN = ("scatter", "all_to_all", "all_to_all_single", "all_gather", "barrier")
# megatron-core's names of what a stage exchanges: on the line that sends, or receives.
DIRECTION = re.compile(r"(?:send|recv)_(next|prev)")


class StandIns:
    """Which rank's record stands for a rank.

    Args:
        records: of all ranks, or of at least one rank of each pipeline stage.

    Raises:
        DataError: records of different runs, or a stage without one.
    """

    def __init__(self, records: Sequence[RankRecord]) -> None:
        worlds = {record.world_size for record in records}
        if len(worlds) != 1:
            raise DataError(f"records of runs of {', '.join(map(str, sorted(worlds)))} ranks do not belong together")
        self.world_size = worlds.pop()
        self.ranks = sorted(record.rank for record in records)
        if len(set(self.ranks)) != len(records):
            raise DataError(f"a rank has two records: {self.ranks}")
        self.all = len(records) == self.world_size
        self.stages = max(record.stage for record in records) + 1
        self._of_stage: dict[int, int] = {}
        for record in sorted(records, key=lambda record: record.rank):
            self._of_stage.setdefault(record.stage, record.rank)
        missing = sorted(set(range(self.stages)) - self._of_stage.keys())
        if not self.all and (missing or self.world_size % self.stages):
            raise DataError(f"no record of stage {missing[0] if missing else self.stages}: give one of each stage")

    def of(self, rank: int) -> int:
        """The rank whose record stands for `rank`: its own, or one of its stage."""
        return rank if self.all else self._of_stage[rank * self.stages // self.world_size]


def match(records: Sequence[RankRecord], *, step: int | None = None) -> Matched:
    """Bring operations together that meet, and look for what does not fit.

    Args:
        records: of all ranks, or of at least one rank of each pipeline stage.
        step: match one step alone, counted from 0; None matches all that is recorded.

    Raises:
        DataError: the records do not belong together, or a stage has none.
    """
    stands = StandIns(records)
    used = [record for record in records if stands.of(record.rank) == record.rank]
    matched = Matched({one.rank: one.events if step is None else one.step(step) for one in used})
    known: dict[Key, list[Meeting]] = defaultdict(list)
    for rank, events in matched.events.items():
        counts: dict[tuple[Key, str], int] = defaultdict(int)
        own = matched.meetings[rank] = {}
        for place, event in enumerate(events):
            if event.kind in MEETS:
                key, ends = _key(stands, rank, event)
                number = counts[key, event.kind]
                counts[key, event.kind] += 1
                if number == len(known[key]):
                    known[key].append(Meeting(ends))
                own[place] = known[key][number]
                own[place].places[rank, event.kind] = place
    for meetings in known.values():
        found = (problem for number in range(len(meetings)) if (problem := _compare(matched, meetings, number)))
        matched.problems += itertools.islice(found, 1)  # those that follow in a group follow from it
    if not matched.problems:
        matched.problems += [*_orders(matched, known), *_hangs(matched)]
    return matched


def _key(stands: StandIns, rank: int, event: Event) -> tuple[Key, tuple[End, ...]]:
    """The channel of an operation, and who takes part."""
    if event.kind == "collective":
        members = dict.fromkeys(stands.of(other) for other in event.group)
        # Several groups of one stage have one stand-in: their names tell them apart.
        return (event.group_name, len(event.group), *sorted(members)), tuple((one, "collective") for one in members)
    peer = stands.of(event.peer if event.peer is not None else rank)
    source, target = (rank, peer) if event.kind == "send" else (peer, rank)
    group = event.group_name or len(event.group)
    return (group, "message", source, target), ((source, "send"), (target, "receive"))


def _compare(matched: Matched, meetings: list[Meeting], number: int) -> Problem | None:
    """What is wrong with one meeting of a group, if something is."""
    meeting = meetings[number]
    events = {end: matched.events[end[0]][place] for end, place in meeting.places.items()}
    (first, event), *others = events.items()
    for end in meeting.ends:
        if end not in events:
            what = {"collective": "does not take part", "send": "sends nothing", "receive": "does not receive it"}[
                end[1]
            ]
            text = f"rank {first[0]} asks for {event.describe()}, and rank {end[0]} {what}: it has asked {number} times"
            return _problem(matched, meetings, text, events)
    for end, other in others:
        differs = _difference(event, other)
        if differs:
            text = f"{differs}: rank {first[0]} asks for {event.describe()}, and rank {end[0]} for {other.describe()}"
            return _problem(matched, meetings, text, events)
    return None


def _difference(one: Event, other: Event) -> str:
    """In what two events that meet do not fit; empty where they do."""
    if one.kind == "collective" and one.op != other.op:
        return "different operations meet"
    if one.dtype != other.dtype:
        return "different dtypes meet"
    if one.bytes != other.bytes and one.op not in UNEVEN:
        return "different sizes meet"
    if one.kind != "collective":
        sent, received = direction(one.where), direction(other.where)
        if sent and sent == received:
            stage = {"next": "next", "prev": "previous"}[sent]
            return f"an exchange is crossed: what is sent to the {stage} stage is taken for what the {stage} stage sent"
    return ""


def _problem(matched: Matched, meetings: list[Meeting], text: str, events: Mapping[End, Event]) -> Problem:
    """The problem, and where the group's members had parted before it showed."""
    for meeting in meetings:
        lines = {end[0]: matched.events[end[0]][place].where for end, place in meeting.places.items()}
        if len(set(lines.values())) > 1 and all(kind == "collective" for _, kind in meeting.ends):
            if lines != {end[0]: event.where for end, event in events.items()}:
                text += "; the first lines that differ: " + ", ".join(f"rank {r} {line}" for r, line in lines.items())
            break
    return Problem(text, {end[0]: event.where for end, event in events.items()})


@functools.lru_cache(maxsize=1024)
def direction(where: str) -> str:
    """`next` or `prev`: the stage that a line of megatron-core sends to, or receives from; empty where it names neither."""
    file, _, rest = where.partition(":")
    number = rest.partition(" ")[0]
    package = importlib.util.find_spec("megatron") if file.startswith("megatron/") else None
    if package is None or not package.submodule_search_locations or not number.isdigit():
        return ""
    path = Path(next(iter(package.submodule_search_locations))).parent / file
    found = DIRECTION.search(linecache.getline(str(path), int(number)))
    return found[1] if found else ""


def _orders(matched: Matched, known: Mapping[Key, list[Meeting]]) -> Iterator[Problem]:
    """Pairs of groups that ranks of both use in different orders."""
    places: dict[Key, dict[int, np.ndarray]] = {}
    for key, meetings in known.items():
        ends = meetings[0].ends
        if len(ends) > 1 and all(kind == "collective" for _, kind in ends):
            places[key] = {end[0]: np.array([meeting.places[end] for meeting in meetings]) for end in ends}
    for one, other in itertools.combinations(places, 2):
        shared = [rank for rank in places[one] if rank in places[other]]
        orders = {rank: np.searchsorted(places[one][rank], places[other][rank]) for rank in shared}
        for rank in shared[1:]:
            first = shared[0]
            differing = np.flatnonzero(orders[rank] != orders[first])
            if len(differing):
                at = int(differing[0])
                mine, theirs = (matched.events[r][places[other][r][at]] for r in (first, rank))
                before = min(int(orders[first][at]), int(orders[rank][at]))
                meets = matched.events[first][places[one][first][before]]
                yield Problem(
                    f"ranks {first} and {rank} use two groups in different orders, which may hang: {mine.describe()} and "
                    f"{meets.describe()} come in one order on rank {first} and in the other on rank {rank}",
                    {first: mine.where, rank: theirs.where},
                )
                break


def _hangs(matched: Matched) -> list[Problem]:
    """Where the records, executed together, come to a stop; [] where all come to their ends."""
    execution = Execution(matched)
    execution.run()
    if not execution.waits:
        return []
    rank, seen, lines = next(iter(execution.waits)), [], {}
    while rank not in seen and rank in execution.waits:
        seen.append(rank)
        meeting = execution.waits[rank]
        lines[rank] = _own_event(matched, meeting, rank)
        missing = [end[0] for end in meeting.ends if end not in execution.begun(meeting)]
        rank = missing[0] if missing else rank
    cycle = seen[seen.index(rank) :] if rank in seen else seen
    parts = [f"rank {one} waits in {lines[one].describe()}" for one in cycle]
    text = "a hang: " + ", for which ".join(parts) + f"; {len(execution.waits)} of {len(matched.events)} ranks wait"
    return [Problem(text, {one: lines[one].where for one in cycle})]


def _own_event(matched: Matched, meeting: Meeting, rank: int) -> Event:
    return next(matched.events[rank][place] for end, place in meeting.places.items() if end[0] == rank)
