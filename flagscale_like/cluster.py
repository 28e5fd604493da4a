"""Devices by name, with the dense peaks that MFU is measured against, and the clusters they are joined into."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flagscale_like.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A device's roofline: its vendor's data sheet (dense, without sparsity), or what was measured.

    Attributes:
        name: a part of the name its driver gives.
        bf16_flops: dense matrix-product peak, FLOP/s.
        hbm_bytes: memory.
        hbm_gb_per_s: memory bandwidth, 1e9 bytes/s.
        link_gb_per_s: to the other devices of its node, one direction.
        host_gb_per_s: to pinned host memory, one direction, as copies reach it and not as the bus is named.
    """

    name: str
    bf16_flops: float
    hbm_bytes: int
    hbm_gb_per_s: float
    link_gb_per_s: float
    host_gb_per_s: float


# The longest name that a device's own name contains wins. Links: NVLink, half of the figure for both directions; A800 and
# H800 are A100 and H100 with NVLink cut to 400 GB/s. Host: PCIe 4 or 5 x16, of which large copies reach about 80 %.
DEVICES = (
    DeviceSpec(
        name="A100-SXM4-40GB",
        bf16_flops=312e12,
        hbm_bytes=40 * GIB,
        hbm_gb_per_s=1555,
        link_gb_per_s=300,
        host_gb_per_s=25,
    ),
    DeviceSpec(
        name="A100", bf16_flops=312e12, hbm_bytes=80 * GIB, hbm_gb_per_s=2039, link_gb_per_s=300, host_gb_per_s=25
    ),
    DeviceSpec(
        name="A800", bf16_flops=312e12, hbm_bytes=80 * GIB, hbm_gb_per_s=2039, link_gb_per_s=200, host_gb_per_s=25
    ),
    DeviceSpec(
        name="H100 PCIe", bf16_flops=756e12, hbm_bytes=80 * GIB, hbm_gb_per_s=2000, link_gb_per_s=50, host_gb_per_s=50
    ),
    DeviceSpec(
        name="H100", bf16_flops=989e12, hbm_bytes=80 * GIB, hbm_gb_per_s=3350, link_gb_per_s=450, host_gb_per_s=50
    ),
    DeviceSpec(
        name="H800", bf16_flops=989e12, hbm_bytes=80 * GIB, hbm_gb_per_s=3350, link_gb_per_s=200, host_gb_per_s=50
    ),
    DeviceSpec(
        name="H200", bf16_flops=989e12, hbm_bytes=141 * GIB, hbm_gb_per_s=4800, link_gb_per_s=450, host_gb_per_s=50
    ),
)

# What a cluster is written with, and the device's name above.
SHORT_NAMES = {
    "A100-40": "A100-SXM4-40GB",
    "A100-80": "A100",
    "A100": "A100",
    "A800": "A800",
    "H100-PCIe": "H100 PCIe",
    "H100": "H100",
    "H800": "H800",
    "H200": "H200",
}

# One network port a device: InfiniBand HDR beside Ampere, NDR beside Hopper.
NETWORK_GB_PER_S = {"A": 25.0, "H": 50.0}


def find_device(name: str) -> DeviceSpec | None:
    """The spec of a device by the name its driver gives, or None where it is not known (a CPU, say)."""
    known = [spec for spec in DEVICES if spec.name in name]
    return max(known, key=lambda spec: len(spec.name)) if known else None


def device_by_short_name(name: str) -> DeviceSpec:
    """The spec of a device as a cluster is written: A100-40, A800, H100, with or without a trailing G or GB.

    Raises:
        ConfigError: the name is not known.
    """
    wanted = re.sub(r"(?<=\d)GB?$", "", name, flags=re.IGNORECASE).lower()
    for short, full in SHORT_NAMES.items():
        if short.lower() == wanted:
            return next(spec for spec in DEVICES if spec.name == full)
    close = difflib.get_close_matches(name.upper(), SHORT_NAMES, n=1, cutoff=0.5)
    hint = f", did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"device {name!r} is not known{hint} (known: {', '.join(SHORT_NAMES)}, and `this`, measured here)"
    )


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
        network_gb_per_s: a device's share of the network; 25 (Ampere) or 50 (Hopper) where it is left out.
        this_device: what the name `this` stands for: the machine at hand, as it was measured.

    Raises:
        ConfigError: the text or the device is not understood.
    """
    parts = re.fullmatch(r"(?:(\d+)x)?(\d+)x(.+)", text.strip())
    if parts is None or int(parts[1] or 1) == 0 or int(parts[2]) == 0:
        raise ConfigError(f"cluster {text!r}: write it as NODESxDEVICESxNAME, for example 64x8xH100 or 1x8xA100-80")
    measured = this_device if parts[3].lower() == "this" else None
    device = measured or device_by_short_name(parts[3])
    network = network_gb_per_s or NETWORK_GB_PER_S.get(device.name[0], device.link_gb_per_s)
    return ClusterSpec(
        nodes=int(parts[1] or 1), devices_per_node=int(parts[2]), device=device, network_gb_per_s=network
    )


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Where a job runs: host names, and the device slots each offers."""

    names: tuple[str, ...]
    slots: tuple[int, ...]

    @property
    def slots_per_node(self) -> int:
        """Slots of every node.

        Raises:
            ConfigError: they differ.
        """
        if len(set(self.slots)) != 1:
            few, many = min(self.slots), max(self.slots)
            raise ConfigError(
                f"nodes offer {few} to {many} slots ({self.names[self.slots.index(few)]}: {few}, "
                f"{self.names[self.slots.index(many)]}: {many}): every node must offer the same"
            )
        return self.slots[0]


def read_hostfile(path: Path) -> Hosts:
    """Read a hostfile as MPI and DeepSpeed write it: a line a host, `name slots=8`; `#` begins a comment.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is not understood.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile {path}: cannot be read: {error}") from None
    names, slots = [], []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        parts = re.fullmatch(r"(\S+)(?:\s+slots\s*=\s*(\d+))?", text)
        if parts is None or parts[2] == "0":
            raise ConfigError(f"hostfile {path}:{number}: {text!r}: write it as `name slots=8`")
        if parts[1] in names:
            raise ConfigError(f"hostfile {path}:{number}: host {parts[1]} is listed twice")
        names.append(parts[1])
        slots.append(int(parts[2] or 1))
    if not names:
        raise ConfigError(f"hostfile {path}: names no host")
    return Hosts(names=tuple(names), slots=tuple(slots))


def hosts_from_slurm(environment: Mapping[str, str] = os.environ) -> Hosts | None:
    """The nodes of the Slurm job this process is in, or None outside one. Slots are tasks, or GPUs, a node.

    Raises:
        ConfigError: the node list or the counts are not understood.
    """
    nodes = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    if not nodes:
        return None
    names = expand_nodelist(nodes)
    gpus = environment.get("SLURM_GPUS_ON_NODE")
    tasks = environment.get("SLURM_TASKS_PER_NODE") or environment.get("SLURM_NTASKS_PER_NODE") or "1"
    slots: list[int] = []
    for part in tasks.split(","):  # "8(x3),4": three nodes with 8 tasks, one with 4
        counted = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if counted is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE {tasks!r} is not understood")
        slots += [int(counted[1])] * int(counted[2] or 1)
    if len(slots) == 1:
        slots *= len(names)
    if gpus is not None and gpus.isdigit() and set(slots) == {1}:
        slots = [int(gpus)] * len(names)  # one torchrun a node: its ranks are the GPUs
    if len(slots) != len(names):
        raise ConfigError(f"Slurm names {len(names)} nodes ({nodes}) and task counts for {len(slots)} ({tasks})")
    return Hosts(names=tuple(names), slots=tuple(slots))


def expand_nodelist(text: str) -> list[str]:
    """Slurm's compressed host list, written out: `gpu[01-03,7],login` -> gpu01, gpu02, gpu03, gpu7, login.

    Raises:
        ConfigError: brackets do not match, or a range runs backwards.
    """
    names: list[str] = []
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            choices = [literal] if literal else [name for part in ranges.split(",") for name in _range(part, text)]
            expanded = [head + tail for head in expanded for tail in choices]
        names += expanded
    if not names or text.count("[") != text.count("]"):
        raise ConfigError(f"Slurm node list {text!r} is not understood")
    return names


def _range(part: str, whole: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
        raise ConfigError(f"Slurm node list {whole!r}: range {part!r} is not understood")
    return [str(n).zfill(len(bounds[1])) for n in range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)]


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
