"""Write a checkpoint anew in another number of files: for transfer, or to leave the optimizer behind.

Loading on another layout needs none of this: the loader resolves any layout. What comes out here is as loadable as what
went in; only the random state of the ranks is left out, which belongs to the layout that saved it.
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

from flagscale_like.checkpoint.format import CheckpointReader, fragment_metadata, write_safetensors
from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.checkpoint.manifest import (
    STATE,
    TEMPORARY,
    FileRecord,
    fsync_folder,
    verify_files,
    write_json,
    write_manifest,
)
from flagscale_like.checkpoint.shard import MOMENTS
from flagscale_like.errors import CheckpointError


def reshard(
    source: Path, out: Path, *, files: int, weights_only: bool, sha256: bool, processes: int
) -> list[FileRecord]:
    """Copy a checkpoint into `files` files of equal size, one in memory at a time; `out` appears when it is whole.

    Raises:
        CheckpointError: `out` exists, or a file of the source is damaged.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists; choose another folder or remove it")
    problems = verify_files(source, processes=processes)
    if problems:
        raise CheckpointError(f"{source}: damaged, not copied: {'; '.join(problems)}")
    reader = CheckpointReader(source)
    kinds = [kind for kind in ("param", *MOMENTS) if reader.has(kind) and not (weights_only and kind != "param")]
    temporary = out.with_name(f"{TEMPORARY}{out.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        records = []
        for index in range(files):
            fragments = list(_share(reader, index, files))
            tensors = [(f"{i}.{kind}", _read(reader, kind, f)) for i, f in enumerate(fragments) for kind in kinds]
            path = temporary / f"rank_{index:05d}.safetensors"
            records.append(write_safetensors(path, tensors, fragment_metadata(fragments), sha256=sha256))
        state = {**reader.state, "layout": {"files": files}}
        records.append(write_json(temporary / STATE, state, sha256=sha256))
        write_manifest(temporary, records)
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


def _read(reader: CheckpointReader, kind: str, fragment: Fragment) -> Tensor:
    out = torch.empty(fragment.numel, dtype=reader.dtype(fragment.key, kind))
    reader.read(kind, fragment, out)
    return out
