"""Recorder: writes down what a rank does, a rehearsed one or a real one, operator by operator.

    with Recorder(record, device="cpu") as recorder:
        recorder.begin_step()
        ...

It sees what torch's dispatcher sees: operators, collectives with the groups they run over, copies, numbers that the host
reads. It changes nothing, but that an asynchronous collective's handle tells it of a wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flagscale_like.errors import RehearsalError
from flagscale_like.rehearsal.flops import flops_of
from flagscale_like.rehearsal.memory import Memory
from flagscale_like.rehearsal.places import Places
from flagscale_like.rehearsal.record import Event, RankRecord

# c10d's operators by the names of torch.distributed.
NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather_into_tensor",
    "allgather_into_tensor_coalesced_": "all_gather_into_tensor",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter_tensor",
    "reduce_scatter_": "reduce_scatter",
    "alltoall_base_": "all_to_all_single",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "send": "isend",
    "recv_": "irecv",
}
READ = torch.ops.aten._local_scalar_dense.default
DEVICE_OF = torch.ops.prim.device.default
# Operators whose output is as large as their input's values say: the host waits to allocate it.
CHOOSING = (torch.ops.aten.masked_select.default, torch.ops.aten.nonzero.default)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# Operators that touch no memory of the device, or none that is worth a kernel.
SILENT = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.set_.source_Tensor,
    torch.ops.aten.set_.source_Storage_storage_offset,
    torch.ops.aten.record_stream.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten._unsafe_view.default,
}


class _Handle(dist.Work):
    """A collective's handle that tells the recorder of the wait."""

    def __init__(self, recorder: Recorder, number: int, inner: Any) -> None:
        super().__init__()
        self._recorder, self.number, self._inner = recorder, number, inner

    def wait(self, timeout: Any = None) -> bool:
        self._recorder.waited(self.number)
        return True if self._inner is None else self._inner.wait()

    def block_current_stream(self) -> None:
        self.wait()

    synchronize = block_current_stream

    def is_completed(self) -> bool:
        return True if self._inner is None else self._inner.is_completed()

    def is_success(self) -> bool:
        return self.is_completed()


class Recorder(TorchDispatchMode):
    """Appends to `record` what this rank does.

    Args:
        device: type of the device whose operators are recorded; on a CPU, all.
        memory: keeps the timeline of the device's memory; None keeps none.
        computes: record what computes as well, not only what waits, copies and communicates.
    """

    def __init__(
        self, record: RankRecord, *, device: str = "cpu", memory: Memory | None = None, computes: bool = True
    ) -> None:
        super().__init__()
        self.record, self.memory, self.places = record, memory, Places()
        self._device, self._computes = device, computes
        self._stream, self._muted = "compute", False
        self._handles: dict[int, _Handle] = {}
        self._next_handle = 1
        self._groups: dict[str, tuple[tuple[int, ...], str]] = {}
        self._labels: dict[str, str] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps each call so that no compiler looks into it; nothing is compiled here."""
        return False

    def _has(self, tensor: Tensor) -> bool:
        """Whether the tensor is the device's. One without data is asked for its own note: `device` would be dispatched."""
        return (getattr(tensor, "fake_device", None) or tensor.device).type == self._device

    def __enter__(self) -> Recorder:
        self._watching = self.places.watching()
        self._watching.__enter__()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._watching.__exit__(exc_type, exc_val, exc_tb)

    # What the loop and the device tell it.

    def begin_step(self) -> None:
        """The events that follow are of another step."""
        self.record.step_starts.append(len(self.record.events))
        if self.memory is not None:
            self.memory.begin_step()

    def host_waits(self, op: str) -> None:
        """The host waits for the device."""
        line = self.places.line()
        last = self.record.events[-1] if self.record.events else None
        if last is not None and last.kind == "host_wait" and last.where == line and last.op == op:
            return  # the numbers of one tensor, one after another
        self._add("host_wait", op, line)

    @contextlib.contextmanager
    def on_stream(self, name: str) -> Iterator[None]:
        """Inside, operators are queued on another stream."""
        before, self._stream = self._stream, name
        try:
            yield
        finally:
            self._stream = before

    def marks(self, stream: str) -> int:
        """A handle of the point at which a stream is."""
        handle = 0 if self._muted else self._handle()
        self._add("mark", "record event", self.places.line(), stream=stream, handle=handle)
        return handle

    def stream_waits(self, stream: str, handle: int) -> None:
        """A stream waits for a mark."""
        self._add("wait", "wait for event", self.places.line(), stream=stream, handle=handle)

    def waited(self, handle: int) -> None:
        """The compute waits for an asynchronous collective."""
        if self._handles.pop(handle, None) is not None:
            self._add("wait", "wait", self.places.line(), stream=self._stream, handle=handle)

    def gives_back(self) -> None:
        """The allocator gives back what nothing uses."""
        if self.memory is not None:
            self.memory.given_back.append(self.memory.tick)

    def peak_bytes(self) -> int:
        """Most bytes of the device that were in use."""
        return self.memory.peak if self.memory is not None else 0

    def position(self) -> tuple[int, int]:
        """How many events there are, and the handle that comes next."""
        return len(self.record.events), self._next_handle

    def write_again(self, events: Sequence[Event], handles: int) -> None:
        """Write down what was done before.

        Args:
            events: their handles count from 0 on.
            handles: how many there are.
        """
        first = self._next_handle
        self.record.events += [e if e.handle is None else replace(e, handle=e.handle + first) for e in events]
        self._next_handle += handles

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Inside, nothing is written down."""
        before = self._muted
        self._muted = True
        try:
            yield
        finally:
            self._muted = before

    def name_groups(self, names: Mapping[str, str]) -> None:
        """Give process groups names for people.

        Args:
            names: torch's name of a group -> tp, pp, dp_cp ...
        """
        self._labels, self._groups = dict(names), {}

    # What the dispatcher tells it.

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        function, kwargs = func, kwargs or {}
        if self._muted:
            return function(*args, **kwargs)
        if function.namespace == "c10d":
            return self._communicates(function, args, kwargs)
        if function is DEVICE_OF and hasattr(args[0], "fake_device"):  # half of all calls
            return args[0].fake_device
        if function.namespace == "prim":
            return function(*args, **kwargs)
        if function is READ and self._has(args[0]):
            self.host_waits("read a number")
        elif function in CHOOSING and self._has(args[0]):
            self.host_waits(f"the shape of {function.overloadpacket}")
        out = self._call(function, args, kwargs)
        if function.is_view or function is READ:
            return out
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if self.memory is not None:
            for tensor in outs:
                if self._has(tensor) and self.memory.is_new(tensor):
                    line = self.places.line()
                    self.memory.allocated(tensor, str(function), line, self.places.part(line), self.places.layer())
        if function in COPIES:
            self._copies(function, args, kwargs, out)
        elif self._computes and function not in SILENT:
            self._computed(function, args, kwargs, outs)
        return out

    def _call(self, function: Callable, args: Sequence, kwargs: Mapping[str, Any]) -> Any:
        """The operator.

        Raises:
            RehearsalError: it cannot be run without data.
        """
        try:
            return function(*args, **kwargs)
        except DynamicOutputShapeException:
            line = self.places.line()
            raise RehearsalError(
                f"{function} at {line}: values decide the shape of its output. Such a step cannot be rehearsed, and on a GPU "
                "it waits for the device: give the output a fixed shape"
            ) from None
        except (UnsupportedOperatorException, RuntimeError) as error:
            if not isinstance(error, UnsupportedOperatorException) and "no fake impl registered" not in str(error):
                raise
            raise RehearsalError(
                f"{function} at {self.places.line()}: has no implementation for tensors without data: register one with "
                "torch.library.register_fake"
            ) from None

    def _copies(self, function: Any, args: Sequence, kwargs: Mapping[str, Any], out: Tensor) -> None:
        source = args[1] if function is COPIES[1] else args[0]
        between = self._has(source) != self._has(out)
        line = self.places.line()
        if not between:
            if self._has(out) and self._computes:
                self._computed(function, args, kwargs, [out])
            return
        non_blocking = args[2] if function is COPIES[1] and len(args) > 2 else kwargs.get("non_blocking", False)
        direction = "to the host" if self._has(source) else "to the device"
        self._add("copy", f"copy {direction}", line, source, asynchronous=bool(non_blocking), nbytes=source.nbytes)
        if not non_blocking:
            self.host_waits(f"copy {direction}")

    def _computed(self, function: Any, args: Sequence, kwargs: Mapping[str, Any], outs: list[Tensor]) -> None:
        ins = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        changed = outs or ins
        if not any(self._has(tensor) for tensor in changed):
            return
        nbytes = sum(tensor.nbytes for tensor in ins) + sum(tensor.nbytes for tensor in outs)
        line = self.places.line()
        first = changed[0]
        name = function._schema.name
        if "dtype" in function._overloadname:  # the output is wider than what is multiplied
            name += ".dtype"
        self._add("compute", name, line, first, nbytes=nbytes, flops=flops_of(function, args, kwargs, outs))

    # Collectives

    def _communicates(self, function: Any, args: Sequence, kwargs: Mapping[str, Any]) -> Any:
        schema = function._schema
        given: dict[str, Any] = {
            **dict(zip((argument.name for argument in schema.arguments), args, strict=False)),
            **kwargs,
        }
        boxed = next(v for v in given.values() if isinstance(v, torch.ScriptObject) and _is_group(v))
        ranks, label = self._group(dist.ProcessGroup.unbox(boxed))
        op = schema.name.removeprefix("c10d::")
        source = _source(op, given)
        asynchronous = bool(given.get("async_op", True))  # the dispatcher leaves out what has its default value
        handle = self._handle()
        kind, peer = "collective", None
        if op in ("send", "recv_"):
            kind, end = ("send", "dst") if op == "send" else ("receive", "src")
            peer = ranks[given[end]]
        nbytes = sum(tensor.nbytes for tensor in source)
        line = self.places.line()
        first = source[0] if source else None
        extra = {"group": ranks, "group_name": label, "peer": peer, "nbytes": nbytes, "asynchronous": asynchronous}
        self._add(kind, NAMES.get(op, op), line, first, handle=handle if asynchronous else None, **extra)
        out = self._call(function, args, kwargs)
        if not asynchronous:
            return out
        return self._told(out, handle)

    def _told(self, out: Any, handle: int) -> Any:
        """The result of a collective, with a handle that tells of the wait in the place of its own."""
        inner = out[-1] if isinstance(out, (tuple, list)) else out
        if not isinstance(inner, torch.ScriptObject):
            return out
        work = _Handle(self, handle, dist.Work.unbox(inner))
        self._handles[handle] = work
        return (*out[:-1], work.boxed()) if isinstance(out, (tuple, list)) else work.boxed()

    def _group(self, group: dist.ProcessGroup) -> tuple[tuple[int, ...], str]:
        name = group.group_name
        if name not in self._groups:
            ranks = tuple(dist.get_process_group_ranks(group))
            self._groups[name] = ranks, self._labels.get(name, "")
        return self._groups[name]

    def _handle(self) -> int:
        self._next_handle += 1
        return self._next_handle - 1

    def _add(
        self, kind: Any, op: str, line: str, tensor: Tensor | None = None, *, nbytes: int = 0, **more: Any
    ) -> None:
        if self._muted:
            return
        more.setdefault("stream", self._stream)
        self.record.events.append(
            Event(
                kind=kind,
                op=op,
                where=line,
                dtype="" if tensor is None else str(tensor.dtype).removeprefix("torch."),
                shape=() if tensor is None else tuple(tensor.shape),
                bytes=nbytes,
                part=self.places.part(line),
                **more,
            )
        )


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _source(op: str, given: Mapping[str, Any]) -> list[Tensor]:
    """What this rank sends, or receives: the input of a collective."""
    for name in ("input_tensors", "input_tensor", "inputs", "input", "tensors", "tensor"):
        value = given.get(name)
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, (list, tuple)):
            return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    raise AssertionError(f"c10d::{op} takes {sorted(given)}")
