"""The roofline of the machine at hand, measured in a second or two: matrix products, memory, copies to the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from flagscale_like.cluster import DeviceSpec
from flagscale_like.runtime.platforms import Platform
from flagscale_like.runtime.precision import DTYPES


def _best_seconds(platform: Platform, work: Callable[[], object], budget_s: float) -> float:
    """The shortest of as many runs as fit the budget, three at least, after one to warm up."""
    work()
    platform.synchronize()
    best, began, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - began < budget_s:
        start = time.perf_counter()
        work()
        platform.synchronize()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


def gemm_flops(platform: Platform, precision: str, *, size: int | None = None, budget_s: float = 0.4) -> float:
    """FLOP/s that a large square product reaches in this process."""
    size = size or platform.gemm_size
    a = torch.randn(size, size, device=platform.device).to(DTYPES[precision])
    b = torch.randn(size, size, device=platform.device).to(DTYPES[precision])
    out = torch.empty_like(a)
    return 2.0 * size**3 / _best_seconds(platform, lambda: torch.mm(a, b, out=out), budget_s)


def measure_device(platform: Platform, precision: str, *, processes: int = 1) -> DeviceSpec:
    """A DeviceSpec of what this process can reach; `processes` of them share a CPU's cores and memory.

    A known GPU keeps its data sheet's peak, links and network, and gets measured bandwidths of memory and host copies. Of
    another GPU, and of a CPU, the peak is the measured rate of matrix products.
    """
    numel = platform.copy_bytes
    source = torch.zeros(numel, dtype=torch.uint8, device=platform.device)
    target = torch.empty_like(source)
    copied = 2 * numel / _best_seconds(platform, lambda: target.copy_(source), 0.2) / 1e9
    if not platform.ranks_share_device:
        host = platform.host_buffer(numel, torch.uint8)
        host_rate = numel / _best_seconds(platform, lambda: host.copy_(source, non_blocking=True), 0.2) / 1e9
        known = platform.data_sheet()
        return DeviceSpec(
            name=platform.describe(),
            bf16_flops=known.bf16_flops if known else gemm_flops(platform, precision),
            hbm_bytes=platform.total_memory_bytes(),
            hbm_gb_per_s=copied,
            link_gb_per_s=known.link_gb_per_s if known else host_rate,
            network_gb_per_s=known.network_gb_per_s if known else host_rate,
            host_gb_per_s=host_rate,
            efficiency=known.efficiency if known else "unknown",
        )
    link = copied / 4 / processes  # gloo copies in and out of shared sockets
    return DeviceSpec(
        name=f"this machine ({torch.get_num_threads()} threads)",
        bf16_flops=gemm_flops(platform, precision) / processes,
        hbm_bytes=platform.total_memory_bytes() // processes,
        hbm_gb_per_s=copied / processes,
        link_gb_per_s=link,
        network_gb_per_s=link,
        host_gb_per_s=copied / 2 / processes,
        efficiency="cpu",
    )
