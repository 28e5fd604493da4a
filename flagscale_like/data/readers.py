"""Reads the documents of JSON, text and parquet files, plain or compressed, each with its source file and line."""

from __future__ import annotations

import codecs
import glob
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flagscale_like.data.formats import (
    DAMAGE,
    JSON_NAME,
    LINES_NAMES,
    PARQUET_NAMES,
    Content,
    Stream,
    ZstdDamagedError,
    decompressed,
    format_of,
    printable,
    suffix_of,
)
from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_JSON

PYTHON_STDLIB = "python-stdlib"
FOLDER_NAMES = {*LINES_NAMES, JSON_NAME, *PARQUET_NAMES, ".txt", ".md", ".py"}
DEFAULT_KEY = "text"
WHITE = " \t\r\n"

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
        key: the field of a JSON record, or the column of a parquet file, that holds the text; `meta.text` is the field text
            of the field meta. None: the text is the record itself, as JSON.
        unit: what one document is in a plain text file: the file, a line, or a paragraph.
        max_document_bytes: a longer line is a BadLine, and with unit `file` a longer file is. It bounds the memory.
    """

    key: str | None = DEFAULT_KEY
    unit: TextUnit = "file"
    max_document_bytes: int = 64 << 20


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Expand files, folders and globs to a list of files without duplicates.

    From a folder, and the folders in it, come the files whose names are in FOLDER_NAMES, plain or compressed; a line says
    what else is there. A name that exists is a file, whatever brackets it has. The pattern `python-stdlib` stands for the
    source of the running Python's standard library, without its tests.

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
            found = _in_folder(Path(pattern))
        elif Path(pattern).exists():
            found = [Path(pattern)]
        else:
            found = [Path(p) for p in glob.glob(pattern, recursive=True)]
        found = [p for p in found if p.is_file()]
        if not found:
            raise DataError(f"input {printable(pattern)!r}: matches no file")
        files += sorted(found)
    return list({os.path.abspath(file): file for file in files}.values())


def _in_folder(folder: Path) -> list[Path]:
    """The files that are read from a folder. The others are said on stderr."""
    there = [path for path in folder.rglob("*") if path.is_file()]
    found = [path for path in there if suffix_of(path) in FOLDER_NAMES]
    left = sorted({suffix_of(path) or "no suffix" for path in there} - FOLDER_NAMES)
    if left:
        print(
            f"{printable(folder)}: {len(there) - len(found)} files of other names ({', '.join(left[:8])}) are left out: name "
            "them, or a glob, to read them",
            file=sys.stderr,
        )
    return found


def can_split(path: Path, unit: TextUnit) -> bool:
    """Whether a file can be divided into pieces: each document is one line, and the file is not compressed."""
    found = format_of(path)
    return found.compression is None and (found.content == "json lines" or (found.content, unit) == ("text", "line"))


def read_documents(
    files: Sequence[Path], *, key: str | None = "text", unit: TextUnit = "file", bad_lines: BadLines = "stop"
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
        self._path, self._name = Path(piece.path), printable(piece.path)

    def __iter__(self) -> Iterator[Document | BadLine]:
        found = format_of(self._path)
        if found.content == "text" and self.options.key not in (None, DEFAULT_KEY):
            raise DataError(f"{self._name}: is text, and has no field {self.options.key!r}: leave out --key")
        try:
            if found.content == "parquet":
                yield from self._rows()
                return
            with open(self._path, "rb") as file:
                stream = decompressed(file, found.compression)
                try:
                    yield from self._read(stream, found.content)
                except (*DAMAGE, ZstdDamagedError) as error:
                    yield self._bad(self.lines + 1, f"the compressed file is damaged or truncated about here ({error})")
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read: {error.strerror or error}") from None

    def _bad(self, line: int, reason: str) -> BadLine:
        return BadLine(self._name, line, reason)

    def _read(self, stream: Stream, content: Content) -> Iterator[Document | BadLine]:
        if content == "json lines":
            for found in self._lines(stream):
                yield self._parse(found) if isinstance(found, Document) and self.options.key is not None else found
        elif content == "json array":
            yield from self._array(stream)
        elif self.options.unit == "line":
            for found in self._lines(stream):
                text = found.text.rstrip("\r\n") if isinstance(found, Document) else ""
                yield Document(found.source, found.line, text) if isinstance(found, Document) else found
        elif self.options.unit == "paragraph":
            yield from self._paragraphs(stream)
        else:
            yield self._whole(stream)

    def _lines(self, stream: Stream, *, blank: bool = False) -> Iterator[Document | BadLine]:
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
                yield Document(self._name, self.lines, raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield self._bad(self.lines, f"not UTF-8 at byte {error.start} of the line")

    def _parse(self, line: Document) -> Document | BadLine:
        try:
            record = json.loads(line.text)
        except BAD_JSON as error:
            return self._bad(
                line.line, f"no JSON object with a {self.options.key!r} field ({type(error).__name__}: {error})"
            )
        return self._of_record(line.line, record)

    def _of_record(self, line: int, record: object) -> Document | BadLine:
        key = self.options.key
        if key is None:
            return Document(self._name, line, json.dumps(record, ensure_ascii=False))
        value = record
        for part in [key] if isinstance(record, dict) and key in record else key.split("."):
            if not isinstance(value, dict) or part not in value:
                fields = f"its fields: {', '.join(map(str, record))[:200]}" if isinstance(record, dict) else "no object"
                return self._bad(line, f"no JSON object with a {key!r} field ({fields})")
            value = value[part]
        return self._checked(line, value)

    def _array(self, stream: Stream) -> Iterator[Document | BadLine]:
        """The records of an array, with one in memory at a time."""
        decoder, limit = json.JSONDecoder(), self.options.max_document_bytes
        text, line, ended = "", 1, False
        decode = codecs.getincrementaldecoder("utf-8-sig")()
        inside = False
        while True:
            rest = text.lstrip(WHITE if not inside else WHITE + ",")
            line += text.count("\n", 0, len(text) - len(rest))
            text = rest
            if text and not inside:
                text, inside = text[1:], True  # the bracket
                continue
            if text.startswith("]"):
                return
            try:
                record, end = decoder.raw_decode(text)
                complete = ended or end < len(text)  # a number may go on
            except BAD_JSON as error:
                record, end, complete, problem = None, 0, False, error
            if complete and text:
                self.lines += 1
                yield self._of_record(line, record)
                line += text.count("\n", 0, end)
                text = text[end:]
                continue
            if ended:
                reason = f"{type(problem).__name__}: {problem}" if text and end == 0 else "it has no end"
                yield self._bad(line, f"the array cannot be read from here on ({reason})")
                return
            if len(text) > limit:
                yield self._bad(
                    line, f"a record has more than max_document_bytes ({limit:,}); what follows is not read"
                )
                return
            try:
                data = stream.read(max(1 << 16, len(text)))
                text, ended = text + decode.decode(data, final=not data), not data
            except UnicodeDecodeError as error:
                yield self._bad(line, f"not UTF-8 about here ({error.reason})")
                return

    def _checked(self, line: int, text: object) -> Document | BadLine:
        if not isinstance(text, str):
            return self._bad(line, f"{self.options.key!r} is {type(text).__name__}, not text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return self._bad(line, f"{self.options.key!r} has an unpaired surrogate at character {error.start}")
        return Document(self._name, line, text)

    def _paragraphs(self, stream: Stream) -> Iterator[Document | BadLine]:
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

    def _whole(self, stream: Stream) -> Document | BadLine:
        limit = self.options.max_document_bytes
        raw = stream.read(limit + 1)
        self.lines += 1
        if len(raw) > limit:
            return self._bad(1, f"the file has more than max_document_bytes ({limit:,})")
        try:
            return Document(self._name, 1, raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
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


def _line_parts(stream: Stream, limit: int) -> Iterator[bytes]:
    """Yield the next line in parts of at most limit + 1 bytes, which bounds the memory that a long line takes."""
    while part := stream.readline(limit + 1):
        yield part
        if part.endswith(b"\n"):
            return
