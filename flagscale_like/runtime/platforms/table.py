"""Chips that a row describes: what torch has for every device does the rest. No row has been run on its chip."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from flagscale_like.runtime.platforms.base import Platform
from flagscale_like.runtime.platforms.cuda import CudaPlatform


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A device by its vendor's documents; `platform_of` makes a Platform of it.

    Attributes:
        name: the word that FLAGSCALE_LIKE_DEVICE takes.
        maker: who makes it, for people.
        torch_type: the type of its torch.device; cuda where the vendor's torch passes for CUDA.
        module: the package that brings it to torch; None: the vendor's torch, or torch itself, has it.
        backend: of torch.distributed.
        visible_env: the variable that lists the devices a process sees.
        bf16, pinned, streams: whether it has matrix products in bf16, pinned host memory, and streams beside the compute.
        triton: whether our Triton kernels run on it. They take CUDA tensors only, so elsewhere never.
        torch_version: the attribute of torch.version that tells its torch from NVIDIA's.
        claims: whether it is chosen by itself. A chip that looks like NVIDIA's runs as `cuda` unless it is asked for.
    """

    name: str
    maker: str
    torch_type: str
    module: str | None
    backend: str
    visible_env: str
    bf16: bool = True
    pinned: bool = True
    streams: bool = True
    triton: bool = False
    torch_version: str | None = None
    claims: bool = True


CHIPS = (
    Chip(
        name="rocm",
        maker="AMD Instinct",
        torch_type="cuda",
        module=None,
        backend="nccl",
        visible_env="HIP_VISIBLE_DEVICES",
        triton=True,
        torch_version="hip",
    ),
    Chip(
        name="npu",
        maker="Huawei Ascend",
        torch_type="npu",
        module="torch_npu",
        backend="hccl",
        visible_env="ASCEND_RT_VISIBLE_DEVICES",
    ),
    Chip(
        name="mlu",
        maker="Cambricon MLU",
        torch_type="mlu",
        module="torch_mlu",
        backend="cncl",
        visible_env="MLU_VISIBLE_DEVICES",
    ),
    Chip(
        name="musa",
        maker="Moore Threads",
        torch_type="musa",
        module="torch_musa",
        backend="mccl",
        visible_env="MUSA_VISIBLE_DEVICES",
    ),
    Chip(
        name="xpu",
        maker="Intel GPU",
        torch_type="xpu",
        module=None,
        backend="xccl",
        visible_env="ZE_AFFINITY_MASK",
    ),
    Chip(
        name="kunlun",
        maker="Kunlunxin XPU",
        torch_type="cuda",
        module="torch_xmlir",
        backend="nccl",  # torch_xmlir answers to this name with BKCL
        visible_env="CUDA_VISIBLE_DEVICES",
    ),
    Chip(
        name="gcu",
        maker="Enflame",
        torch_type="gcu",
        module="torch_gcu",
        backend="eccl",
        visible_env="TOPS_VISIBLE_DEVICES",
    ),
    Chip(
        name="metax",
        maker="MetaX",
        torch_type="cuda",
        module=None,
        backend="nccl",
        visible_env="MACA_VISIBLE_DEVICES",
        claims=False,
    ),
    Chip(
        name="iluvatar",
        maker="Iluvatar CoreX",
        torch_type="cuda",
        module=None,
        backend="nccl",
        visible_env="CUDA_VISIBLE_DEVICES",
        claims=False,
    ),
    Chip(
        name="hygon",
        maker="Hygon DCU",
        torch_type="cuda",
        module=None,
        backend="nccl",
        visible_env="HIP_VISIBLE_DEVICES",
        torch_version="hip",
        claims=False,
    ),
)


class _FromRow(Platform):
    """What a row adds to the platform of its torch type."""

    chip: Chip

    @classmethod
    def missing(cls) -> str | None:
        field = cls.chip.torch_version
        if field is not None and getattr(torch.version, field, None) is None:
            return f"this torch is not built for it (torch.version.{field} is None)"
        return super().missing()


@functools.cache
def platform_of(chip: Chip) -> type[Platform]:
    """The Platform that a row describes: CUDA's where its torch passes for CUDA, else torch's own for every device."""
    base = CudaPlatform if chip.torch_type == "cuda" else Platform
    fields = {
        "chip": chip,
        "__doc__": f"{chip.maker}, written from the vendor's documents, not run.",
        "name": chip.name,
        "torch_type": chip.torch_type,
        "module": chip.module,
        "backend": chip.backend,
        "visible_env": chip.visible_env,
        "not_run": True,
        "claims": chip.claims,
        "bf16": chip.bf16,
        "pins_memory": chip.pinned,
        "has_streams": chip.streams,
        "triton": chip.triton,
        "compiles": chip.triton,  # torch.compile makes Triton kernels
    }
    return type(f"{chip.name.capitalize()}Platform", (_FromRow, base), fields)
