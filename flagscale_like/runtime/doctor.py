"""What is installed here, and what each missing piece costs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from flagscale_like.errors import PlatformError
from flagscale_like.runtime import megatron_versions

if TYPE_CHECKING:
    from flagscale_like.runtime.platforms import Platform, Surveyed


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status` is ok, missing (optional) or broken (nothing trains without it)."""

    name: str
    status: str
    detail: str


OPTIONAL = (
    (
        "apex",
        "fused_weight_gradient_mlp_cuda",
        "on CUDA, weight gradients are added to the fp32 gradients in a second pass",
    ),
    ("transformer-engine", "transformer_engine", "the optimizer is torch's Adam"),
    ("compressed-tensors", "compressed_tensors", "transformers does not load INT4 and INT8 exports ([quantized])"),
    ("lm-eval", "lm_eval", "evaluate has no --tasks ([eval])"),
)


def examine() -> list[Finding]:
    """Look at Python, the packages, the devices and the machine. Importing torch takes a second or two."""
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for name in (
        "torch",
        "megatron-core",
        "triton",
        "transformers",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "pyarrow",
        "xxhash",
    ):
        findings.append(_package(name))
    for name, module, cost in OPTIONAL:
        found = importlib.util.find_spec(module) is not None
        findings.append(
            Finding(name, "ok" if found else "missing", "in use" if found else f"optional; without it: {cost}")
        )
    findings += _devices()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings.append(Finding("host", "ok", f"{os.cpu_count()} CPUs, {memory / 2**30:.0f} GiB memory"))
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    if shared < 1 << 30:
        cost = "data.num_workers > 0 and NCCL within a node pass data through it; give containers --ipc=host"
        findings.append(Finding("/dev/shm", "missing", f"{shared / 2**20:.0f} MiB: {cost}"))
    return findings


def _package(name: str) -> Finding:
    try:
        if name == "megatron-core":
            return Finding(name, "ok", megatron_versions.note())
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        if name == "triton":
            return Finding(
                name, "missing", "optional; without it: torch's operators take the place of the Triton kernels"
            )
        return Finding(name, "broken", "required: pip install -e .")


def _devices() -> list[Finding]:
    """Every platform, and why this machine has it not; then what the one that is chosen is given."""
    try:
        import torch.distributed as dist
        from torch.cuda import nccl

        platforms = importlib.import_module("flagscale_like.runtime.platforms")
    except ImportError as error:
        return [Finding("devices", "broken", f"torch cannot be imported: {error}")]
    found = []
    try:
        found += [_platform(each) for each in platforms.survey()]
        chosen = platforms.prepared(platforms.choose())
    except PlatformError as error:
        return [*found, Finding("devices", "broken", str(error))]
    backends = [name for name in dist.Backend.backend_list if name != "undefined" and dist.is_backend_available(name)]
    if "nccl" in backends:
        backends[backends.index("nccl")] += " " + ".".join(map(str, nccl.version()))
    found.append(Finding("backends", "ok", ", ".join(backends)))
    reason = chosen.missing_backend()
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset")
    return [
        *found,
        Finding("chosen", "broken" if reason else "ok", f"{chosen.name}, {reason or f'with {chosen.backend}'}"),
        Finding("patches", "ok", _shim(chosen)),
        Finding("CUDA_DEVICE_MAX_CONNECTIONS", "ok", f"{connections} (tensor-parallel overlap on CUDA needs 1)"),
    ]


def _platform(each: Surveyed) -> Finding:
    name = f"platform {each.name}"
    if each.platform is None:
        return Finding(name, "broken", each.reason or "no reason given")
    if each.reason is not None:
        return Finding(name, "missing", each.reason)
    if each.platform.claims:
        told = "; ".join(f"{index}: {_device(each.platform, index)}" for index in range(each.devices))
    elif each.platform.ranks_share_device:
        told = "the host"
    else:
        told = f"not told from cuda here: FLAGSCALE_LIKE_DEVICE={each.name} chooses it"
    notes = [] if each.origin in ("built in", "table") else [each.origin]
    if each.platform.not_run:
        notes.append("written from the vendor's documents, not run")
    return Finding(name, "ok", f"{told} ({'; '.join(notes)})" if notes else told)


def _device(platform: type[Platform], index: int) -> str:
    device = platform(index)
    try:
        return f"{device.describe()}, {device.total_memory_bytes() / 2**30:.0f} GiB"
    except (AttributeError, RuntimeError) as error:  # of a vendor's namespace; the other lines are still worth reading
        return f"{device.device} ({str(error).partition(chr(10))[0]})"


def _shim(platform: type[Platform]) -> str:
    """What is done to megatron-core for a platform."""
    if not platform.needs_shim:
        return "none: megatron-core is as released"
    fusions = "" if platform.compiles else "; its torch.compile fusions are plain functions"
    return f"megatron-core is patched to run on {platform.torch_type} (runtime/device_shim.py){fusions}"
