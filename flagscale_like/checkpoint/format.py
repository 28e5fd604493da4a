"""A checkpoint on disk: plain safetensors and JSON, nothing pickled, every file named in a manifest with its checksum.

step_00000100/
    rank_00000.safetensors   what rank 0 held: `{i}.param`, `{i}.exp_avg`, ... ; the header lists fragment i
    state.json               step, consumed samples, architecture, configuration, versions, scheduler
    manifest.json            size and xxh3 of every file above, written last
latest                       the newest folder's name
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from flagscale_like.arch import EMBEDDING_NAME, OUTPUT_NAME, ModelArch
from flagscale_like.checkpoint.fragments import Fragment, copy_overlap, elements_within, same_box
from flagscale_like.checkpoint.manifest import BAD_JSON, STATE, FileRecord, read_manifest, read_state
from flagscale_like.checkpoint.tensor_file import TensorFile, TensorSpec, write_tensors
from flagscale_like.errors import CheckpointError


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str], *, sha256: bool = False
) -> FileRecord:
    """Write host tensors in the safetensors format, checksummed in the same pass, and fsynced.

    Args:
        tensors: (name, contiguous CPU tensor).
    """
    tensors = list(tensors)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    return write_tensors(path, specs, (tensor for _, tensor in tensors), metadata, sha256=sha256)


class CheckpointReader:
    """Reads a checkpoint on any layout. Files are memory-mapped: only what is asked for is read.

    Raises:
        CheckpointError: the folder is no checkpoint, or a file cannot be parsed. Checksums are `check_file`'s business.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        names = [record.name for record in read_manifest(self.folder)]
        self.state: dict[str, Any] = read_state(self.folder)
        self._files: dict[str, TensorFile] = {}
        self._fragments: dict[str, list[tuple[Fragment, str, int]]] = {}
        for name in sorted(n for n in names if n.endswith(".safetensors")):
            try:
                file = TensorFile(self.folder / name)
                listed = json.loads(file.metadata["fragments"])
                fragments = [Fragment(k, tuple(g), tuple(o), tuple(s), a, b) for k, g, o, s, a, b in listed]
                _check_fragments(file, fragments)
            except (OSError, *BAD_JSON, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.folder}: {name} is damaged: {error}") from None
            self._files[name] = file
            for index, fragment in enumerate(fragments):
                self._fragments.setdefault(fragment.key, []).append((fragment, name, index))
        try:
            for held in self._fragments.values():
                _check_cover([fragment for fragment, _, _ in held])
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: is damaged: {error}") from None
        self._names = {name: set(file.keys()) for name, file in self._files.items()}

    @property
    def arch(self) -> ModelArch:
        """The model's architecture.

        Raises:
            CheckpointError: the state holds none that this version knows.
        """
        try:  # by way of ModelArch: what it did not know yet when this was saved has its default
            return ModelArch.model_validate(self.state.get("model"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("model", *first["loc"])))
            raise CheckpointError(f"{self.folder}: {STATE}: {where}: {first['msg']}") from None

    def state_token_ids(self) -> dict[str, Any]:
        """bos, eos and pad ids of the Hugging Face folder that this checkpoint was imported from, if it was."""
        return dict(self.state.get("hugging_face", {}).get("token_ids", {}))

    def dtype(self, key: str, kind: str = "param") -> torch.dtype:
        """The dtype that a tensor was saved in."""
        self.global_shape(key)
        _, name, index = self._fragments[key][0]
        return self._files[name].specs[f"{index}.{kind}"].dtype

    def keys(self) -> list[str]:
        """Names of the global tensors."""
        return sorted(self._fragments)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the global tensors."""
        return {key: self.global_shape(key) for key in sorted(self._fragments)}

    def global_shape(self, key: str) -> tuple[int, ...]:
        """Shape of a global tensor, its vocabulary padded as it was saved.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if key not in self._fragments:
            raise CheckpointError(f"{self.folder}: holds no {key}")
        return self._fragments[key][0][0].global_shape

    def has(self, kind: str) -> bool:
        """Whether the checkpoint holds this kind of tensor (param, exp_avg, exp_avg_sq) for every key."""
        return all(f"{i}.{kind}" in self._names[name] for held in self._fragments.values() for _, name, i in held)

    def rank_tensor(self, rank: int, name: str) -> Tensor | None:
        """A tensor that one rank saved for itself (its random state), or None."""
        file = f"rank_{rank:05d}.safetensors"
        # A copy: who keeps a mapped tensor keeps the whole file's blocks on disk, removed or not.
        return self._files[file].get_tensor(name).clone() if name in self._names.get(file, ()) else None

    def check(self, target: Fragment) -> None:
        """Whether `target` can be read: the tensor is there in the model's shape, up to the vocabulary's padding.

        Raises:
            CheckpointError: it cannot.
        """
        saved = self.global_shape(target.key)
        if saved[1:] != target.global_shape[1:] or (
            saved[0] != target.global_shape[0] and not is_vocabulary(target.key)
        ):
            raise CheckpointError(
                f"{self.folder}: {target.key} has shape {saved}, the model's has {target.global_shape}"
            )

    def read(self, kind: str, target: Fragment, out: Tensor) -> None:
        """Fill `out`, 1-D in host memory, with the elements of `target`; rows beyond the saved vocabulary become zero.

        Raises:
            CheckpointError: the tensor is missing, of another shape, or not all of it was saved.
        """
        self.check(target)
        saved = self.global_shape(target.key)
        wanted = elements_within(target, saved)
        if wanted < target.numel:
            out.zero_()
        copied = 0
        for fragment, name, index in self._fragments[target.key]:
            file, tensor = self._files[name], f"{index}.{kind}"
            if same_box(fragment, target) and file.specs[tensor].dtype == out.dtype:
                low, high = max(fragment.start, target.start), min(fragment.stop, target.stop)
                if low < high:
                    try:
                        file.read_into(tensor, low - fragment.start, out[low - target.start : high - target.start])
                    except OSError as error:
                        raise CheckpointError(f"{self.folder}: {name}: cannot be read: {error.strerror}") from None
                    copied += high - low
            elif _may_overlap(fragment, target):
                copied += copy_overlap(fragment, file.get_tensor(tensor), target, out)
        if copied != wanted:
            raise CheckpointError(f"{self.folder}: {target.key} {kind}: {copied} of {wanted} elements were saved")

    def full(self, key: str, kind: str = "param", dtype: torch.dtype | None = None) -> Tensor:
        """A whole global tensor on the host, in the dtype it was saved in or the one given; mapped, if it is one piece."""
        shape = self.global_shape(key)
        pieces = self._fragments[key]
        if len(pieces) == 1 and pieces[0][0].numel == prod(shape) and dtype in (None, self.dtype(key, kind)):
            _, name, index = pieces[0]
            return self._files[name].get_tensor(f"{index}.{kind}", whole=True).view(shape)
        out = torch.empty(shape, dtype=dtype or self.dtype(key, kind))
        self.read(kind, Fragment(key, shape, (0,) * len(shape), shape, 0, out.numel()), out.view(-1))
        return out


def _check_fragments(file: TensorFile, fragments: list[Fragment]) -> None:
    """A header is a claim: hold it against the tensors that are there, before any index arithmetic trusts it."""
    for index, fragment in enumerate(fragments):
        sizes = (*fragment.global_shape, *fragment.offset, *fragment.shape, fragment.start, fragment.stop)
        if not isinstance(fragment.key, str) or not fragment.global_shape:
            raise ValueError(f"fragment {index} has no name or no shape")
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"fragment {index} has an index that is no natural number")
        bounds = zip(fragment.offset, fragment.shape, fragment.global_shape, strict=True)
        inside = all(offset + size <= limit for offset, size, limit in bounds)
        if not inside or not fragment.start < fragment.stop <= prod(fragment.shape):
            raise ValueError(f"fragment {index} ({fragment.key}) leaves its tensor")
        kinds = [spec.shape for name, spec in file.specs.items() if name.startswith(f"{index}.")]
        if f"{index}.param" not in file.specs or any(shape != (fragment.numel,) for shape in kinds):
            raise ValueError(f"fragment {index} ({fragment.key}) is not as long as its tensors")


def _check_cover(fragments: list[Fragment]) -> None:
    """No element of a tensor is listed twice: else others could be missing, and the count of elements right."""
    boxes: dict[tuple, list[Fragment]] = {}
    for fragment in fragments:
        if fragment.global_shape != fragments[0].global_shape:
            raise ValueError(f"{fragment.key} has two shapes: {fragments[0].global_shape} and {fragment.global_shape}")
        boxes.setdefault((fragment.offset, fragment.shape), []).append(fragment)
    same = (sorted(held, key=lambda f: f.start) for held in boxes.values())
    twice = any(a.stop > b.start for held in same for a, b in itertools.pairwise(held))
    firsts = [held[0] for held in boxes.values()]
    if twice or any(_may_overlap(a, b) for a, b in itertools.combinations(firsts, 2)):
        raise ValueError(f"elements of {fragments[0].key} are listed twice")


def is_vocabulary(key: str) -> bool:
    """Whether a tensor's rows are the vocabulary's, padded as the layout needs it."""
    return key in (EMBEDDING_NAME, OUTPUT_NAME)


def _may_overlap(a: Fragment, b: Fragment) -> bool:
    return all(o < p + t and p < o + s for o, s, p, t in zip(a.offset, a.shape, b.offset, b.shape, strict=True))


def fragment_metadata(fragments: Iterable[Fragment]) -> dict[str, str]:
    """The header entry that lists fragment 0, 1, ... of a file."""
    listed = [[f.key, f.global_shape, f.offset, f.shape, f.start, f.stop] for f in fragments]
    return {"format": "pt", "fragments": json.dumps(listed)}
