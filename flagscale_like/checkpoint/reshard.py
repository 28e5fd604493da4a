"""Write a checkpoint anew in another number of files: for transfer, or to leave the optimizer behind.

Loading on another layout needs none of this: the loader resolves any layout. The new folder loads like the old one; only
the random state of the ranks is left out, which belongs to the layout that saved it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from flagscale_like.checkpoint.companions import read_companions, write_companions
from flagscale_like.checkpoint.format import CheckpointReader, finish_folder, specs_of, write_fragments
from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.checkpoint.manifest import (
    COMPANIONS,
    STATE,
    TEMPORARY,
    FileRecord,
    fsync_folder,
    verify_files,
    write_json,
)
from flagscale_like.errors import CheckpointError


def reshard(
    source: Path, out: Path, *, files: int, weights_only: bool, sha256: bool, processes: int
) -> list[FileRecord]:
    """Copy a checkpoint into `files` files of about equal size, one in memory at a time; `out` appears when it is whole.

    A fragment keeps the kinds it has: the weight alone where the weight is frozen, else the moments too.

    Args:
        weights_only: leave the moments out.
        sha256: also record each file's sha256.
        processes: how many processes check the source's files.

    Returns:
        The records of the new files.

    Raises:
        CheckpointError: `out` exists, or a file of the source is damaged.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists; choose another folder or remove it")
    problems = verify_files(source, processes=processes, with_index=False)  # read without it, where it is damaged
    if problems:
        raise CheckpointError(f"{source}: damaged, not copied: {'; '.join(problems)}")
    reader = CheckpointReader(source)
    temporary = out.with_name(f"{TEMPORARY}{out.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        written = []
        for index in range(files):
            fragments = list(_share(reader, index, files))
            tensors = [
                (f"{i}.{kind}", _read(reader, kind, fragment))
                for i, fragment in enumerate(fragments)
                for kind in _kinds(reader, fragment, weights_only=weights_only)
            ]
            path = temporary / f"rank_{index:05d}.safetensors"
            values = (tensor for _, tensor in tensors)
            written.append(write_fragments(path, fragments, values, specs_of(tensors), sha256=sha256))
        state = write_json(temporary / STATE, {**reader.state, "layout": {"files": files}}, sha256=sha256)
        beside = write_companions(
            read_companions([source / COMPANIONS], reader.origin().auto_map), temporary, sha256=sha256
        )
        records = finish_folder(temporary, written, [state, *beside], sha256=sha256)
        os.replace(temporary, out)
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return records


def _share(reader: CheckpointReader, index: int, files: int) -> Iterator[Fragment]:
    """File `index`'s part of all elements, laid one behind the other in the order of their names."""
    shapes = reader.shapes()
    total, begin = sum(map(prod, shapes.values())), 0
    low, high = total * index // files, total * (index + 1) // files
    for key, shape in shapes.items():
        start, stop = max(low - begin, 0), min(high - begin, prod(shape))
        if start < stop:
            yield Fragment(key, shape, (0,) * len(shape), shape, start, stop)
        begin += prod(shape)


def _kinds(reader: CheckpointReader, fragment: Fragment, *, weights_only: bool) -> list[str]:
    """The kinds to copy of a fragment, the weight first.

    Raises:
        CheckpointError: a kind was saved of some of its elements only: a file cannot say which.
    """
    held = reader.kinds(fragment)
    if weights_only:
        held = {"param": held["param"]}
    partial = [kind for kind, of_all in held.items() if not of_all]
    if partial:
        raise CheckpointError(
            f"{reader.folder}: {fragment.key}: only some of its elements have {partial[0]}, not copied"
        )
    return sorted(held, key=lambda kind: (kind != "param", kind))


def _read(reader: CheckpointReader, kind: str, fragment: Fragment) -> Tensor:
    out = torch.empty(fragment.numel, dtype=reader.dtype(fragment.key, kind))
    reader.read(kind, fragment, out)
    return out
