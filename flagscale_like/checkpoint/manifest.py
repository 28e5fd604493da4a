"""The files of a checkpoint, and the manifest that lists each with its size and checksum. Imports no torch.

The manifest is written after every other file is on disk. So a folder without a manifest is unfinished, and a folder whose
files do not match it is damaged. Nothing here parses a tensor file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from flagscale_like import json_files
from flagscale_like.errors import CheckpointError
from flagscale_like.json_files import BAD_JSON
from flagscale_like.run_folder import RunFolder

FORMAT_VERSION = 1
MANIFEST, STATE, LATEST, INDEX = "manifest.json", "state.json", "latest", "index.safetensors"
COMPANIONS = "tokenizer"  # the one folder inside a checkpoint; see checkpoint.companions
TEMPORARY = ".tmp-"  # a name in a checkpoints/ folder that starts with it is an unfinished or a removed checkpoint
REPLACED = f"{TEMPORARY}replaced-"
READ_BYTES = 16 << 20


@dataclass(frozen=True)
class FileRecord:
    """One file in the manifest. xxh3 finds damage; sha256, where the configuration asks for it, also finds forgery."""

    name: str
    size_bytes: int
    xxh3: str
    sha256: str | None = None


class Checksum:
    """Computes the checksums of a file from its bytes, piece by piece.

    Both hashes release the interpreter lock while they work on a large piece.

    Args:
        sha256: compute sha256 beside xxh3.
    """

    def __init__(self, *, sha256: bool) -> None:
        self._xxh3 = xxhash.xxh3_64()
        self._sha256 = hashlib.sha256() if sha256 else None
        self.size_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the file's next bytes."""
        self._xxh3.update(data)
        if self._sha256 is not None:
            self._sha256.update(data)
        self.size_bytes += len(data)

    def record(self, name: str) -> FileRecord:
        """The record of a file that has the bytes taken so far."""
        sha256 = self._sha256.hexdigest() if self._sha256 is not None else None
        return FileRecord(name, self.size_bytes, self._xxh3.hexdigest(), sha256)


def fsync_folder(folder: Path) -> None:
    """Make renames and new entries in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object, *, sha256: bool = False) -> FileRecord:
    """Write a JSON file of a checkpoint, and return its record."""
    checksum = Checksum(sha256=sha256)
    checksum.update(json_files.write_json(path, value))
    return checksum.record(path.name)


def write_manifest(folder: Path, records: Iterable[FileRecord], index: FileRecord | None = None) -> None:
    """Write the last file of a checkpoint: with it the checkpoint is whole.

    Args:
        index: the record of the index. It has an entry of its own: the files are whole without it.
    """

    def entry(record: FileRecord) -> dict[str, Any]:
        return {key: value for key, value in asdict(record).items() if value is not None}

    manifest: dict[str, Any] = {"format": FORMAT_VERSION, "files": [entry(record) for record in records]}
    if index is not None:
        manifest["index"] = entry(index)
    write_json(folder / MANIFEST, manifest)
    fsync_folder(folder)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name, then move the latest pointer to it; each is durable before the next.

    Where a checkpoint of this step exists (the run went back and saved the step again), the new one takes its place. If this
    is interrupted between the two renames, `restore_replaced` gives the old one its name back.

    Raises:
        OSError: a rename or a write failed; the old checkpoint has its name.
    """
    root = final.parent
    replaced = root / f"{REPLACED}{final.name}-{uuid.uuid4().hex[:8]}" if final.exists() else None
    if replaced:
        os.replace(final, replaced)
    try:
        os.replace(temporary, final)
    except OSError:
        if replaced:
            os.replace(replaced, final)
        raise
    fsync_folder(root)
    write_json(root / LATEST, final.name)
    fsync_folder(root)
    if replaced:
        remove([replaced], wait=False)


def restore_replaced(root: Path) -> None:
    """Give each checkpoint its name back that `publish` had moved aside when it was interrupted."""
    for replaced in Path(root).glob(f"{REPLACED}step_*"):
        final = replaced.with_name(replaced.name.removeprefix(REPLACED).rpartition("-")[0])
        if not final.exists():
            os.replace(replaced, final)


def read_manifest(folder: Path) -> list[FileRecord]:
    """The files of a checkpoint, but for its index.

    Raises:
        CheckpointError: no manifest, another format, or a file name that leaves the folder.
    """
    return read_records(folder)[0]


def _is_safe(name: str) -> bool:
    return name == os.path.basename(name) and name not in ("", ".", "..") and name.isprintable()


def _record(entry: Mapping[str, Any]) -> FileRecord:
    """An entry of a manifest.

    Raises:
        TypeError: it lacks something, has more, or has values of other types.
    """
    record = FileRecord(**entry)
    texts = (record.name, record.xxh3, *([] if record.sha256 is None else [record.sha256]))
    if type(record.size_bytes) is not int or not all(isinstance(text, str) for text in texts):
        raise TypeError("a size is no integer, or a name or checksum no text")
    return record


def read_records(folder: Path) -> tuple[list[FileRecord], FileRecord | None]:
    """The files of a checkpoint, and its index; None where it was saved without one.

    Raises:
        CheckpointError: see read_manifest().
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = [_record(entry) for entry in manifest["files"]]
        index = _record(manifest["index"]) if "index" in manifest else None
        version = manifest["format"]
        records = [*files, index] if index else files
        unsafe = [r.name for r in records if not _is_safe(r.name.removeprefix(f"{COMPANIONS}/"))]
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: not a checkpoint, or an unfinished one: no {MANIFEST}") from None
    except (OSError, *BAD_JSON, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: {error}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder}: checkpoint format {version}, this version reads {FORMAT_VERSION}")
    if unsafe:
        raise CheckpointError(f"{folder}: {MANIFEST} names a file outside the checkpoint: {unsafe[0]!r}")
    if STATE not in (record.name for record in files):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: it does not list {STATE}")
    return files, index


def read_state(folder: Path) -> dict[str, Any]:
    """state.json: step, consumed samples, layout, model, configuration, versions.

    Raises:
        CheckpointError: the file is missing, or holds no JSON object.
    """
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (OSError, *BAD_JSON) as error:
        raise CheckpointError(f"{folder}: {STATE} is damaged: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder}: {STATE} is damaged: no object, but {type(state).__name__}")
    return state


def check_file(folder: Path, record: FileRecord) -> str | None:
    """Compare a file with its record. Returns what is wrong (missing, wrong size, wrong checksum), or None."""
    path, checksum = folder / record.name, Checksum(sha256=record.sha256 is not None)
    try:
        size = path.stat().st_size
        if size != record.size_bytes:
            return f"{record.name}: {size} bytes, the manifest says {record.size_bytes}"
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            buffer = memoryview(bytearray(min(READ_BYTES, max(size, 1))))
            while count := file.readinto(buffer):
                checksum.update(buffer[:count])
    except OSError as error:
        return f"{record.name}: {error.strerror}"
    found = checksum.record(record.name)
    if found.xxh3 != record.xxh3:
        return f"{record.name}: checksum {found.xxh3}, the manifest says {record.xxh3}"
    if found.sha256 != record.sha256:
        return f"{record.name}: sha256 {found.sha256}, the manifest says {record.sha256}"
    return None


def misnamed(folder: Path) -> list[str]:
    """What is wrong with the name of a checkpoint's folder: it gives another step than the checkpoint is of."""
    if not folder.name.startswith("step_") or not folder.name[5:].isdigit():
        return []
    try:
        step = json.loads((folder / STATE).read_text(encoding="utf-8"))["step"]
    except (OSError, *BAD_JSON, KeyError, TypeError):  # the file's own check tells
        return []
    return [] if step == step_of(folder) else [f"is of step {step}: rename it to {step_name(step)}"]


def verify_files(folder: Path, *, processes: int, with_index: bool = True) -> list[str]:
    """Every damaged or missing file of a checkpoint. Several processes read them, and compare bytes alone.

    Args:
        with_index: also check the index. A checkpoint loads without it.

    Raises:
        CheckpointError: the manifest itself cannot be used.
    """
    records, index = read_records(folder)
    if with_index and index is not None:
        records = [*records, index]
    if processes == 1 or len(records) == 1:
        found = [check_file(folder, record) for record in records]
    else:
        largest_first = sorted(records, key=lambda record: -record.size_bytes)
        with ProcessPoolExecutor(min(processes, len(records))) as pool:
            found = list(pool.map(check_file, [folder] * len(records), largest_first))
    return sorted(problem for problem in found if problem)


def newest_whole(root: Path, *, processes: int) -> tuple[Path | None, list[str]]:
    """The newest checkpoint with its step's name and its files' sizes and checksums; and why newer ones were rejected."""
    rejected = []
    for folder in step_folders(root):
        try:
            problems = misnamed(folder) + verify_files(folder, processes=processes, with_index=False)
        except CheckpointError as error:
            problems = [str(error)]
        if not problems:
            return folder, rejected
        rejected.append(f"{folder.name}: {problems[0]}")
    return None, rejected


def step_folders(root: Path) -> Iterator[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in Path(root).glob("step_*") if p.name[5:].isdigit() and p.is_dir()]
    yield from sorted(found, key=step_of, reverse=True)


def step_name(step: int) -> str:
    """The name of a step's checkpoint folder."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name[5:])


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder for a path that a user gives.

    Args:
        path: a checkpoint folder, or a checkpoints/ or run folder, whose newest checkpoint is taken.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (path, RunFolder(path).checkpoints):
        if (folder / MANIFEST).is_file():
            return folder
        newest = next((p for p in step_folders(folder) if (p / MANIFEST).is_file()), None)
        if newest is not None:
            return newest
    raise CheckpointError(f"{path}: no checkpoint there (looked for step_*/manifest.json and checkpoints/)")


def read_latest(root: Path) -> Path | None:
    """The folder that the latest pointer names; None where there is no pointer, or a damaged one."""
    try:
        return Path(root) / Path(json.loads((Path(root) / LATEST).read_bytes())).name
    except (OSError, *BAD_JSON, TypeError):
        return None


def to_remove(root: Path, *, keep: int, keep_every: int, good: Path | None = None) -> list[Path]:
    """The checkpoints to remove: all but the newest `keep`, those of every `keep_every`-th step, and `good`.

    Args:
        keep_every: also keep the checkpoints whose step is a multiple of it; 0 for none.
        good: a checkpoint that is known to be whole. It stays: newer ones may be damaged.
    """
    whole = [folder for folder in step_folders(root) if (folder / MANIFEST).is_file()]
    return [f for f in whole[keep:] if f != good and not (keep_every and step_of(f) % keep_every == 0)]


def remove_leftovers(root: Path) -> list[str]:
    """Remove the folders of interrupted saves; returns their names."""
    restore_replaced(root)
    leftovers = sorted(Path(root).glob(f"{TEMPORARY}*"))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return [leftover.name for leftover in leftovers]


def remove(folders: Iterable[Path], *, wait: bool = True) -> list[str]:
    """Remove checkpoints. Each loses its name first, so that a half-removed one is never taken for a whole one.

    Args:
        wait: return when the files are gone. Otherwise a thread removes them (gigabytes take seconds), and the process waits
            for it before it exits.

    Returns:
        The folders that could not be removed, and why. A folder that does not exist is no problem.
    """
    doomed, problems = [], []
    for folder in folders:
        name = folder.with_name(f"{TEMPORARY}removed-{folder.name}-{uuid.uuid4().hex[:8]}")
        try:
            os.replace(folder, name)
            doomed.append(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{folder}: cannot be removed: {error.strerror}")
    thread = threading.Thread(target=lambda: [shutil.rmtree(name, ignore_errors=True) for name in doomed])
    thread.start()
    if wait:
        thread.join()
    return problems
