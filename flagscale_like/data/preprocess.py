"""jsonl, text and parquet -> megatron-core's .bin/.idx, and a table that leads from a document back to its source line."""

from __future__ import annotations

import glob
import json
import multiprocessing
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError

PYTHON_STDLIB = "python-stdlib"
BATCH_CHARACTERS = 1 << 18

TextUnit = Literal["file", "line", "paragraph"]


@dataclass(frozen=True)
class Document:
    """A text and where it came from. `line` counts from 1: of the text's first line, or the parquet row."""

    source: str
    line: int
    text: str


@dataclass(frozen=True)
class Summary:
    """What a preprocessing run did."""

    documents: int
    tokens: int
    empty: int


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files of files, folders (searched for .jsonl, .txt, .parquet, .md and .py) and globs, sorted.

    `python-stdlib` stands for the running Python's own source, without its tests.

    Raises:
        DataError: a pattern matches nothing.
    """
    files: list[Path] = []
    for pattern in patterns:
        if pattern == PYTHON_STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
            found = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        elif Path(pattern).is_dir():
            suffixes = {".jsonl", ".txt", ".parquet", ".md", ".py"}
            found = [p for p in Path(pattern).rglob("*") if p.suffix in suffixes]
        else:
            found = [Path(p) for p in glob.glob(pattern, recursive=True)]
        if not found:
            raise DataError(f"input {pattern!r}: matches no file")
        files += sorted(p for p in found if p.is_file())
    return files


def read_documents(files: Sequence[Path], *, key: str = "text", unit: TextUnit = "file") -> Iterator[Document]:
    """The documents of the files, in order.

    Args:
        key: the field of a jsonl line or the column of a parquet file that holds the text.
        unit: what a document is in a plain text file.

    Raises:
        DataError: a line is no JSON, has no text, or is no UTF-8; the message names file and line.
    """
    for path in files:
        source = str(path)
        if path.suffix == ".parquet":
            yield from _read_parquet(path, key)
        elif path.suffix == ".jsonl":
            for line, raw in enumerate(_lines(path), start=1):
                if not raw.strip():
                    continue
                try:
                    text = json.loads(raw)[key]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}:{line}: no JSON object with a {key!r} field ({error})") from None
                if not isinstance(text, str):
                    raise DataError(f"{path}:{line}: {key!r} is {type(text).__name__}, not text")
                yield Document(source, line, text)
        elif unit == "file":
            yield Document(source, 1, "".join(_lines(path)))
        elif unit == "line":
            for line, text in enumerate(_lines(path), start=1):
                if text.strip():
                    yield Document(source, line, text.rstrip("\n"))
        else:
            yield from _paragraphs(path)


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    yield raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{line}: not UTF-8 at byte {error.start} of the line") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _paragraphs(path: Path) -> Iterator[Document]:
    held: list[str] = []
    start = 1
    for line, text in enumerate(_lines(path), start=1):
        if text.strip():
            start = start if held else line
            held.append(text)
        elif held:
            yield Document(str(path), start, "".join(held))
            held = []
    if held:
        yield Document(str(path), start, "".join(held))


def _read_parquet(path: Path, key: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if key not in file.schema_arrow.names:
            raise DataError(f"{path}: has no column {key!r}; its columns: {', '.join(file.schema_arrow.names)}")
        row = 0
        for batch in file.iter_batches(columns=[key]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is not None:
                    yield Document(str(path), row, text)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


_worker_tokenizer: Tokenizer | None = None


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = Tokenizer(folder)


def _encode(batch: list[Document]) -> list[tuple[str, int, np.ndarray]]:
    assert _worker_tokenizer is not None
    ids = _worker_tokenizer.encode_batch([document.text for document in batch])
    return [(d.source, d.line, np.array(i, dtype=np.int32)) for d, i in zip(batch, ids, strict=True)]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def preprocess(
    files: Sequence[Path],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    *,
    key: str = "text",
    unit: TextUnit = "file",
    workers: int = 1,
    progress: Callable[[int], None] = lambda characters: None,
) -> Summary:
    """Tokenize files into PREFIX.bin, PREFIX.idx and PREFIX.documents.parquet, which appear when all is done.

    Row i of the table is document i of the index: `source` and `line`. Each document ends with the tokenizer's
    end-of-text token; empty ones are dropped and counted. The result does not depend on `workers`.

    Args:
        workers: processes that tokenize; 1 works in this process.
        progress: called with the characters of each batch that is done.

    Raises:
        DataError: bad input, or no document in it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = Tokenizer(tokenizer_folder)
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    targets = {suffix: Path(f"{prefix}{suffix}") for suffix in (".bin", ".documents.parquet", ".idx")}
    partial = {suffix: Path(f"{path}.partial") for suffix, path in targets.items()}
    builder = IndexedDatasetBuilder(str(partial[".bin"]), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    sources: dict[str, int] = {}
    source_ids: list[int] = []
    lines: list[int] = []
    tokens = empty = 0

    batches = _batches(read_documents(files, key=key, unit=unit))
    pool = None
    try:
        if workers > 1:
            pool = multiprocessing.get_context("spawn").Pool(workers, _start_worker, (str(tokenizer_folder),))
            encoded = pool.imap(_encode, batches)
        else:
            _start_worker(str(tokenizer_folder))
            encoded = map(_encode, batches)
        for batch in encoded:
            for source, line, ids in batch:
                if len(ids) == 0:
                    empty += 1
                    continue
                builder.add_document(torch.from_numpy(np.append(ids, np.int32(tokenizer.eod))), [len(ids) + 1])
                source_ids.append(sources.setdefault(source, len(sources)))
                lines.append(line)
                tokens += len(ids) + 1
            progress(sum(len(ids) for _, _, ids in batch))
        if not lines:
            raise DataError(f"no document with text in {len(files)} files")
        builder.finalize(str(partial[".idx"]))
        names = pa.DictionaryArray.from_arrays(pa.array(source_ids, pa.int32()), pa.array(list(sources)))
        pq.write_table(pa.table({"source": names, "line": pa.array(lines, pa.int64())}), partial[".documents.parquet"])
        for suffix, path in targets.items():  # .idx last: without it there is no dataset
            os.replace(partial[suffix], path)
    finally:
        if pool is not None:
            pool.terminate()
        for path in partial.values():
            path.unlink(missing_ok=True)
    return Summary(len(lines), tokens, empty)
