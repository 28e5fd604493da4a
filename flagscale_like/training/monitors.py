"""Monitors: spikes of loss and gradient norm, layers' gradients and updates, effective rank. See docs/monitors.md.

Every number that an event rests on is reduced over all ranks first, so that pipeline stages and data-parallel ranks find the
same events. What monitors remember (windows, highest ranks) is a part of the checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from flagscale_like.arch import parameters
from flagscale_like.config import EffectiveRank, LayerNorms, Monitors, Spike
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.shards import OwnedShard, adam_update
from flagscale_like.errors import required
from flagscale_like.model.build import named_shards
from flagscale_like.training.parts import Event, Facts, Part, Report, Step
from flagscale_like.training.plan import StepPlan
from flagscale_like.training.spectrum import SplitMatrix, effective_rank

# A value less than this share above the mean is no spike, however little the window varies.
MIN_RELATIVE_RISE = 0.01


class SpikeMonitor:
    """Finds steps whose value leaps; see `config.Spike`.

    A value above the limit enters the window as the limit: one spike does not hide the next by raising the deviation, and a
    level that stays up is accepted with time.
    """

    def __init__(self, name: str, options: Spike) -> None:
        self.name, self.options = name, options
        self.window: deque[float] = deque(maxlen=options.window)

    def judge(self, value: float) -> list[Event]:
        """The event that this step's value is, if any; the value is remembered."""
        if not math.isfinite(value):
            return []
        options, limit, why = self.options, math.inf, ""
        if len(self.window) >= options.window // 4:
            mean, sigma = statistics.fmean(self.window), statistics.pstdev(self.window)
            limit = mean + max(options.sigma * sigma, MIN_RELATIVE_RISE * abs(mean))
            why = f"mean {mean:.4g} + {options.sigma:g} sigma of the last {len(self.window)} steps"
        if options.limit is not None and options.limit < limit:
            limit, why = options.limit, f"monitors.{self.name}.limit"
        self.window.append(min(value, limit))
        if value <= limit:
            return []
        words = f"{self.name} {value:.4g} is above {limit:.4g} ({why}); monitors.{self.name}.action is {options.action}"
        return [Event(self.name, value, limit, options.action, words)]


Due = TypeVar("Due", "LayerMonitor", "EffectiveRankMonitor")


class LayerMonitor:
    """Gradient norm and update-to-weight ratio of every layer, the embedding, the final norm and the output layer.

    The ratio is |w' - w| / |w'|, with L2 norms over all weights of the layer.
    """

    def __init__(self, options: LayerNorms, engine: Engine) -> None:
        self.options, self.ctx, self.shards = options, engine.ctx, [s for s in engine.owned if s.trained]
        self.table = engine.spec.table
        units = dict.fromkeys(parameter.unit for parameter in parameters(engine.spec.arch))
        self.units = {unit: column for column, unit in enumerate(units)}
        self._squares: Tensor | None = None

    def note_gradients(self) -> None:
        """Take the gradients' squares, before they are clipped."""
        self._squares = self._sums(lambda shard: required(shard.main.grad, "grad"))

    @torch.no_grad()
    def measure(self, *, updated: bool) -> dict[str, float]:
        """Readings by name, once the step is done; all ranks call it."""
        if self._squares is None:  # an fp16 overflow: no judge was asked
            return {}
        parts = [self._squares, self._sums(lambda shard: shard.main)]
        parts += [self._sums(adam_update)] if updated else []
        self._squares = None
        squares = self.ctx.sum(torch.cat(parts).tolist())
        columns = len(self.units)
        found = {}
        for column, unit in enumerate(self.units):
            grad, weight, *update = squares[column::columns]
            if weight:
                found[f"layer-grad-norm/{unit}"] = math.sqrt(grad)
                if update:
                    found[f"layer-update-to-weight/{unit}"] = math.sqrt(update[0] / weight)
        return found

    @torch.no_grad()
    def _sums(self, tensor_of: Callable[[OwnedShard], Tensor]) -> Tensor:
        """[units] float64: this rank's part of the sum of squares."""
        sums = torch.zeros(len(self.units), dtype=torch.float64, device=self.ctx.platform.device)
        for shard in self.shards:
            if shard.counts:
                sums[self.units[self.table[shard.name].unit]] += tensor_of(shard).detach().float().norm().double() ** 2
        return sums

    def events(self, readings: dict[str, float]) -> list[Event]:
        """Layers whose update was larger than `update_limit`."""
        limit = self.options.update_limit
        return [
            Event(name, value, limit, "log", f"{name} {value:.3g} is above monitors.layers.update_limit ({limit:g})")
            for name, value in readings.items()
            if limit is not None and name.startswith("layer-update-to-weight/") and value > limit
        ]


class EffectiveRankMonitor:
    """Effective rank of weight matrices, their gradients and the residual stream; see `training.spectrum`.

    The matrices are dealt out over the replicas (data- and context-parallel ranks). A tensor-parallel shard stays where it
    is: the ranks of a group add up Gram matrices or products. A gradient, of which each replica owns a range, is put together
    on the rank that measures it, one tensor-parallel shard at a time.
    """

    def __init__(self, options: EffectiveRank, engine: Engine) -> None:
        self.options, self.ctx, self.shards = options, engine.ctx, [s for s in engine.owned if s.trained]
        self.layers = evenly_spaced(engine.spec.arch.num_layers, options.layers)
        self.sequence_parallel = engine.spec.parallel.sp
        self.highest: dict[str, float] = {}
        self.low: set[str] = set()
        self._rows: dict[int, Tensor] = {}
        self._listening = False
        self.is_frozen = engine.spec.is_frozen  # a frozen matrix has no gradient
        self.matrices = {
            parameter.name: (parameter.layer, parameter.place_in_layer)
            for parameter in parameters(engine.spec.arch)
            if parameter.role.is_layer_matrix and parameter.layer in self.layers and not parameter.experts
        }
        self.parameters: dict[tuple[int, str], nn.Parameter] = {
            self.matrices[name]: parameter
            for chunk in engine.models
            for name, parameter in named_shards(chunk).items()
            if name in self.matrices
        }
        if "activations" in options.of:
            for chunk in engine.models:
                for layer in chunk.decoder.layers:
                    if layer.layer_number - 1 in self.layers:
                        layer.register_forward_hook(self._remember)

    def names(self) -> list[str]:
        """What is measured, in the order of the reduced vector; the same on every rank."""
        names = [
            f"{kind}/layers.{layer}.{matrix}"
            for kind in ("weights", "gradients")
            for name, (layer, matrix) in self.matrices.items()
            if kind in self.options.of and not (kind == "gradients" and self.is_frozen(name))
        ]
        return names + [f"activations/layers.{i}" for i in self.layers if "activations" in self.options.of]

    def listen(self) -> None:
        """Keep some tokens of the residual stream of the next forward pass."""
        self._rows, self._listening = {}, "activations" in self.options.of

    def _remember(self, layer: TransformerLayer, _: Any, output: tuple[Tensor, ...]) -> None:
        index = layer.layer_number - 1
        if self._listening and layer.training and index not in self._rows:
            rows = output[0].detach().flatten(0, 1)  # [s, b, h] -> [s * b, h]; s is a part under sp and cp
            parts = self.ctx.layout.cp * (self.ctx.layout.tp if self.sequence_parallel else 1)
            count = max(1, self.options.tokens // parts)
            every = max(1, len(rows) // count)
            self._rows[index] = rows[::every][:count].clone()  # the pipeline empties its outputs

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Effective rank by name, between prepare_grads() and the update; all ranks call it."""
        ctx, names = self.ctx, self.names()
        local = dict.fromkeys(names, 0.0)
        replicas, tp_group = ctx.groups.dp_cp, ctx.groups.tp
        for order, ((layer, matrix), parameter) in enumerate(self.parameters.items()):
            owner = order % ctx.replicas
            for kind in ("weights", "gradients"):
                if f"{kind}/layers.{layer}.{matrix}" not in local:
                    continue
                whole = parameter.detach() if kind == "weights" else self._gradient(parameter, owner, replicas)
                if ctx.replica_rank == owner:
                    rows = whole if getattr(parameter, "partition_dim", None) == 0 else whole.t()
                    rank = effective_rank(SplitMatrix(rows, [tp_group]), exact_up_to=self.options.exact_up_to)
                    local[f"{kind}/layers.{layer}.{matrix}"] = rank if ctx.tp_rank == 0 else 0.0
        groups = [tp_group, replicas] if self.sequence_parallel else [replicas]
        for layer, rows in sorted(self._rows.items()):
            rank = effective_rank(SplitMatrix(rows, groups), exact_up_to=self.options.exact_up_to)
            local[f"activations/layers.{layer}"] = rank if ctx.tp_rank == 0 and ctx.replica_rank == 0 else 0.0
        self._rows, self._listening = {}, False
        return dict(zip(names, ctx.sum([local[name] for name in names]), strict=True))

    def _gradient(self, parameter: nn.Parameter, owner: int, group: dist.ProcessGroup) -> Tensor:
        """This tensor-parallel rank's gradient of a matrix, whole on the replica `owner`."""
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        for shard in self.shards:
            if shard.parameter is parameter:
                grad = required(shard.main.grad, "grad")
                flat[shard.start : shard.start + shard.main.numel()] = grad.view(-1)
        if group.size() > 1:
            dist.reduce(flat, dist.get_global_rank(group, owner), group=group)
        return flat.view_as(parameter)

    def events(self, ranks: dict[str, float], *, settled: bool) -> list[Event]:
        """Matrices that fell below `least`, or below `drop` times the highest rank they had; each once, until it is back.

        Args:
            settled: whether `after` has passed, and `drop` judges.
        """
        found, options = [], self.options
        for name, value in ranks.items():
            limit, why = options.least or 0.0, "monitors.effective_rank.least"
            if settled:
                self.highest[name] = max(value, self.highest.get(name, 0.0))
                if options.drop * self.highest[name] > limit:
                    limit = options.drop * self.highest[name]
                    why = f"{options.drop:g} of the highest, {self.highest[name]:.1f}"
            if value >= limit:
                self.low.discard(name)
            elif name not in self.low:
                self.low.add(name)
                words = (
                    f"effective rank of {name} fell to {value:.1f}, below {limit:.1f} ({why}); "
                    f"monitors.effective_rank.action is {options.action}"
                )
                found.append(Event(f"effective-rank/{name}", value, limit, options.action, words))
        return found


def evenly_spaced(total: int, count: int) -> list[int]:
    """Up to `count` of the indices 0 ... total - 1, the first and the last among them."""
    count = min(total, count)
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})


class StepMonitors(Part):
    """The monitors of a run. They look at a step's loss and gradients before the update, and at the weights after it."""

    name = "monitors"
    state_rewinds = True

    def __init__(self, options: Monitors, engine: Engine) -> None:
        given = {"loss": options.loss, "grad_norm": options.grad_norm}
        self.spikes = {name: SpikeMonitor(name, spike) for name, spike in given.items() if spike is not None}
        self.layers = LayerMonitor(options.layers, engine) if options.layers else None
        self.effective_ranks = EffectiveRankMonitor(options.effective_rank, engine) if options.effective_rank else None
        self._plan: StepPlan | None = None
        self._readings: dict[str, float] = {}

    @property
    def _step(self) -> int:
        return required(self._plan, "plan").step

    def _due(self, monitor: Due | None) -> Due | None:
        """The monitor, where it measures in this step."""
        return monitor if monitor is not None and self._step % monitor.options.interval == 0 else None

    def before(self, plan: StepPlan) -> None:
        self._plan, self._readings = plan, {}
        if due := self._due(self.effective_ranks):
            due.listen()

    def judge(self, facts: Facts) -> list[Event]:
        found = []
        for name, spike in self.spikes.items():
            found += spike.judge(getattr(facts, name))
        finite = math.isfinite(facts.loss) and math.isfinite(facts.grad_norm)
        if layers := self._due(self.layers):
            layers.note_gradients()
        if finite and (due := self._due(self.effective_ranks)):
            ranks = due.measure()
            self._readings |= {f"effective-rank/{name}": value for name, value in ranks.items()}
            found += due.events(ranks, settled=self._step > due.options.after)
        return found

    def after(self, step: Step, report: Report) -> None:
        """Report what was measured, and the events that no verdict depends on."""
        events = []
        if layers := self._due(self.layers):
            readings = layers.measure(updated=step.updated)
            self._readings |= readings
            events = layers.events(readings)
        report.numbers(step.plan.step, self._readings)
        for event in events:
            report.event(step.plan.step, step.consumed, event)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: list(spike.window) for name, spike in self.spikes.items()}
        if self.effective_ranks:
            state["highest"] = dict(self.effective_ranks.highest)
            state["low"] = sorted(self.effective_ranks.low)
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what state() returned; a monitor that was not on then begins anew."""
        for name, spike in self.spikes.items():
            spike.window = deque(state.get(name, []), maxlen=spike.options.window)
        if self.effective_ranks:
            self.effective_ranks.highest = dict(state.get("highest", {}))
            self.effective_ranks.low = set(state.get("low", []))
