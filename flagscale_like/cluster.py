"""Devices by name, with the dense peaks that MFU is measured against, and clusters of them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal

from flagscale_like.errors import ConfigError

GIB = 1 << 30


EfficiencyKind = Literal["ampere", "ada", "hopper", "blackwell", "cpu", "unknown"]


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A device's roofline: its vendor's data sheet (dense, without sparsity), or what was measured.

    Attributes:
        name: what a cluster is written with; of a measured device what its driver calls it.
        drivers: names that its driver gives, whole.
        bf16_flops: dense matrix-product peak, FLOP/s.
        hbm_bytes: memory.
        hbm_gb_per_s: memory bandwidth, 1e9 bytes/s.
        link_gb_per_s: to the other devices of its node, one direction.
        network_gb_per_s: to other nodes, one direction.
        host_gb_per_s: to pinned host memory, one direction, as copies reach it and not as the bus is named.
        efficiency: the device's kind, which says what efficiencies the planner takes; `unknown` is a GPU that is not in
            DEVICES.
    """

    name: str
    drivers: tuple[str, ...] = ()
    bf16_flops: float
    hbm_bytes: int
    hbm_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    host_gb_per_s: float
    efficiency: EfficiencyKind

    @property
    def is_gpu(self) -> bool:
        return self.efficiency != "cpu"

    @property
    def caveat(self) -> str | None:
        """What is assumed of a device that is not known, in one line; None of others."""
        if self.efficiency != "unknown":
            return None
        return (
            f"{self.name} is not a known device: its matrix products, memory and host copies are measured here; links and "
            f"network are assumed to be as fast as host copies, and all else as efficient as on an A100"
        )


def _ampere(name: str, *drivers: str, gib: int, hbm: float, link: float) -> DeviceSpec:
    """A100 and A800: PCIe 4 to the host, an InfiniBand HDR port a device."""
    return DeviceSpec(
        name=name,
        drivers=drivers,
        bf16_flops=312e12,
        hbm_bytes=gib * GIB,
        hbm_gb_per_s=hbm,
        link_gb_per_s=link,
        network_gb_per_s=25,
        host_gb_per_s=25,
        efficiency="ampere",
    )


def _hopper(name: str, *drivers: str, gib: int, hbm: float, link: float, flops: float = 989e12) -> DeviceSpec:
    """H100, H200 and H800: PCIe 5 to the host, an InfiniBand NDR port a device."""
    return DeviceSpec(
        name=name,
        drivers=drivers,
        bf16_flops=flops,
        hbm_bytes=gib * GIB,
        hbm_gb_per_s=hbm,
        link_gb_per_s=link,
        network_gb_per_s=50,
        host_gb_per_s=50,
        efficiency="hopper",
    )


def _ada(name: str, *drivers: str, gib: int, hbm: float, flops: float) -> DeviceSpec:
    """Cards without NVLink: they reach each other over PCIe 4."""
    return DeviceSpec(
        name=name,
        drivers=drivers,
        bf16_flops=flops,
        hbm_bytes=gib * GIB,
        hbm_gb_per_s=hbm,
        link_gb_per_s=25,
        network_gb_per_s=25,
        host_gb_per_s=25,
        efficiency="ada",
    )


# Links: NVLink, half of the figure for both directions; A800 and H800 are A100 and H100 with NVLink cut to 400 GB/s. PCIe
# cards reach each other over the bus: a bridge joins two of them alone. Host and bus: PCIe 4 or 5 x16, of which large copies
# reach about 80 %.
DEVICES = (
    _ampere("A100-40", "NVIDIA A100-SXM4-40GB", gib=40, hbm=1555, link=300),
    _ampere("A100-80", "NVIDIA A100-SXM4-80GB", gib=80, hbm=2039, link=300),
    _ampere("A100-PCIe-40", "NVIDIA A100-PCIE-40GB", gib=40, hbm=1555, link=25),
    _ampere("A100-PCIe-80", "NVIDIA A100 80GB PCIe", gib=80, hbm=1935, link=25),
    _ampere("A800", "NVIDIA A800-SXM4-80GB", gib=80, hbm=2039, link=200),
    _ampere("A800-PCIe", "NVIDIA A800 80GB PCIe", gib=80, hbm=1935, link=25),
    _hopper("H100", "NVIDIA H100 80GB HBM3", gib=80, hbm=3350, link=450),
    _hopper("H100-PCIe", "NVIDIA H100 PCIe", gib=80, hbm=2000, link=50, flops=756e12),
    _hopper("H100-NVL", "NVIDIA H100 NVL", gib=94, hbm=3900, link=50, flops=835.5e12),
    _hopper("H800", "NVIDIA H800", gib=80, hbm=3350, link=200),
    _hopper("H800-PCIe", "NVIDIA H800 PCIe", gib=80, hbm=2000, link=50, flops=756e12),
    _hopper("H20", "NVIDIA H20", gib=96, hbm=4000, link=450, flops=148e12),
    _hopper("H200", "NVIDIA H200", gib=141, hbm=4800, link=450),
    _hopper("H200-NVL", "NVIDIA H200 NVL", gib=141, hbm=4800, link=50, flops=835.5e12),
    _ada("L20", "NVIDIA L20", gib=48, hbm=864, flops=119.5e12),
    _ada("L40S", "NVIDIA L40S", gib=48, hbm=864, flops=362e12),
    _ada("RTX-4090", "NVIDIA GeForce RTX 4090", gib=24, hbm=1008, flops=165.2e12),
    replace(_hopper("B200", "NVIDIA B200", gib=180, hbm=7700, link=900, flops=2250e12), efficiency="blackwell"),
)
ALIASES = {"A100": "A100-80"}


def find_device(driver_name: str) -> DeviceSpec | None:
    """The spec of a device by the whole name its driver gives, or None where it is not known.

    Older drivers leave the vendor's name out.
    """
    full = driver_name if driver_name.startswith("NVIDIA ") else f"NVIDIA {driver_name}"
    return next((spec for spec in DEVICES if full in spec.drivers), None)


def device_by_name(name: str) -> DeviceSpec:
    """The spec of a device as a cluster is written: A100-40, A800, H100, with or without a trailing G or GB; or by the whole
    name that its driver gives, as nvidia-smi prints it.

    Raises:
        ConfigError: the name is not known.
    """
    wanted = re.sub(r"(?<=\d)GB?$", "", name, flags=re.IGNORECASE).lower()
    known = {spec.name: spec for spec in DEVICES}
    known |= {alias: known[of] for alias, of in ALIASES.items()}
    for written, spec in known.items():
        if written.lower() == wanted:
            return spec
    if (spec := find_device(name.strip())) is not None:
        return spec
    close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.5)
    hint = f", did you mean {close[0]}?" if close else ""
    raise ConfigError(f"device {name!r} is not known{hint} (known: {', '.join(known)}, and `this`, measured here)")


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Nodes of equal devices.

    Attributes:
        network_gb_per_s: a device's share of its node's network, one direction.
    """

    nodes: int
    devices_per_node: int
    device: DeviceSpec
    network_gb_per_s: float

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def link_gb_per_s(self, group: int, stride: int = 1) -> float:
        """Bandwidth a device has in a ring over `group` ranks that lie `stride` apart: NVLink inside a node, else network."""
        return self.device.link_gb_per_s if group * stride <= self.devices_per_node else self.network_gb_per_s

    def describe(self) -> str:
        return f"{self.nodes}x{self.devices_per_node}x{self.device.name}"


def parse_cluster(
    text: str, *, network_gb_per_s: float | None = None, this_device: DeviceSpec | None = None
) -> ClusterSpec:
    """A cluster from `NODESxDEVICESxNAME` (64x8xH100), or `DEVICESxNAME` for one node.

    Args:
        network_gb_per_s: a device's share of the network; the device's own figure where it is left out.
        this_device: what the name `this` stands for: the machine at hand, as it was measured.

    Raises:
        ConfigError: the text or the device is not understood.
    """
    parts = re.fullmatch(r"(?:(\d+)x)?(\d+)x(.+)", text.strip())
    if parts is None or int(parts[1] or 1) == 0 or int(parts[2]) == 0:
        raise ConfigError(f"cluster {text!r}: write it as NODESxDEVICESxNAME, for example 64x8xH100 or 1x8xA100-80")
    measured = this_device if parts[3].lower() == "this" else None
    device = measured or device_by_name(parts[3])
    network = network_gb_per_s or device.network_gb_per_s
    return ClusterSpec(
        nodes=int(parts[1] or 1), devices_per_node=int(parts[2]), device=device, network_gb_per_s=network
    )


def with_devices(cluster: ClusterSpec, devices: int) -> ClusterSpec:
    """The same kind of cluster with another number of devices: whole nodes, or a part of one.

    Raises:
        ConfigError: devices is neither below one node's nor a multiple of it.
    """
    if devices <= cluster.devices_per_node:
        return replace(cluster, nodes=1, devices_per_node=devices)
    if devices % cluster.devices_per_node:
        raise ConfigError(f"devices ({devices}) must be a multiple of devices a node ({cluster.devices_per_node})")
    return replace(cluster, nodes=devices // cluster.devices_per_node)
