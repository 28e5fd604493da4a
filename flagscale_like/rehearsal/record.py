"""The record of one rank's steps: what it computed, sent and waited for, in the order in which its host asked for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_VALUES, replace_file

Kind = Literal["compute", "collective", "send", "receive", "wait", "host_wait", "copy", "mark"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a rank did.

    Attributes:
        kind: `wait`: `stream` waits for an asynchronous operation, or for a mark. `host_wait`: the host waits for the device.
            `copy`: between host and device. `mark`: a point of `stream`, after all that was queued there, for another stream
            to wait for.
        op: aten::mm, flagscale_kernels::rms_norm, all_reduce, reduce_scatter_tensor, isend ...
        where: "file.py:123 function" of the innermost line of this package, its kernels or megatron-core that asked for it.
        group: global ranks of the process group, in its order; empty for what no other rank takes part in.
        group_name: megatron-core's name of the group (tp, pp, dp_cp ...); empty where it has none.
        peer: global rank that a send goes to, or a receive comes from.
        dtype, shape: of the first tensor: a collective's input, a copy's source, the output of what computes.
        bytes: moved by this rank: of a collective its input, of a copy its source, of what computes all that it reads and
            writes.
        flops: of a product or an attention; 0 for what memory limits.
        stream: `compute`, or the name of a stream of copies or collectives.
        asynchronous: the caller goes on; a `wait` with the same `handle` follows. Marks have handles as well.
        part: of the step: "layer 3 forward", "layer 3 backward", "optimizer", "loss"; for reports.
    """

    kind: Kind
    op: str
    where: str
    group: tuple[int, ...] = ()
    group_name: str = ""
    peer: int | None = None
    dtype: str = ""
    shape: tuple[int, ...] = ()
    bytes: int = 0
    flops: int = 0
    stream: str = "compute"
    asynchronous: bool = False
    handle: int | None = None
    part: str = ""

    def describe(self) -> str:
        """One line for people."""
        tensor = f" {self.dtype}{list(self.shape)}" if self.dtype else ""
        group = f" over {self.group_name or len(self.group)} ranks {list(self.group)}" if self.group else ""
        peer = f" with rank {self.peer}" if self.peer is not None else ""
        return f"{self.op}{tensor}{group}{peer} at {self.where}"


@dataclass
class RankRecord:
    """What one rank did in its steps.

    Attributes:
        step_starts: index of the first event of each step; what comes before the first one builds the model.
        stage: pipeline stage of the rank.
        memory: the timeline of its device memory, if it was kept; see rehearsal.memory.
    """

    rank: int
    world_size: int
    events: list[Event] = field(default_factory=list)
    step_starts: list[int] = field(default_factory=list)
    stage: int = 0
    memory: Any = None

    def step(self, number: int) -> list[Event]:
        """The events of a step, counted from 0; -1 is the last one."""
        number %= len(self.step_starts)
        bounds = [*self.step_starts, len(self.events)]
        return self.events[bounds[number] : bounds[number + 1]]

    def write(self, path: Path) -> None:
        """Write the events as JSON; the memory has files of its own."""
        columns = list(Event.__dataclass_fields__)
        events = [[getattr(event, name) for name in columns] for event in self.events]
        own = {"rank": self.rank, "world_size": self.world_size, "stage": self.stage, "step_starts": self.step_starts}
        replace_file(path, json.dumps({**own, "columns": columns, "events": events}).encode())

    @classmethod
    def read(cls, path: Path) -> RankRecord:
        """What `write` wrote.

        Raises:
            DataError: it is no such file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            events = [_event(dict(zip(found["columns"], row, strict=True))) for row in found["events"]]
            return cls(found["rank"], found["world_size"], events, found["step_starts"], found["stage"])
        except (OSError, *BAD_VALUES) as error:
            raise DataError(f"{path}: is no record of a rank ({type(error).__name__}: {error})") from None


def _event(values: Mapping[str, Any]) -> Event:
    given: dict[str, Any] = {**values, "group": tuple(values["group"]), "shape": tuple(values["shape"])}
    return Event(**given)
