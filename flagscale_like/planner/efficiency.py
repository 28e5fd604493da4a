"""What products, memory traffic and collectives take: a roofline with a few measured or fitted efficiencies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flagscale_like.cluster import ClusterSpec, DeviceSpec, EfficiencyKind


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The share of each roofline that kernels and collectives reach.

    Attributes:
        gemm: of the dense peak, by a very large product.
        gemm_k: inner dimension at which a product reaches half of that (each tile has a prologue and an epilogue).
        gemm_mn: output elements at which a product reaches half of that (its tiles do not fill the device).
        attention: of the dense peak, by a fused causal attention that skips the upper triangle.
        memory: of the memory bandwidth, by elementwise operators.
        link, network: of a link's bandwidth, by large collectives inside a node and between nodes.
        overlap: share of a backward matrix product that communication can hide behind.
        latency_s: of one step of a collective's ring.
        layer_overhead_s: of a layer's kernel launches and host work, one pass.
    """

    gemm: float = 0.80
    gemm_k: float = 64.0
    gemm_mn: float = 1.6e6
    attention: float = 0.65
    memory: float = 0.85
    link: float = 0.5
    network: float = 0.85
    overlap: float = 0.9
    latency_s: float = 3e-6
    layer_overhead_s: float = 180e-6


# AMPERE is fitted to published rows by benchmarks/planner/fit.py. HOPPER differs in `gemm` and in the launch overhead, set by
# hand with the rows of GPT-3 175B on H100 (Megatron-LM's README) in view. docs/planner.md compares both with their rows.
AMPERE = Efficiency()
HOPPER = Efficiency(gemm=0.70, layer_overhead_s=90e-6)
# Where the peak is the measured rate of a large matrix product: a CPU, and a GPU that is not known.
UNKNOWN = replace(AMPERE, gemm=1.0)
MEASURED = Efficiency(gemm=1.0, gemm_k=32.0, gemm_mn=2e4, attention=0.4, link=1.0, network=1.0, overlap=0.0)


# fp32 products without tensor cores, of the bf16 peak: 19.5 of 312 TFLOP/s on an A100, 67 of 989 on an H100.
FP32_PRODUCTS = 1 / 16

EFFICIENCIES: dict[EfficiencyKind, Efficiency] = {
    "ampere": AMPERE,
    "ada": AMPERE,  # no row is published that its own could be chosen by: those of the generation before it
    "hopper": HOPPER,
    "blackwell": HOPPER,  # likewise
    "cpu": MEASURED,
    "unknown": UNKNOWN,
}


def gemm_seconds(  # many parameters: the sides of the product are three of them
    m: float,
    n: float,
    k: float,
    device: DeviceSpec,
    eff: Efficiency,
    *,
    dtype_bytes: int = 2,
    groups: float = 1,
    rate: float = 1.0,
) -> float:
    """One [m, k] x [k, n] product: compute or memory bound.

    Args:
        groups: as many of them at once, in one kernel.
        rate: of the peak that the data type has.
    """
    reached = rate * eff.gemm * k / (k + eff.gemm_k) * (groups * m * n) / (groups * m * n + eff.gemm_mn)
    traffic = groups * (m * k + k * n + m * n) * dtype_bytes
    return max(2.0 * groups * m * n * k / (device.bf16_flops * reached), move_seconds(traffic, device, eff))


def move_seconds(bytes_: float, device: DeviceSpec, eff: Efficiency) -> float:
    """Bytes that elementwise operators read and write."""
    return bytes_ / (device.hbm_gb_per_s * 1e9 * eff.memory)


def ring_seconds(bytes_: float, ranks: int, cluster: ClusterSpec, eff: Efficiency, *, stride: int = 1) -> float:
    """One all-gather or reduce-scatter of `bytes_` (the whole tensor) over a ring; an all-reduce is two.

    Args:
        stride: ranks of the group lie so far apart.
    """
    near = min(ranks, max(1, cluster.devices_per_node // stride))
    return group_seconds(bytes_, ranks, near, cluster, eff) if ranks > 1 and bytes_ else 0.0


def group_seconds(bytes_: float, ranks: int, near: int, cluster: ClusterSpec, eff: Efficiency) -> float:
    """The same of a group of which `near` ranks are in each node.

    NCCL lays as many rings as there are ports: each of the `near` ranks sends its share to another node through its own port,
    beside what goes from rank to rank inside the node (NCCL's user guide, NCCL_CROSS_NIC: "rings/trees to use different
    NICs").
    """
    passed = bytes_ * (ranks - 1) / ranks
    inside = passed / (cluster.device.link_gb_per_s * 1e9 * eff.link) if near > 1 else 0.0
    outside = passed / (near * cluster.network_gb_per_s * 1e9 * eff.network) if near < ranks else 0.0
    return max(inside, outside) + (ranks - 1) * eff.latency_s


def all_to_all_seconds(bytes_: float, ranks: int, cluster: ClusterSpec, eff: Efficiency) -> float:
    """One exchange in which each of `ranks` neighbours sends, and gets, `bytes_`, an equal part for each rank.

    What goes to other nodes takes the network, beside what stays inside the node.
    """
    if ranks == 1:
        return 0.0
    near = min(ranks, cluster.devices_per_node)
    inside = bytes_ * (near - 1) / ranks / (cluster.device.link_gb_per_s * 1e9 * eff.link)
    outside = bytes_ * (ranks - near) / ranks / (cluster.network_gb_per_s * 1e9 * eff.network)
    return max(inside, outside) + (ranks - 1) * eff.latency_s
