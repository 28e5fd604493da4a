"""Reads the documents of jsonl, text and parquet files, plain or compressed, each with its source file and line."""

from __future__ import annotations

import functools
import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from flagscale_like.errors import DataError

PYTHON_STDLIB = "python-stdlib"
TEXT_SUFFIXES = {".jsonl", ".txt", ".md", ".py"}
COMPRESSED = {".gz", ".zst"}

TextUnit = Literal["file", "line", "paragraph"]
BadLines = Literal["stop", "skip"]


@dataclass(frozen=True)
class Document:
    """A text and its origin. `line` is the number of the text's first line, or of the parquet row, counted from 1."""

    source: str
    line: int
    text: str


@dataclass(frozen=True)
class BadLine:
    """A line or a row without a document, and the reason."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Piece:
    """A part of a file: the lines whose first byte is in [start, end). `end` None reads to the end of the file."""

    path: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        key: the field of a jsonl line, or the column of a parquet file, that holds the text. None: the text is the line.
        unit: what one document is in a plain text file: the file, a line, or a paragraph.
        max_document_bytes: a longer line is a BadLine, and with unit `file` a longer file is. It bounds the memory.
    """

    key: str | None = "text"
    unit: TextUnit = "file"
    max_document_bytes: int = 64 << 20


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Expand files, folders and globs to a list of files without duplicates.

    From a folder, and the folders in it, come the files .jsonl, .txt, .md and .py, plain or with .gz or .zst, and .parquet.
    The pattern `python-stdlib` stands for the source of the running Python's standard library, without its tests.

    Raises:
        DataError: a pattern matches no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        if pattern == PYTHON_STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
            found = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        elif Path(pattern).is_dir():
            found = [p for p in Path(pattern).rglob("*") if kind(p) in TEXT_SUFFIXES | {".parquet"}]
        else:
            found = [Path(p) for p in glob.glob(pattern, recursive=True)]
        found = [p for p in found if p.is_file()]
        if not found:
            raise DataError(f"input {pattern!r}: matches no file")
        files += sorted(found)
    return list({os.path.abspath(file): file for file in files}.values())


def kind(path: Path) -> str:
    """The suffix that names a file's format, without the suffix of its compression: .jsonl for x.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def can_split(path: Path, unit: TextUnit) -> bool:
    """Whether a file can be divided into pieces: each document is one line, and the file is not compressed."""
    return path.suffix not in COMPRESSED and path.suffix != ".parquet" and (kind(path) == ".jsonl" or unit == "line")


def read_documents(
    files: Sequence[Path], *, key: str = "text", unit: TextUnit = "file", bad_lines: BadLines = "stop"
) -> Iterator[Document]:
    """Yield the documents of the files, in order.

    Args:
        key, unit: see ReadOptions.
        bad_lines: `skip` skips lines without a document.

    Raises:
        DataError: a file cannot be read; or a line holds no document and `bad_lines` is `stop`.
    """
    for path in files:
        for found in PieceReader(Piece(str(path)), ReadOptions(key=key, unit=unit)):
            if isinstance(found, Document):
                yield found
            elif bad_lines == "stop":
                raise DataError(str(found))


class PieceReader:
    """Iterates over the documents and the bad lines of a piece, in order, with one line in memory at a time.

    Attributes:
        lines: lines or rows read so far. `Document.line` counts from the start of the piece.

    Raises:
        DataError: during iteration, if the file cannot be read.
    """

    def __init__(self, piece: Piece, options: ReadOptions) -> None:
        self.piece, self.options, self.lines = piece, options, 0
        self._path = Path(piece.path)

    def __iter__(self) -> Iterator[Document | BadLine]:
        try:
            if self._path.suffix == ".parquet":
                yield from self._rows()
                return
            with open(self._path, "rb") as file:
                stream = _decompressed(file, self._path.suffix)
                try:
                    yield from self._read(stream)
                except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdDamaged) as error:
                    yield self._bad(self.lines + 1, f"the compressed file is damaged or truncated about here ({error})")
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {error.strerror or error}") from None

    def _bad(self, line: int, reason: str) -> BadLine:
        return BadLine(self.piece.path, line, reason)

    def _read(self, stream: BinaryIO) -> Iterator[Document | BadLine]:
        if kind(self._path) == ".jsonl":
            for found in self._lines(stream):
                yield self._parse(found) if isinstance(found, Document) and self.options.key is not None else found
        elif self.options.unit == "line":
            for found in self._lines(stream):
                text = found.text.rstrip("\r\n") if isinstance(found, Document) else ""
                yield Document(found.source, found.line, text) if isinstance(found, Document) else found
        elif self.options.unit == "paragraph":
            yield from self._paragraphs(stream)
        else:
            yield self._whole(stream)

    def _lines(self, stream: BinaryIO, *, blank: bool = False) -> Iterator[Document | BadLine]:
        """Yield each line as a Document, or a BadLine. Blank lines are left out unless `blank` is True."""
        limit, position = self.options.max_document_bytes, self.piece.start
        if (
            position
        ):  # skip to the first line that starts in this piece; a line that starts before it is the previous piece's
            stream.seek(position - 1)
            position += sum(len(part) for part in _line_parts(stream, limit)) - 1
        while self.piece.end is None or position < self.piece.end:
            raw, size = b"", 0
            for part in _line_parts(stream, limit):
                raw, size = (part if not size else raw), size + len(part)
            if not size:
                return
            self.lines += 1
            first = position == 0
            position += size
            if size > limit:
                yield self._bad(self.lines, f"has {size:,} bytes, more than max_document_bytes ({limit:,})")
                continue
            if first:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
            if not blank and not raw.strip():
                continue
            try:
                yield Document(self.piece.path, self.lines, raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield self._bad(self.lines, f"not UTF-8 at byte {error.start} of the line")

    def _parse(self, line: Document) -> Document | BadLine:
        key = self.options.key
        try:
            text = json.loads(line.text)[key]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            return self._bad(line.line, f"no JSON object with a {key!r} field ({type(error).__name__}: {error})")
        return self._checked(line.line, text)

    def _checked(self, line: int, text: object) -> Document | BadLine:
        if not isinstance(text, str):
            return self._bad(line, f"{self.options.key!r} is {type(text).__name__}, not text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return self._bad(line, f"{self.options.key!r} has an unpaired surrogate at character {error.start}")
        return Document(self.piece.path, line, text)

    def _paragraphs(self, stream: BinaryIO) -> Iterator[Document | BadLine]:
        held: list[Document] = []
        broken = False  # a paragraph with a bad line is skipped as a whole
        for found in self._lines(stream, blank=True):
            if isinstance(found, BadLine):
                held, broken = [], True
                yield found
            elif not found.text.strip():
                if held:
                    yield Document(held[0].source, held[0].line, "".join(d.text for d in held))
                held, broken = [], False
            elif not broken:
                held.append(found)
        if held:
            yield Document(held[0].source, held[0].line, "".join(d.text for d in held))

    def _whole(self, stream: BinaryIO) -> Document | BadLine:
        limit = self.options.max_document_bytes
        raw = stream.read(limit + 1)
        self.lines += 1
        if len(raw) > limit:
            return self._bad(1, f"the file has more than max_document_bytes ({limit:,})")
        try:
            return Document(self.piece.path, 1, raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
        except UnicodeDecodeError as error:
            line_start = raw.rfind(b"\n", 0, error.start) + 1
            where = raw.count(b"\n", 0, error.start) + 1
            return self._bad(where, f"not UTF-8 at byte {error.start - line_start} of the line")

    def _rows(self) -> Iterator[Document | BadLine]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        key = self.options.key or "(none)"
        try:
            file = pq.ParquetFile(self._path)
        except pa.ArrowException as error:
            raise DataError(f"{self._path}: cannot be read: {error}") from None
        if key not in file.schema_arrow.names:
            raise DataError(f"{self._path}: has no column {key!r}; its columns: {', '.join(file.schema_arrow.names)}")
        try:
            for batch in file.iter_batches(columns=[key], batch_size=256):
                for text in batch.column(0).to_pylist():
                    self.lines += 1
                    yield self._checked(self.lines, text)
        except (OSError, pa.ArrowException) as error:
            yield self._bad(self.lines + 1, f"the rows from here on cannot be read ({str(error).splitlines()[0]})")


def _line_parts(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    """Yield the next line in parts of at most limit + 1 bytes, which bounds the memory that a long line takes."""
    while part := stream.readline(limit + 1):
        yield part
        if part.endswith(b"\n"):
            return


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(file), 1 << 20)
    return file


class _ZstdDamaged(Exception):
    """A zstd frame is truncated or invalid."""


class _ZstdFile(io.RawIOBase):
    """Decompresses the frames of a .zst file. The stream reader of the zstandard library does not notice a truncated file."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        # 2 GiB is the window of `zstd --ultra --long=31`, the largest window that the zstd command writes.
        self._begin = functools.partial(zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj)
        self._error = zstandard.ZstdError
        self._file, self._frame, self._held = file, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._held:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if self._frame is not None and self._frame.eof:
                self._frame = None
            chunk = rest or self._file.read(
                1 << 14
            )  # small, because a chunk can decompress to thousands of times its size
            if not chunk:
                if self._frame is not None:
                    raise _ZstdDamaged("the last frame has no end")
                return 0
            self._frame = self._frame or self._begin()
            try:
                self._held = self._frame.decompress(chunk)
            except self._error as error:
                raise _ZstdDamaged(str(error)) from None
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count
