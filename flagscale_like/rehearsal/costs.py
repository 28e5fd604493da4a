"""Seconds of what a record lists: a roofline for each kernel, latency and bandwidth for each collective and message."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flagscale_like.cluster import ClusterSpec
from flagscale_like.planner.efficiency import EFFICIENCIES, FP32_PRODUCTS, Efficiency, group_seconds
from flagscale_like.rehearsal.record import Event

# Operators of a dense layer's forward pass that are no views: what the planner's launch overhead of a layer is shared out to.
KERNELS_OF_A_LAYER = 26
ATTENTION = ("flash_attention", "piecewise_attention", "scaled_dot_product")
# What adds a weight's gradient up where no product does.
ADDS_UP, GRADIENTS = "aten::add_", "megatron/core/distributed/distributed_data_parallel.py"
MESSAGE = "message"  # what Costs.calls names sends and receives
# Passes over the ring: of the whole tensor, relative to an all-gather.
PASSES = {"all_reduce": 2}


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a cluster's devices and links take for the events of a record.

    Attributes:
        kernel_s: of each kernel beside its roofline: launch and host work.
        crowd: kernels take so many times longer, because ranks share a host's cores.
        calls: of ranks that share cores, (operation, ranks of the group) -> seconds of calls by their bytes, [(bytes, s)] in
            order, between which lies a line; {} of devices of their own. A call is work of the rank that asks for it: nothing
            runs beside it, and a rank that waits for others sleeps.
        fused_gradients: the products of the weights' gradients add them up, as with apex, whatever was recorded: without it a
            kernel of its own adds each up, which reads 6 bytes an element and writes 4.
        fp32: of the bf16 peak that products of fp32 reach; 1 where the peak is fp32's own.
    """

    cluster: ClusterSpec
    eff: Efficiency
    kernel_s: float
    crowd: float = 1.0
    calls: Mapping[tuple[str, int], Sequence[tuple[float, float]]] = field(default_factory=dict)
    fused_gradients: bool = False
    fp32: float = FP32_PRODUCTS

    @classmethod
    def of(cls, cluster: ClusterSpec, eff: Efficiency | None = None) -> Costs:
        """Those of a cluster, with the planner's constants for its kind of device."""
        eff = eff or EFFICIENCIES[cluster.device.efficiency]
        own = 1.0 if cluster.device.efficiency == "cpu" else FP32_PRODUCTS
        return cls(cluster=cluster, eff=eff, kernel_s=eff.layer_overhead_s / KERNELS_OF_A_LAYER, fp32=own)

    def compute(self, event: Event) -> float:
        """Seconds of a kernel: the longer of its products and its memory traffic, and its launch."""
        device, eff = self.cluster.device, self.eff
        if self.fused_gradients and event.op == ADDS_UP and event.where.startswith(GRADIENTS) and len(event.shape) > 1:
            return 0.0
        moved = event.bytes / (device.hbm_gb_per_s * 1e9 * eff.memory)
        products = event.flops / (device.bf16_flops * self._reached(event)) if event.flops else 0.0
        return self.crowd * (max(moved, products) + self.kernel_s)

    def call(self, event: Event) -> float:
        """Seconds that a collective or a message takes of the rank that asks for it, before the others take part."""
        if not self.calls or len(event.group) < 2:
            return 0.0
        ranks = 2 if event.kind != "collective" else len(event.group)
        name = MESSAGE if event.kind != "collective" else event.op
        points = self.calls.get((name, ranks)) or self.calls["all_reduce", ranks]
        place = min(max(1, bisect_left(points, (event.bytes,))), len(points) - 1)
        (low, fast), (high, slow) = points[place - 1], points[place]
        return fast + max(0.0, slow - fast) * max(0.0, event.bytes - low) / (high - low)

    def _reached(self, event: Event) -> float:
        """The share of the peak that a product or an attention reaches."""
        eff = self.eff
        if any(name in event.op for name in ATTENTION):
            return eff.attention
        outputs = math.prod(event.shape)
        inner = event.flops / (2 * outputs) if outputs else 1.0
        wide = event.dtype == "float32" and not event.op.endswith(
            ".dtype"
        )  # else products of 16 bits, added up in fp32
        rate = self.fp32 if wide else 1.0
        return rate * eff.gemm * inner / (inner + eff.gemm_k) * outputs / (outputs + eff.gemm_mn)

    def copy(self, event: Event) -> float:
        """Seconds of a copy between host and device."""
        return event.bytes / (self.cluster.device.host_gb_per_s * 1e9)

    def meeting(self, event: Event, rank: int) -> float:
        """Seconds of a collective or a message once all take part.

        Args:
            rank: whose event it is.
        """
        if self.calls:
            return 0.0
        if event.kind != "collective":
            peer = event.peer if event.peer is not None else rank
            return self._message(rank, peer, event.bytes) + 4 * self.eff.latency_s
        ranks = len(event.group)
        if ranks < 2:
            return 0.0
        steps = (ranks - 1) * PASSES.get(event.op, 1)
        if event.op == "barrier":
            return steps * self.eff.latency_s
        if event.op.startswith("all_to_all"):
            return self._exchange(event) + steps * self.eff.latency_s
        whole = event.bytes * ranks if event.op.startswith("all_gather") else event.bytes
        return PASSES.get(event.op, 1) * group_seconds(whole, ranks, self._near(event.group), self.cluster, self.eff)

    def crosses(self, event: Event, rank: int) -> bool:
        """Whether a transfer goes to another node, over the ranks' ports."""
        ranks = event.group if event.kind == "collective" else (rank, rank if event.peer is None else event.peer)
        return not self.calls and len({self._node(one) for one in ranks}) > 1

    def _node(self, rank: int) -> int:
        return rank // self.cluster.devices_per_node

    def _near(self, group: Sequence[int]) -> int:
        """The most ranks of a group that are in one node."""
        return max(Counter(map(self._node, group)).values())

    def _message(self, rank: int, peer: int, nbytes: int) -> float:
        device, eff = self.cluster.device, self.eff
        if self._node(rank) == self._node(peer):
            return nbytes / (device.link_gb_per_s * 1e9 * eff.link)
        return nbytes / (self.cluster.network_gb_per_s * 1e9 * eff.network)

    def _exchange(self, event: Event) -> float:
        """Of an all-to-all: what goes to other nodes takes the network, beside what stays inside the node."""
        ranks = len(event.group)
        near = self._near(event.group)
        inside = event.bytes * (near - 1) / ranks / (self.cluster.device.link_gb_per_s * 1e9 * self.eff.link)
        outside = event.bytes * (ranks - near) / ranks / (self.cluster.network_gb_per_s * 1e9 * self.eff.network)
        return max(inside, outside)


def with_constants(costs: Costs, **changes: Any) -> Costs:
    """The same costs with other constants of the device's efficiency, or of its own."""
    own = {
        name: value
        for name, value in changes.items()
        if name in ("kernel_s", "crowd", "calls", "fused_gradients", "fp32")
    }
    eff = replace(costs.eff, **{name: value for name, value in changes.items() if name not in own})
    return replace(costs, eff=eff, **own)
