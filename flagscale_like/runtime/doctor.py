"""What is installed here, and what each missing piece costs."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status` is ok, missing (optional) or broken (nothing trains without it)."""

    name: str
    status: str
    detail: str


OPTIONAL = (
    ("apex", "fused_weight_gradient_mlp_cuda", "no GEMM that accumulates into fp32 gradients: one more pass over them"),
    ("transformer-engine", "transformer_engine", "no FP8, no overlap of TP communication with GEMMs; Adam is torch's"),
    ("flash-attn", "flash_attn", "nothing: attention is ours or torch's"),
)


def examine() -> list[Finding]:
    """Look at Python, the packages, the devices and the machine. Importing torch takes a second or two."""
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for name in ("torch", "megatron-core", "triton", "transformers", "tokenizers", "safetensors", "pyarrow", "xxhash"):
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
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        if name == "triton":
            return Finding(
                name, "missing", "optional; without it: the Triton kernels are off, torch's operators are used"
            )
        return Finding(name, "broken", "required: pip install -e .")


def _devices() -> list[Finding]:
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        return [Finding("devices", "broken", f"torch cannot be imported: {error}")]
    backends = [
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    ]
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset, 1 will be set")
    environment = Finding(
        "CUDA_DEVICE_MAX_CONNECTIONS", "ok", f"{connections} (on CUDA, overlap of TP communication wants 1)"
    )
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return [
            Finding("GPU", "missing", f"optional; without it: runs on CPU + gloo (this torch is built with {built})"),
            Finding("backends", "ok", ", ".join(backends)),
            environment,
        ]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Finding(f"GPU {index}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if dist.is_nccl_available():
        backends[-1] += " " + ".".join(map(str, torch.cuda.nccl.version()))
    return [*found, Finding("backends", "ok", ", ".join(backends)), environment]
