"""Passes of micro-batches that repeat are run once: what makes a pipeline of many micro-batches affordable to record.

Of each chunk of a model the first micro-batch, the second and the last one are run. The first waits for parameters that are
gathered, and the last one's backward pass starts the reduction of gradients. What the passes of the second one do is written
down again in the place of the others'. megatron-core's schedule runs as it is, with all its exchanges, so the record is that
of a whole rehearsal, event by event; tests/rehearsal/test_repeats.py compares them. Memory is not followed: activations of
passes that are not run are nowhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from flagscale_like.cluster import ClusterSpec
from flagscale_like.config import RunConfig
from flagscale_like.errors import RehearsalError, required
from flagscale_like.rehearsal.device import DEVICE, RehearsedPlatform
from flagscale_like.rehearsal.record import Event, RankRecord
from flagscale_like.rehearsal.recorder import Recorder
from flagscale_like.rehearsal.rehearse import Run, group_names
from flagscale_like.rehearsal.world import rehearsed_rank
from flagscale_like.runtime.platforms import Platform
from flagscale_like.training.parts import Part
from flagscale_like.training.plan import StepPlan

MODEL_PASS = 1  # number of the micro-batch whose passes stand for the others'
MODEL, AGAIN = "model", "again"  # what a forward pass is to the others


@dataclass(frozen=True)
class Written:
    """What a pass did.

    Attributes:
        events: with handles counted from the first one of the pass.
        handles: how many there are.
    """

    events: Sequence[Event]
    handles: int


@dataclass(frozen=True)
class Forward:
    """A forward pass to write down again.

    Attributes:
        batches: that it took from its iterator.
        output: without data.
        tokens, reports: what the schedule gets beside it.
    """

    written: Written
    batches: int
    output: Tensor
    tokens: Tensor
    reports: Sequence[Any]


class _Counted:
    """An iterator that knows how often it was asked."""

    def __init__(self, inner: Iterator | None) -> None:
        self.inner, self.asked = inner, 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Any:
        self.asked += 1
        return next(required(self.inner, "batches"))


def repeats(config: RunConfig) -> bool:
    """Whether each micro-batch does what the one before it did. Offload's copies follow what came before."""
    return config.offload is None


def record_rank(
    config: RunConfig, cluster: ClusterSpec, kind: type[Platform], rank: int, world_size: int, run: Run
) -> RankRecord:
    """Be one rank of a run, and write down its steps, without its memory. Arguments are those of rehearse_rank().

    Raises:
        RehearsalError: see rehearse_rank(); or micro-batches do not repeat.
    """
    platform = RehearsedPlatform(kind, cluster.device)
    record = RankRecord(rank, world_size)
    local = rank % cluster.devices_per_node
    with rehearsed_rank(platform, config.parallel, rank, world_size, local_rank=local, seed=config.train.seed) as ctx:
        recorder = platform.observer = Recorder(record, device=DEVICE)
        recorder.name_groups(group_names(ctx))
        watching = Repeats(recorder).watching() if repeats(config) else contextlib.nullcontext()
        with recorder, watching:
            run(config, ctx, lambda *_: [Begins(recorder)])
        record.stage = ctx.pp_rank
    return record


class Begins(Part):
    """Tells the recorder of the steps."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def before(self, plan: StepPlan) -> None:
        self._recorder.begin_step()


class Repeats:
    """Stands between megatron-core's schedules and their passes.

    Args:
        recorder: of the rank.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._forward_step, self._backward_step = schedules.forward_step, schedules.backward_step
        self._forwards: dict[int, Forward] = {}  # by identity of the chunk
        self._backwards: dict[int, Written] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the schedules' passes are those of this object."""
        schedules.forward_step, schedules.backward_step = self.forward_step, self.backward_step
        try:
            yield
        finally:
            schedules.forward_step, schedules.backward_step = self._forward_step, self._backward_step

    def forward_step(  # megatron-core's signature
        self,
        forward_step_func: Callable,
        data_iterator: Iterator | None,
        model: Any,
        num_microbatches: int,
        input_tensor: Tensor | list,
        forward_data_store: list,
        config: Any,
        *arguments: Any,
        current_microbatch: int,
        **more: Any,
    ) -> tuple[Any, Tensor]:
        """As schedules.forward_step."""
        known, chunk = self._forwards.get(id(model)), id(model)
        if known is not None and MODEL_PASS < current_microbatch < num_microbatches - 1:
            with self._recorder.muted():
                for _ in range(known.batches):
                    next(required(data_iterator, "batches"))
                output: Any = torch.empty_like(known.output).requires_grad_()
            self._recorder.write_again(known.written.events, known.written.handles)
            forward_data_store += known.reports
            output.rehearsed = chunk, AGAIN
            return ([output] if isinstance(input_tensor, list) else output), known.tokens
        batches, reports = _Counted(data_iterator), len(forward_data_store)
        is_model = known is None and MODEL_PASS == current_microbatch < num_microbatches - 1
        begin = self._recorder.position()
        found, tokens = self._forward_step(
            forward_step_func,
            batches,
            model,
            num_microbatches,
            input_tensor,
            forward_data_store,
            config,
            *arguments,
            current_microbatch=current_microbatch,
            **more,
        )
        output = found[0] if isinstance(found, list) else found
        if is_model:
            reported = forward_data_store[reports:]
            self._forwards[chunk] = Forward(self._written(begin), batches.asked, output.detach(), tokens, reported)
        output.rehearsed = chunk, MODEL if is_model else ""
        return found, tokens

    def backward_step(
        self, input_tensor: Any, output_tensor: Any, output_tensor_grad: Any, model_type: Any, config: Any
    ) -> Any:
        """As schedules.backward_step."""
        output = output_tensor[0] if isinstance(output_tensor, list) else output_tensor
        chunk, kind = output.rehearsed
        if kind == AGAIN:
            self._recorder.write_again(self._backwards[chunk].events, self._backwards[chunk].handles)
            with self._recorder.muted():
                inputs = input_tensor if isinstance(input_tensor, list) else [input_tensor]
                grads = [None if one is None else torch.empty_like(one) for one in inputs]
            return grads if isinstance(input_tensor, list) else grads[0]
        begin = self._recorder.position()
        found = self._backward_step(input_tensor, output_tensor, output_tensor_grad, model_type, config)
        if kind == MODEL:
            self._backwards[chunk] = self._written(begin)
        return found

    def _written(self, begin: tuple[int, int]) -> Written:
        """What was written since.

        Raises:
            RehearsalError: the pass leaves something open, or ends what another began.
        """
        (place, handle), (_, after) = begin, self._recorder.position()
        events = self._recorder.record.events[place:]
        begun = {event.handle: event for event in events if event.handle is not None and event.kind != "wait"}
        waits = {event.handle: event for event in events if event.handle is not None and event.kind == "wait"}
        lone = [event for own, event in waits.items() if own not in begun]
        lone += [event for own, event in begun.items() if own not in waits and event.kind != "mark"]
        if lone:
            raise RehearsalError(f"passes of micro-batches do not repeat: {lone[0].describe()} goes beyond its own")
        own = [event if event.handle is None else replace(event, handle=event.handle - handle) for event in events]
        return Written(own, after - handle)
