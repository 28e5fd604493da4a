"""What memory is for: the components of a rank's memory over time, its peak, and what was alive then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from flagscale_like.engine.engine import Engine
from flagscale_like.rehearsal.memory import Allocation, Memory

STATES = ("weights", "gradients", "optimizer")
# In the order in which reports name them; what is saved by layer stands as "activations".
COMPONENTS = (*STATES, "activations", "logits", "buffers", "temporaries")


def name_states(memory: Memory, engine: Engine) -> None:
    """Tell the memory which of its allocations are an engine's weights, gradients and optimizer states."""
    trained = engine.chunks if engine.optimizer is not None else []
    buffers = [buffer for chunk in trained for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    memory.belongs("gradients", (buffer.grad_data for buffer in buffers))
    memory.belongs("weights", (buffer.param_data for buffer in buffers if buffer.param_data is not None))
    memory.belongs("weights", (p for model in engine.models for p in model.parameters()))
    if engine.optimizer is not None:
        for part in engine.optimizer.chained_optimizers:
            memory.belongs("optimizer", (p for group in part.optimizer.param_groups for p in group["params"]))
            for state in part.optimizer.state.values():
                memory.belongs("optimizer", (value for value in state.values() if hasattr(value, "untyped_storage")))


def component_of(found: Allocation) -> str:
    """The component of an allocation.

    A step's tensor is an activation where a forward pass made it and it outlived the layer that made it; of the loss it is
    logits; what is never freed is a buffer; all else is temporary.
    """
    if found.component:
        return found.component
    if found.died is None:
        return "buffers"  # made once and kept, such as tables of angles
    if found.part.startswith("loss"):
        return "logits"
    forward = found.part.endswith("forward") or found.part in ("embedding", "pipeline")
    return "activations" if forward and found.outlived() else "temporaries"


@dataclass(frozen=True)
class Moment:
    """The bytes of each component at one tick."""

    tick: int
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class MemoryReport:
    """Of the steps of a rank.

    Attributes:
        after: what is alive after the last step, by component.
        peak: the moment of the most bytes in the steps.
        alive: the largest tensors alive at the peak: bytes, how many, and what they are.
        by_layer: activations at the peak, by layer; 0 is outside the layers.
        timeline: the moments of the last step, at most a few hundred.
    """

    after: dict[str, int]
    peak: Moment
    alive: list[tuple[int, int, str]]
    by_layer: dict[int, int]
    timeline: list[Moment]


def ticks(memory: Memory) -> Iterator[tuple[int, int, Allocation]]:
    """(tick, +bytes or -bytes, allocation) in order."""
    changes = [(found.born, found.nbytes, found) for found in memory.allocations]
    changes += [(found.died, -found.nbytes, found) for found in memory.allocations if found.died is not None]
    return iter(sorted(changes, key=lambda change: change[0]))


def report(memory: Memory, *, points: int = 400, largest: int = 12) -> MemoryReport:
    """The report of a memory whose states were named."""
    ends = memory.tick if memory.end is None else memory.end
    named = {id(found): component_of(found) for found in memory.allocations}
    first, last = (memory.steps[0], memory.steps[-1]) if memory.steps else (0, 0)
    now: Counter[str] = Counter()
    peak, timeline, every = Moment(0, {}), [], max(1, (ends - last) // points)
    high = Moment(last, {})
    for tick, nbytes, found in ticks(memory):
        if tick >= ends:
            break  # the run takes itself apart
        now[named[id(found)]] += nbytes
        if tick < first:
            continue
        total = sum(now.values())
        if total > peak.total:
            peak = Moment(tick, dict(now))
        if tick >= last:
            if total > high.total:
                high = Moment(tick, dict(now))
            if (
                tick - last >= (len(timeline) + 1) * every
            ):  # the highest moment of each stretch, so that no peak is lost
                timeline.append(high)
                high = Moment(tick, {})
    alive = [f for f in memory.allocations if f.born <= peak.tick and (f.died is None or f.died > peak.tick)]
    return MemoryReport(
        after={name: now[name] for name in COMPONENTS if now[name]},
        peak=peak,
        alive=_largest(alive, named, largest),
        by_layer=_by_layer(alive, named),
        timeline=timeline,
    )


def _largest(alive: list[Allocation], named: dict[int, str], count: int) -> list[tuple[int, int, str]]:
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for found in alive:
        words = (
            named[id(found)] if found.component else f"{named[id(found)]}: {found.part}, {found.op} at {found.where}"
        )
        sizes[words] += found.nbytes
        numbers[words] += 1
    return [(nbytes, numbers[words], words) for words, nbytes in sizes.most_common(count)]


def _by_layer(alive: list[Allocation], named: dict[int, str]) -> dict[int, int]:
    layers: Counter[int] = Counter()
    for found in alive:
        if named[id(found)] == "activations":
            layers[found.layer] += found.nbytes
    return dict(sorted(layers.items()))
