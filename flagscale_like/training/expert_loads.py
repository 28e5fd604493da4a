"""The load of a mixture's experts: which of them the router uses, and an event where it leaves some without tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flagscale_like.arch import MixtureOfExperts
from flagscale_like.config import ExpertLoads
from flagscale_like.engine.engine import Engine
from flagscale_like.training.parts import Event, Part, Report, Step


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a layer's router did over some steps.

    Attributes:
        tokens: that went to each expert.
        entropy: of a token's scores, mean over the tokens, in nats; log(count) where a router does not prefer any.
        bias: of each expert; empty where there is none.
    """

    tokens: list[int]
    entropy: float
    bias: list[float]

    def shares(self) -> list[float]:
        """Of each expert, in shares of an even load: 1 where it has as many tokens as the mean."""
        total = sum(self.tokens)
        return [count * len(self.tokens) / total if total else 0.0 for count in self.tokens]

    def readings(self, layer: int) -> dict[str, Any]:
        """By the names of metrics.jsonl."""
        shares = self.shares()
        found: dict[str, Any] = {
            f"experts/tokens/layers.{layer}": self.tokens,
            f"experts/largest-load/layers.{layer}": max(shares),
            f"experts/smallest-load/layers.{layer}": min(shares),
            f"experts/entropy/layers.{layer}": self.entropy,
        }
        if self.bias:
            found[f"experts/bias-range/layers.{layer}"] = max(self.bias) - min(self.bias)
        return found


class ExpertMonitor(Part):
    """Adds up the routers' loads, which the engine has reduced, and reports them at every `interval` steps.

    config.ExpertLoads says what is an event.
    """

    name = "experts"
    state_rewinds = True

    def __init__(self, options: ExpertLoads, engine: Engine) -> None:
        self.options, self.engine, self.ctx = options, engine, engine.ctx
        arch = engine.spec.arch
        self.experts = arch.required_experts
        self.layers = [i for i, layer in enumerate(arch.layers) if isinstance(layer.feed_forward, MixtureOfExperts)]
        self.own = {router.layer_number - 1: router for router in engine.routers}  # of this pipeline stage
        self.dead: dict[int, list[int]] = {}
        self._restart()

    def _restart(self) -> None:
        size = (len(self.layers), self.experts.count + 1)
        self._sums = torch.zeros(size, dtype=torch.int64, device=self.ctx.platform.device)

    def after(self, step: Step, report: Report) -> None:
        for row, layer in enumerate(self.layers):
            if layer in self.own:
                self._sums[row] += self.own[layer].load
        if step.plan.step % self.options.interval:
            return
        loads = self._gather()
        self._restart()
        readings: dict[str, Any] = {}
        for layer, load in loads.items():
            readings |= load.readings(layer)
        largest = [max(load.shares()) for load in loads.values()]
        readings["experts/largest-load"] = max(largest)
        readings["experts/entropy"] = sum(load.entropy for load in loads.values()) / len(loads)
        events = self._events(loads)
        readings["experts/dead"] = sum(map(len, self.dead.values()))
        report.numbers(step.plan.step, readings)
        for event in events:
            report.event(step.plan.step, step.consumed, event)

    def _gather(self) -> dict[int, Load]:
        """The loads of all layers, by layer, on every rank; all ranks call it."""
        rows = self._of_all_stages(self._sums.double()).tolist()
        biases = torch.zeros(len(self.layers), self.experts.count, dtype=torch.float64, device=self._sums.device)
        if self.experts.bias:
            for number, layer in enumerate(self.layers):
                if layer in self.own:
                    biases[number] = self.own[layer].expert_bias
            biases = self._of_all_stages(biases)
        found = {}
        for layer, row, bias in zip(self.layers, rows, biases.tolist(), strict=True):
            *tokens, millinats = map(round, row)
            routed = max(1, sum(tokens) // self.experts.top_k)
            entropy = millinats / 1000 / routed
            found[layer] = Load(tokens=tokens, entropy=entropy, bias=bias if self.experts.bias else [])
        return found

    def _of_all_stages(self, rows: Tensor) -> Tensor:
        """[layers, ...] with the rows of this pipeline stage's layers -> with the rows of all stages."""
        dist.all_reduce(rows, group=self.ctx.groups.pp)
        return rows

    def _events(self, loads: Mapping[int, Load]) -> list[Event]:
        """Layers with experts that are below `dead` and were not before."""
        found, limit = [], self.options.dead
        for layer, load in loads.items():
            dead = [expert for expert, share in enumerate(load.shares()) if share < limit]
            new = set(dead) - set(self.dead.get(layer, []))
            self.dead[layer] = dead
            if new:
                words = (
                    f"layers.{layer}: {len(dead)} of {self.experts.count} experts got less than {limit:g} of an even share "
                    f"of the last {self.options.interval} steps' tokens ({_listed(dead)}); the largest load is "
                    f"{max(load.shares()):.1f} shares. Raise experts.coefficient or bias_rate, or lower the learning rate"
                )
                found.append(Event(f"experts/dead/layers.{layer}", len(dead), limit, "log", words))
        return found

    def state(self) -> dict[str, Any]:
        dead = {str(layer): experts for layer, experts in self.dead.items()}
        return {"dead": dead, "sums": self._of_all_stages(self._sums.clone()).tolist()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.dead = {int(layer): list(experts) for layer, experts in state["dead"].items()}
        own = [[layer in self.own] for layer in self.layers]
        sums = torch.tensor(state["sums"], dtype=torch.int64).view(self._sums.shape) * torch.tensor(own)
        self._sums.copy_(sums)


def _listed(experts: list[int], most: int = 8) -> str:
    """The first of some experts, in words."""
    more = f", ... {len(experts) - most} more" if len(experts) > most else ""
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts[:most]))}{more}"
