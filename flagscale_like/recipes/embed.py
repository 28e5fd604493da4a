"""Encode a file of texts to a .npy file of vectors, block by block. After a kill, the same call goes on where it ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flagscale_like.data.formats import format_of
from flagscale_like.data.readers import read_documents
from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_JSON, write_json
from flagscale_like.recipes.embedder import BLOCK, Embedder, Side, Text, shortened
from flagscale_like.runtime.parallel import agree


class VectorFile:
    """A .npy file that is written block by block, under another name until it is whole.

    Args:
        path: of the file.
        shape: [rows, numbers of a vector].
        made_from: everything that the vectors depend on, as JSON types. A file that was begun with something else is refused.
        overwrite: replace a file that is there.

    Attributes:
        done: rows that an interrupted call has written.

    Raises:
        DataError: the file is there and `overwrite` is false; or it was begun with something else.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int], dtype: np.dtype, made_from: dict[str, Any], *, overwrite: bool
    ) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.progress, self.made_from, self.done = path.with_name(path.name + ".progress.json"), made_from, 0
        if path.is_file() and not overwrite:
            raise DataError(f"{path}: exists: choose another file, or replace it with --overwrite")
        if self.progress.is_file() and self.partial.is_file():
            self.done = self._read_progress()
            self.rows = np.load(self.partial, mmap_mode="r+")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.rows = np.lib.format.open_memmap(self.partial, mode="w+", dtype=dtype, shape=shape)
            self._write_progress()

    def _read_progress(self) -> int:
        try:
            found = json.loads(self.progress.read_text(encoding="utf-8"))
            done = int(found.pop("done"))
        except (*BAD_JSON, KeyError, TypeError):
            raise DataError(f"{self.progress}: cannot be read: remove it and {self.partial} to start again") from None
        wanted = json.loads(json.dumps(self.made_from))
        different = [name for name in wanted if found.get(name) != wanted[name]]
        if different:
            raise DataError(
                f"{self.partial}: was begun by a call that differs in {', '.join(different)}: repeat that command, or remove "
                f"it and {self.progress.name} to start again"
            )
        return done

    def _write_progress(self) -> None:
        write_json(self.progress, {**self.made_from, "done": self.done})

    def add(self, vectors: np.ndarray) -> None:
        """Write the next rows; they are on disk when it returns."""
        self.rows[self.done : self.done + len(vectors)] = vectors
        self.rows.flush()
        self.done += len(vectors)
        self._write_progress()

    def close(self) -> None:
        """Give the whole file its name."""
        del self.rows
        os.replace(self.partial, self.path)
        self.progress.unlink()


def read_texts(path: Path, key: str) -> Iterator[str]:
    """The texts of a file, in order: the lines of a text file, or a field of JSON records.

    Raises:
        DataError: a text is empty or missing.
    """
    content = format_of(path).content
    options = {"unit": "line"} if content == "text" else {"key": key}
    expected = 1
    for document in read_documents([path], **options):
        if content == "text" and document.line != expected:
            raise DataError(f"{path}:{expected}: the text is empty: each line has a vector: remove it")
        if not document.text.strip():
            raise DataError(f"{path}:{document.line}: the text is empty: each line has a vector: remove it")
        expected = document.line + 1
        yield document.text


def embed_file(  # most parameters are one option of the command `embed` each
    embedder: Embedder,
    path: Path,
    out: Path,
    *,
    made_from: dict[str, Any],
    key: str = "text",
    side: Side = "passage",
    dtype: Literal["float32", "float16"] = "float32",
    dimensions: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write the vectors of a file's texts, one row a text, to `out`. All ranks call it.

    A file that a kill interrupted goes on where it ended, and has the bytes of one that was written at once.

    Args:
        made_from: what else the vectors depend on: the weights, the layout.
        key, side: see read_texts() and Embedder.encode().
        dimensions: keep so many numbers of each vector, and scale it to length 1 again.

    Returns:
        The number of texts.

    Raises:
        DataError: on every rank: see read_texts() and VectorFile.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    stat, ctx = path.stat(), embedder.ctx
    count = agree(ctx, lambda: sum(1 for _ in read_texts(path, key)))
    everything = {
        **made_from,
        "input": [str(path), stat.st_size, stat.st_mtime_ns],
        "key": key,
        "instruction": embedder.settings.instructions.get(side, ""),
        "max_tokens": embedder.limit(side),
        "dimensions": dimensions or embedder.size,
        "dtype": dtype,
        "block": BLOCK,
    }
    shape = (count, dimensions or embedder.size)
    file = agree(
        ctx,
        lambda: VectorFile(out, shape, np.dtype(dtype), everything, overwrite=overwrite) if ctx.is_main else None,
    )
    done = int(ctx.broadcast(file.done if file is not None else 0))
    texts = islice(read_texts(path, key), done, None)
    while block := list(islice(texts, BLOCK)):
        vectors = embedder.encode([Text(text) for text in block], side)
        if file is not None:
            file.add(shortened(vectors, dimensions))
    if file is not None:
        file.close()
    return count
