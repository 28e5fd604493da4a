"""LoRA adapters on disk: a checkpoint that holds them alone, and the base whose weights they belong to.

Such a checkpoint's state.json has `lora`, the adapters' options, and `base`: the folder of the base's weights and their
identity. The identity takes no reading of all weights:

    a native checkpoint   a hash over the manifest's lines of the tensor files: name, size, and checksum
    a Hugging Face folder a hash over every tensor's name, dtype, shape, and the bytes at its begin, middle and end
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from flagscale_like.arch import ModelArch, is_adapter
from flagscale_like.checkpoint.companions import Origin
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.fragments import Fragment, copy_overlap, elements_within, overlaps
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.manifest import MANIFEST, find_checkpoint, read_manifest
from flagscale_like.config import Lora
from flagscale_like.errors import CheckpointError

SAMPLE_BYTES = 1024

Base = CheckpointReader | HfFolder


def open_weights(path: Path) -> Base:
    """The Hugging Face folder at a path, or the newest native checkpoint.

    Raises:
        CheckpointError, ConversionError: there is neither, or it cannot be read.
    """
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        return HfFolder(path)
    return CheckpointReader(find_checkpoint(path))


def holds_adapters(source: Any) -> bool:
    """Whether a source of weights has LoRA adapters."""
    return any(is_adapter(key) for key in source.keys())


def identify(base: Base) -> dict[str, Any]:
    """What state.json records of a base: its folder, and its identity (see the module's docstring)."""
    digest, size = xxhash.xxh3_64(), 0
    if isinstance(base, CheckpointReader):
        for record in sorted(read_manifest(base.folder), key=lambda record: record.name):
            if record.name.endswith(".safetensors"):
                digest.update(f"{record.name} {record.size_bytes} {record.xxh3}\n".encode())
                size += record.size_bytes
    else:
        for spec in sorted(base.specs(), key=lambda spec: spec.name):
            digest.update(f"{spec.name} {spec.dtype} {spec.shape}\n".encode())
            flat = base.hf_tensor(spec.name, whole=False).reshape(-1).view(torch.uint8)
            for begin in (0, len(flat) // 2, max(0, len(flat) - SAMPLE_BYTES)):
                digest.update(flat[begin : begin + SAMPLE_BYTES].numpy())
            size += spec.nbytes
    kind = "checkpoint" if isinstance(base, CheckpointReader) else "hugging_face"
    return {"kind": kind, "folder": str(base.folder.absolute()), "bytes": size, "xxh3": digest.hexdigest()}


def identities(source: Any) -> list[dict[str, Any]]:
    """The identity of each folder that a source of weights reads: its own, or the base's and the adapters'.

    Adapters in peft's format have none beside their folder.
    """
    if isinstance(source, CheckpointReader | HfFolder):
        return [identify(source)]
    own = source.adapters
    found = identify(own) if isinstance(own, CheckpointReader) else {"folder": str(Path(own.folder).absolute())}
    return [identify(source.base), found]


def same_base(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are of the same weights, wherever they lie."""
    return all(one.get(key) == other.get(key) for key in ("kind", "bytes", "xxh3"))


class Adapters(Protocol):
    """What adapters are read from: a native checkpoint that holds them, or a folder in peft's format (see peft_folder.py)."""

    folder: Path
    state: dict[str, Any]

    @property
    def arch(self) -> ModelArch: ...

    def keys(self) -> list[str]: ...

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def global_shape(self, key: str) -> tuple[int, ...]: ...

    def full(self, key: str, kind: str = "param", dtype: torch.dtype | None = None) -> Tensor: ...

    def check(self, target: Fragment) -> None: ...

    def read(self, kind: str, target: Fragment, out: Tensor) -> None: ...


def lora_of(adapters: Adapters) -> Lora:
    """The options that a checkpoint's adapters were made with.

    Raises:
        CheckpointError: the state holds none that this version knows.
    """
    try:
        return Lora.model_validate(adapters.state.get("lora"))
    except ValidationError as error:
        raise CheckpointError(f"{adapters.folder}: state.json: lora: {error.errors()[0]['msg']}") from None


def open_base(
    adapters: Adapters,
    named: Path | None,
    *,
    way_out: str,
    force: bool = False,
    identity: Callable[[Base], dict[str, Any]] = identify,
) -> Base:
    """The base of a checkpoint's adapters, where the checkpoint says it is or where the user does.

    Args:
        named: the user's folder; None for the recorded one.
        way_out: how the user names another folder, for messages.
        force: take a base of another identity. Shapes must agree all the same.
        identity: identify(), or something that does its work on one rank.

    Raises:
        CheckpointError, ConversionError: it is not there, cannot be read, or is another one.
    """
    record = adapters.state.get("base")
    recorded = Path(record["folder"]) if isinstance(record, dict) else None
    folder = named or recorded
    if folder is None:
        raise CheckpointError(f"{adapters.folder}: holds adapters, and does not say of which base: {way_out}")
    if not folder.is_dir():
        raise CheckpointError(f"{adapters.folder}: the base of its adapters is not at {folder}: {way_out}")
    base = open_weights(folder)
    if holds_adapters(base):
        raise CheckpointError(f"{folder}: holds adapters alone, and cannot be the base of others")
    if not force and isinstance(record, dict):
        found = identity(base)
        if not same_base(record, found):
            raise CheckpointError(
                f"{folder}: is another base than the one that the adapters of {adapters.folder} were trained on: "
                f"{_describe(found)}, recorded {_describe(record)} in {record.get('folder')}"
            )
    return base


def _describe(record: dict[str, Any]) -> str:
    kind = {"checkpoint": "a checkpoint", "hugging_face": "a Hugging Face folder"}.get(record.get("kind"), "a base")
    return f"{kind} of {record.get('bytes', 0):,} bytes with the hash {record.get('xxh3')}"


class AdaptedWeights:
    """A base's weights and adapters, as one source of weights.

    Attributes:
        lora: options of the adapters.

    Raises:
        CheckpointError: the adapters do not fit the base's matrices.
    """

    def __init__(self, base: Base, adapters: Adapters) -> None:
        self.base, self.adapters, self.folder = base, adapters, adapters.folder
        self.lora = lora_of(adapters)
        self.reads_in_threads = base.reads_in_threads
        self._own = set(adapters.keys())
        try:
            self.lora.check(base.arch)
        except ValueError as error:
            raise CheckpointError(f"{adapters.folder}: its adapters do not fit {base.folder}: {error}") from None
        shapes = adapters.shapes()
        for parameter in self.lora.parameters(base.arch):
            if shapes.get(parameter.name) != parameter.shape:
                raise CheckpointError(
                    f"{adapters.folder}: its adapters do not fit {base.folder}: {parameter.name} is "
                    f"{shapes.get(parameter.name, 'missing')}, the base needs {parameter.shape}"
                )

    @property
    def arch(self) -> ModelArch:
        return self.base.arch

    @property
    def state(self) -> dict[str, Any]:
        return self.adapters.state

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What state.json records of the base."""
        return identify(self.base)

    def origin(self) -> Origin:
        return self.base.origin()

    def keys(self) -> list[str]:
        return sorted({*self.base.keys(), *self._own})

    def global_shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, its vocabulary padded for tp 1."""
        return self.adapters.shapes()[key] if key in self._own else self.base.global_shape(key)

    def check(self, target: Fragment) -> None:
        self._source(target.key).check(target)

    def grain(self, target: Fragment) -> int:
        return 1 if target.key in self._own else self.base.grain(target)

    def read(self, kind: str, target: Fragment, out: Tensor) -> None:
        self._source(target.key).read(kind, target, out)

    def _source(self, key: str) -> Base | Adapters:
        return self.adapters if key in self._own else self.base


class MergedWeights:
    """A base's weights with the adapters' product added: W + scale B A, in fp32. Picklable, one matrix at a time: of stacked
    experts one expert's.

    Raises:
        CheckpointError: the checkpoint holds a head of its own.
    """

    reads_in_threads = False

    def __init__(self, adapted: AdaptedWeights) -> None:
        self.base, self.adapters, self._lora, self.folder = adapted.base, adapted.adapters, adapted.lora, adapted.folder
        left = sorted(key for key in self.adapters.keys() if not is_adapter(key))
        if left:
            raise CheckpointError(
                f"{self.folder}: holds {left[0]} beside the adapters, which the base has no place for"
            )
        self._adapted = {p.name.rpartition(".lora.")[0] + ".weight" for p in self._lora.parameters(self.base.arch)}
        self._last: tuple[str, int | None, Tensor] | None = None

    @property
    def arch(self) -> ModelArch:
        return self.base.arch

    def origin(self) -> Origin:
        return self.base.origin()

    def keys(self) -> list[str]:
        return self.base.keys()

    def global_shape(self, key: str) -> tuple[int, ...]:
        return self.base.global_shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """The base's, whatever was added."""
        return self.base.dtype(key)

    def full(self, key: str, kind: str = "param", dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor, in the base's dtype or the one given; a matrix with an adapter is merged in fp32 first."""
        assert kind == "param", kind
        if key not in self._adapted:
            return self.base.full(key, dtype=dtype)
        dtype = dtype or self.base.dtype(key)
        shape = self.global_shape(key)
        if len(shape) == 2:
            return self._merge(key).to(dtype)
        out = torch.empty(shape, dtype=dtype)
        for expert in range(shape[0]):
            out[expert] = self._merge(key, expert)
        return out

    def _merge(self, key: str, expert: int | None = None) -> Tensor:
        """One matrix, merged, in fp32 [out, in]: a whole tensor, or one expert's part of it."""
        at = key.removesuffix("weight") + "lora."
        a, b = (self._matrix(self.adapters, at + letter, expert) for letter in "ab")
        weight = torch.addmm(self._matrix(self.base, key, expert), b, a, alpha=self._lora.scale)
        if self._lora.dora:
            weight *= (self._matrix(self.adapters, at + "magnitude", expert) / weight.norm(dim=-1))[:, None]
        return weight

    @staticmethod
    def _matrix(source: Base | Adapters, key: str, expert: int | None) -> Tensor:
        """A tensor in fp32, or one expert's part of it; no more of it is read."""
        if expert is None:
            return source.full(key, dtype=torch.float32)
        shape = source.global_shape(key)
        out = torch.empty(shape[1:], dtype=torch.float32)
        source.read("param", _part_of(key, shape, expert), out.view(-1))
        return out

    def check(self, target: Fragment) -> None:
        self.base.check(target)

    def read(self, kind: str, target: Fragment, out: Tensor) -> None:
        """Fill `out`, 1-D, with the elements of `target`; rows beyond the vocabulary become zero."""
        if target.key not in self._adapted:
            self.base.read(kind, target, out)
            return
        self.check(target)
        key, shape = target.key, self.global_shape(target.key)
        assert elements_within(target, shape) == target.numel
        for expert in [None] if len(shape) == 2 else range(shape[0]):
            part = _part_of(key, shape, expert)
            if next(overlaps(part, target), None) is None:
                continue
            if self._last is None or self._last[:2] != (key, expert):  # gate and up are two fragments of one tensor
                self._last = (key, expert, self._merge(key, expert))
            copy_overlap(part, self._last[2].view(-1), target, out)

    def grain(self, target: Fragment) -> int:
        """A matrix is merged whole; see WeightSource."""
        if target.key not in self._adapted:
            return self.base.grain(target)
        return target.numel if len(target.shape) == 2 else prod(target.shape[1:])

    def trained(self) -> bool:
        """Whether any adapter changes its matrix: every B is 0 until the first update."""
        names = [p.name for p in self._lora.parameters(self.base.arch) if p.name.endswith(".b")]
        return any(bool(self.adapters.full(name).any()) for name in names)


def _part_of(key: str, shape: tuple[int, ...], expert: int | None) -> Fragment:
    """All elements of a tensor, or those of one of the experts that it stacks."""
    first, count = (0, shape[0]) if expert is None else (expert, 1)
    own = (count, *shape[1:])
    return Fragment(key, shape, (first, *(0 for _ in shape[1:])), own, 0, prod(own))
