"""Devices by name, with the dense peaks that MFU is measured against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A device's dense bf16 peak (vendor's data sheet, without sparsity) and its memory."""

    name: str
    bf16_flops: float
    hbm_bytes: int


GIB = 1 << 30

# The longest name that a device's own name contains wins.
DEVICES = (
    DeviceSpec(name="A100-SXM4-40GB", bf16_flops=312e12, hbm_bytes=40 * GIB),
    DeviceSpec(name="A100", bf16_flops=312e12, hbm_bytes=80 * GIB),
    DeviceSpec(name="A800", bf16_flops=312e12, hbm_bytes=80 * GIB),
    DeviceSpec(name="H100 PCIe", bf16_flops=756e12, hbm_bytes=80 * GIB),
    DeviceSpec(name="H100", bf16_flops=989e12, hbm_bytes=80 * GIB),
    DeviceSpec(name="H800", bf16_flops=989e12, hbm_bytes=80 * GIB),
    DeviceSpec(name="H200", bf16_flops=989e12, hbm_bytes=141 * GIB),
)


def find_device(name: str) -> DeviceSpec | None:
    """The spec of a device by the name its driver gives, or None where it is not known (a CPU, say)."""
    known = [spec for spec in DEVICES if spec.name in name]
    return max(known, key=lambda spec: len(spec.name)) if known else None
