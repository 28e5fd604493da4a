"""Encode a file of texts to a .npy file of vectors, block by block. After a kill, the same call goes on where it ended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flagscale_like.data.formats import format_of
from flagscale_like.data.readers import read_documents
from flagscale_like.errors import DataError, required
from flagscale_like.recipes.embedder import BLOCK, Embedder, Side, Text, shortened
from flagscale_like.recipes.progress import Progress
from flagscale_like.runtime.parallel import agree


class VectorFile:
    """A .npy file that is written block by block; see Progress.

    Args:
        shape: [rows, numbers of a vector].

    Attributes:
        done: rows that an interrupted call has written.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int], dtype: np.dtype, made_from: dict[str, Any], *, overwrite: bool
    ) -> None:
        self._progress, self.done = Progress(path, made_from, overwrite=overwrite), 0
        if self._progress.found is not None:
            self.done = self._progress.found["rows"]
            self._rows = np.load(self._progress.partial, mmap_mode="r+")
        else:
            self._rows = np.lib.format.open_memmap(self._progress.partial, mode="w+", dtype=dtype, shape=shape)
            self._progress.note(rows=0)

    def add(self, vectors: np.ndarray) -> None:
        """Write the next rows; they are on disk when it returns."""
        self._rows[self.done : self.done + len(vectors)] = vectors
        self._rows.flush()
        self.done += len(vectors)
        self._progress.note(rows=self.done)

    def close(self) -> None:
        """Give the whole file its name."""
        del self._rows
        self._progress.finish()


def read_texts(path: Path, key: str) -> Iterator[str]:
    """The texts of a file, in order: the lines of a text file, or a field of JSON records.

    Raises:
        DataError: a text is empty or missing.
    """
    content = format_of(path).content
    expected = 1
    is_text = content == "text"
    for document in read_documents([path], unit="line") if is_text else read_documents([path], key=key):
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
            file.add(shortened(required(vectors, "vectors on rank 0"), dimensions))
    if file is not None:
        file.close()
    return count
