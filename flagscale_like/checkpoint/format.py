"""A checkpoint on disk: safetensors files and JSON, no pickle; a manifest names every file with its checksum.

step_00000100/
    rank_00000.safetensors   what rank 0 held: `{i}.param`, `{i}.exp_avg`, ... ; the header lists fragment i
    state.json               step, consumed samples, architecture, configuration, versions, scheduler
    index.safetensors        the fragments of all files in one table: see index.py
    manifest.json            size and xxh3 of every file above, written last
latest                       the newest folder's name
"""

from __future__ import annotations

import json
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from flagscale_like.arch import EMBEDDING_NAME, OUTPUT_NAME, ModelArch
from flagscale_like.checkpoint.companions import Origin
from flagscale_like.checkpoint.fragments import Fragment, copy_overlap, elements_within, same_box
from flagscale_like.checkpoint.index import (
    LARGEST,
    Form,
    FragmentTable,
    Row,
    build_table,
    forms_of,
    pack_rows,
    write_index,
)
from flagscale_like.checkpoint.manifest import (
    STATE,
    FileRecord,
    check_file,
    read_records,
    read_state,
    write_manifest,
)
from flagscale_like.checkpoint.tensor_file import DTYPES, TensorFile, TensorSpec, write_tensors
from flagscale_like.errors import CheckpointError
from flagscale_like.json_files import BAD_JSON


@dataclass(frozen=True)
class WrittenFile:
    """A file of fragments that is on disk.

    Attributes:
        record: its line of the manifest.
        rows: its part of the index, compressed (see index.pack_rows): small enough to be sent to rank 0.
    """

    record: FileRecord
    rows: bytes


def write_fragments(
    path: Path,
    fragments: Sequence[Fragment],
    tensors: Iterable[Tensor],
    specs: Sequence[TensorSpec],
    *,
    sha256: bool = False,
) -> WrittenFile:
    """Write one file of a checkpoint, checksummed in the same pass, and fsynced.

    Args:
        fragments: fragment i is listed as number i.
        tensors: contiguous CPU tensors, in the order of `specs`.
        specs: names, dtypes and shapes; `{i}.{kind}` is a tensor of fragment i, 1-D; other names belong to the rank.

    Raises:
        OSError: no space, no permission.
    """
    listed = [[f.key, f.global_shape, f.offset, f.shape, f.start, f.stop] for f in fragments]
    metadata = {"format": "pt", "fragments": json.dumps(listed)}
    record = write_tensors(path, specs, tensors, metadata, sha256=sha256)
    return WrittenFile(record, pack_rows(path.name, fragments, forms_of(specs, len(fragments))))


def specs_of(tensors: Iterable[tuple[str, Tensor]]) -> list[TensorSpec]:
    """The specs of named tensors."""
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]


def finish_folder(
    folder: Path, files: Iterable[WrittenFile], others: Iterable[FileRecord], *, sha256: bool = False
) -> list[FileRecord]:
    """Write the index and, last, the manifest of a checkpoint whose other files are on disk.

    Args:
        files: what `write_fragments` returned, of every file.
        others: the other files, state.json among them.

    Returns:
        The records of all files but the index.

    Raises:
        OSError: no space, no permission.
    """
    files = list(files)
    records = [*(file.record for file in files), *others]
    index = write_index(folder, (file.rows for file in files), sha256=sha256)
    write_manifest(folder, records, index)
    return records


@dataclass(frozen=True)
class _RankFile:
    """An open file of a checkpoint, its header parsed and checked."""

    tensors: TensorFile
    fragments: list[Fragment]
    forms: list[Form]


class _RankFiles:
    """The files of a checkpoint, opened when they are needed. At most half of the process's file limit stays open.

    Args:
        names: of all files that hold fragments.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder, self.names = folder, sorted(names)
        self.opened: set[str] = set()
        self._known = set(self.names)
        self._open: OrderedDict[str, _RankFile] = OrderedDict()  # the file used last at the end
        self._most = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def get(self, name: str) -> _RankFile:
        """An open file; several threads may ask.

        Raises:
            CheckpointError: it cannot be read, or its header is damaged.
        """
        with self._lock:
            if name not in self._open:
                self._open[name] = self._read_header(name)
                self.opened.add(name)
                if len(self._open) > self._most:
                    self._open.popitem(last=False)  # closed with its last reference: a thread may be reading it
            self._open.move_to_end(name)
            return self._open[name]

    def holding(self, row: Row) -> _RankFile:
        """The file of a fragment. What the index says of the fragment is compared with the file's header.

        Raises:
            CheckpointError: see get(); or they differ.
        """
        file = self.get(row.file)
        header = (file.fragments[row.place], file.forms[row.place]) if row.place < len(file.fragments) else (None, None)
        if header != (row.fragment, row.form):
            raise CheckpointError(
                f"{self.folder}: {row.file} is damaged: its fragment {row.place} is not the one that the index names, "
                f"{row.fragment.key} [{row.fragment.start}, {row.fragment.stop})"
            )
        return file

    def _read_header(self, name: str) -> _RankFile:
        try:
            file = TensorFile(self.folder / name)
            listed = json.loads(file.metadata["fragments"])
            fragments = [Fragment(k, tuple(g), tuple(o), tuple(s), a, b) for k, g, o, s, a, b in listed]
            forms = forms_of(file.specs.values(), len(fragments))
            _check_fragments(file, fragments, forms)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error.strerror}") from None
        except (*BAD_JSON, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder}: {name} is damaged: {error}") from None
        return _RankFile(file, fragments, forms)


class CheckpointReader:
    """Reads a checkpoint on any layout. Files are opened when something of theirs is asked for, and only that is read.

    With an index (see index.py) planning opens no file, and a file's header is checked when it is opened. Without one, or
    where the index is damaged, all files are opened at once, and every header is checked.

    Attributes:
        notes: what the user should know: a damaged index. Empty for most checkpoints.
        reads_in_threads: see WeightSource.

    Raises:
        CheckpointError: the folder is no checkpoint, or a file that must be read cannot be parsed. Checksums of other
            files than the index are `check_file`'s business.
    """

    reads_in_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.notes: tuple[str, ...] = ()
        records, index = read_records(self.folder)
        self.state: dict[str, Any] = read_state(self.folder)
        self._files = _RankFiles(self.folder, (r.name for r in records if r.name.endswith(".safetensors")))
        table = self._load_index(index) if index is not None else None
        self._table = table or self._read_headers()
        self._sound: set[str] = set()  # tensors whose boxes are known not to overlap
        if table is None:
            for key in self._table.keys():
                self._check_key(key)

    def __reduce__(self) -> tuple[type[CheckpointReader], tuple[Path]]:
        """Another process opens the folder itself."""
        return CheckpointReader, (self.folder,)

    def _load_index(self, record: FileRecord) -> FragmentTable | None:
        """The index, or None, with a note, where it cannot be used."""
        problem = check_file(self.folder, record)
        if problem is None:
            try:
                table = FragmentTable.load(self.folder / record.name)
                if sorted(table.names.files) == self._files.names:
                    return table
                problem = f"{record.name}: it is of other files than the manifest"
            except (OSError, ValueError) as error:
                problem = f"{record.name}: {error}"
        self.notes += (f"{self.folder}: the index is damaged ({problem}): the headers of all files are read instead",)
        return None

    def _read_headers(self) -> FragmentTable:
        """The table from the headers of all files."""

        def packed(name: str) -> bytes:
            file = self._files.get(name)
            return pack_rows(name, file.fragments, file.forms)

        try:
            return build_table(map(packed, self._files.names))
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.folder}: is damaged: {error}") from None

    @property
    def opened(self) -> frozenset[str]:
        """Names of the files that were opened so far, for fragments or for a rank's own tensors."""
        return frozenset(self._files.opened)

    def _check_key(self, key: str) -> None:
        """A tensor is there, and none of its elements is listed twice.

        Raises:
            CheckpointError: it is not.
        """
        if key in self._sound:
            return
        if key not in self._table:
            raise CheckpointError(f"{self.folder}: holds no {key}")
        try:
            self._table.check_boxes(key)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: is damaged: {error}") from None
        self._sound.add(key)

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

    def origin(self) -> Origin:
        """The Hugging Face folder that the weights come from, if they do."""
        return Origin.of(self.state.get("hugging_face", {}))

    def dtype(self, key: str, kind: str = "param") -> torch.dtype:
        """The dtype that a tensor was saved in. Tensors may differ: a frozen weight has the model's, others fp32.

        Raises:
            CheckpointError: there is no such tensor, or none of this kind.
        """
        self._check_key(key)
        for form in self._table.forms(key):
            if kind in dict(form):
                return DTYPES[dict(form)[kind]]
        raise CheckpointError(f"{self.folder}: holds no {kind} of {key}")

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the global tensors of one of the checkpoint's models: of the unnamed one, or of that with this prefix."""
        return [key for key in self._table.keys() if key.startswith(prefix) and "/" not in key[len(prefix) :]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the global tensors of all models."""
        return {key: self._table.global_shape(key) for key in self._table.keys()}

    def global_shape(self, key: str) -> tuple[int, ...]:
        """Shape of a global tensor, its vocabulary padded as it was saved.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self._check_key(key)
        return self._table.global_shape(key)

    def has(self, kind: str, keys: Iterable[str] | None = None) -> bool:
        """Whether all fragments of these tensors hold this kind (param, exp_avg, exp_avg_sq): a frozen weight has no moments.

        Args:
            keys: the tensors; None for all.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if keys is None:
            forms = self._table.forms()
        else:
            forms = []
            for key in keys:
                self._check_key(key)
                forms += self._table.forms(key)
        return all(kind in dict(form) for form in forms)

    def kinds(self, target: Fragment) -> dict[str, bool]:
        """The kinds saved of a tensor's elements; of each, whether of all elements of `target` or only of some.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self._check_key(target.key)
        forms = {row.form for row in self._table.overlapping(target)}
        found = [kind for form in forms for kind, _ in form]
        return {kind: found.count(kind) == len(forms) for kind in dict.fromkeys(found)}

    def rank_tensor(self, rank: int, name: str) -> Tensor | None:
        """A tensor that one rank saved for itself (its random state), or None.

        Raises:
            CheckpointError: the rank's file is damaged.
        """
        file = f"rank_{rank:05d}.safetensors"
        if file not in self._files:
            return None
        tensors = self._files.get(file).tensors
        # A copy: a mapped tensor keeps the whole file's blocks on disk, even when the file is removed.
        return tensors.get_tensor(name).clone() if name in tensors.specs else None

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

    def grain(self, target: Fragment) -> int:
        """Any range is read for itself; see WeightSource."""
        return 1

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
        for row in self._table.overlapping(target):
            if kind in dict(row.form):
                copied += self._copy(row, kind, target, out)
        if copied != wanted:
            raise CheckpointError(f"{self.folder}: {target.key} {kind}: {copied} of {wanted} elements were saved")

    def _copy(self, row: Row, kind: str, target: Fragment, out: Tensor) -> int:
        """Copy the elements that a saved fragment and `target` share; returns how many."""
        saved, tensor = row.fragment, f"{row.place}.{kind}"
        file = self._files.holding(row).tensors
        if not same_box(saved, target) or file.specs[tensor].dtype != out.dtype:
            return copy_overlap(saved, file.get_tensor(tensor), target, out)
        low, high = max(saved.start, target.start), min(saved.stop, target.stop)
        try:
            file.read_into(tensor, low - saved.start, out[low - target.start : high - target.start])
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {row.file}: cannot be read: {error.strerror}") from None
        return high - low

    def full(self, key: str, kind: str = "param", dtype: torch.dtype | None = None) -> Tensor:
        """A whole global tensor on the host, in the dtype it was saved in or the one given; mapped, if it is one piece.

        Raises:
            CheckpointError: see read().
        """
        shape, own = self.global_shape(key), self.dtype(key, kind)
        if self._table.rows(key) == 1 and dtype in (None, own):
            row = self._table.row(key)
            if row.fragment.numel == prod(shape):
                return self._files.holding(row).tensors.get_tensor(f"{row.place}.{kind}", whole=True).view(shape)
        out = torch.empty(shape, dtype=dtype or own)
        self.read(kind, Fragment(key, shape, (0,) * len(shape), shape, 0, out.numel()), out.view(-1))
        return out


def _check_fragments(file: TensorFile, fragments: list[Fragment], forms: list[Form]) -> None:
    """Compare what a header says of its fragments with its tensors, before any index arithmetic uses it."""
    for index, (fragment, form) in enumerate(zip(fragments, forms, strict=True)):
        sizes = (*fragment.global_shape, *fragment.offset, *fragment.shape, fragment.start, fragment.stop)
        if not isinstance(fragment.key, str) or not fragment.global_shape:
            raise ValueError(f"fragment {index} has no name or no shape")
        if not all(isinstance(size, int) and 0 <= size < LARGEST for size in sizes):
            raise ValueError(f"fragment {index} has an index that is no natural number")
        bounds = zip(fragment.offset, fragment.shape, fragment.global_shape, strict=True)
        inside = all(offset + size <= limit for offset, size, limit in bounds)
        if not inside or not fragment.start < fragment.stop <= prod(fragment.shape):
            raise ValueError(f"fragment {index} ({fragment.key}) leaves its tensor")
        shapes = [file.specs[f"{index}.{kind}"].shape for kind, _ in form]
        if f"{index}.param" not in file.specs or any(shape != (fragment.numel,) for shape in shapes):
            raise ValueError(f"fragment {index} ({fragment.key}) is not as long as its tensors")


def is_vocabulary(key: str) -> bool:
    """Whether a tensor's rows are the vocabulary's, padded as the layout needs it."""
    return key.rpartition("/")[2] in (EMBEDDING_NAME, OUTPUT_NAME)


class Shapes(Protocol):
    """What of a source of weights says which tensors it has."""

    @property
    def arch(self) -> ModelArch: ...

    def keys(self) -> list[str]: ...

    def global_shape(self, key: str) -> tuple[int, ...]: ...


def is_embedder(source: Shapes) -> bool:
    """Whether a source of weights is an embedding model: it has no output layer, or its run did not train the one it has."""
    if (embedder := getattr(source, "embedder", None)) is not None:  # a Hugging Face folder
        return bool(embedder)
    state = getattr(source, "state", None) or getattr(getattr(source, "adapters", None), "state", None) or {}
    if state.get("embedder") or state.get("config", {}).get("objective", {}).get("kind") == "contrastive":
        return True
    return OUTPUT_NAME not in source.keys() and not source.arch.tie_embeddings


def keys_of(source: Any, prefix: str = "") -> list[str]:
    """The keys of one of a source's models; only a checkpoint holds several. See Engine.name."""
    return source.keys(prefix) if prefix else source.keys()


def value_heads_of(source: Shapes, prefix: str = "") -> int:
    """Outputs of the value head of a model whose weights a source holds; 0 where it has none, as a language model.

    An output layer has a row for each token of the vocabulary; a value head has fewer.

    Args:
        prefix: of the model's keys.
    """
    key = prefix + OUTPUT_NAME
    rows = source.global_shape(key)[0] if key in keys_of(source, prefix) else 0
    return rows if rows < source.arch.vocab_size else 0
