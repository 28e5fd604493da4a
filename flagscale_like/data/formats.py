"""FileFormat: what a file of raw data holds, decided by its content and its name. What neither tells is refused."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_JSON

Content = Literal["text", "json lines", "json array", "parquet"]
Compression = Literal["gzip", "zstd", "bz2", "xz"]

# The names that people give to text, without those whose files are records or binary.
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".log", ".srt")
CODE = (
    *(
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".java",
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".rb",
        ".php",
        ".sh",
    ),
    *(".lua", ".sql", ".r", ".jl", ".scala", ".swift", ".kt", ".yaml", ".yml", ".toml", ".ini", ".cfg"),
)
TEXT_NAMES = (*PROSE, *CODE)
LINES_NAMES, JSON_NAME = (".jsonl", ".ndjson", ".jsonlines"), ".json"
PARQUET_NAMES = (".parquet", ".pq")
COMPRESSED_NAMES: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
}
PARQUET_MAGIC = b"PAR1"
TAKEN = (
    "JSON lines (.jsonl, .ndjson, .json), a JSON array of records, parquet, or text by its name (.txt, .md, .html, .py, "
    "...); also compressed by gzip, zstd, bz2 or xz"
)
SAMPLE_BYTES = 1 << 16
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


@dataclass(frozen=True)
class FileFormat:
    """What a file holds, and how it is compressed."""

    content: Content
    compression: Compression | None


class ZstdDamagedError(Exception):
    """A zstd frame is truncated or invalid."""


def printable(path: str | Path) -> str:
    """A path as text that can be printed and stored: bytes of a name that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def suffix_of(path: Path) -> str:
    """The suffix that names a file's content, in lower case: .jsonl for x.jsonl.gz and X.JSONL."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_NAMES else suffix


@functools.lru_cache(maxsize=65536)
def format_of(path: Path) -> FileFormat:
    """What a file holds.

    Raises:
        DataError: the name and the content contradict each other, or neither says what the file is.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(0)
            compression = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
            named = COMPRESSED_NAMES.get(path.suffix.lower())
            if named and head and compression != named:
                raise DataError(f"{printable(path)}: is named {path.suffix}, and its content is not {named}")
            if head.startswith(PARQUET_MAGIC) or (not head and suffix_of(path) in PARQUET_NAMES):
                return FileFormat("parquet", None)
            try:
                sample = decompressed(file, compression).read(SAMPLE_BYTES)
            except (*DAMAGE, ZstdDamagedError, OSError):
                sample = b""  # the name decides; who reads on says what is damaged
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror or error}") from None
    return FileFormat(_content(path, sample.removeprefix(b"\xef\xbb\xbf")), compression)


def _content(path: Path, sample: bytes) -> Content:
    suffix, begin = suffix_of(path), sample.lstrip()[:1]
    records = _records_of(sample)
    if suffix in TEXT_NAMES:
        if records == "json lines" and suffix in PROSE:
            raise DataError(f"{printable(path)}: is named as text, and its lines are JSON objects: rename it to .jsonl")
        return "text"
    if suffix in LINES_NAMES:
        return "json array" if records == "json array" else "json lines"
    if suffix in PARQUET_NAMES:
        return "parquet"
    if records is not None:
        return records
    if suffix == JSON_NAME and not begin:
        return "json lines"  # empty
    if suffix == JSON_NAME and begin == b"{":
        raise DataError(
            f"{printable(path)}: is one JSON object over several lines: write a record on each line, or an array of records"
        )
    raise DataError(f"{printable(path)}: its name and its content do not say what it is: taken are {TAKEN}")


def _records_of(sample: bytes) -> Literal["json lines", "json array"] | None:
    """Whether text begins as lines of JSON objects, or as an array of them."""
    text = sample.lstrip()
    if text[:1] == b"[":
        return "json array" if text[1:].lstrip()[:1] in (b"{", b"]", b"") else None
    if text[:1] != b"{":
        return None
    line, _, rest = text.partition(b"\n")
    if not rest and len(sample) >= SAMPLE_BYTES:
        return "json lines"  # one long line
    try:
        return "json lines" if isinstance(json.loads(line), dict) else None
    except BAD_JSON:
        return None


def decompressed(file: BinaryIO, compression: Compression | None) -> Stream:
    """The content of an open file. Reading raises one of DAMAGE or ZstdDamagedError where it is damaged or cut short."""
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compression == "zstd":
        return io.BufferedReader(_ZstdFile(file), 1 << 20)
    if compression == "bz2":
        return io.BufferedReader(_Bz2File(file), 1 << 20)
    if compression == "xz":
        return lzma.LZMAFile(file)
    return file


Stream = IO[bytes] | io.BufferedIOBase


class _Bz2File(io.RawIOBase):
    """bz2.BZ2File, whose OSError for damaged data is told from one of the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = bz2.BZ2File(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            if error.errno is not None:
                raise
            raise EOFError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)


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

    def readinto(self, buffer: Any, /) -> int:
        while not self._held:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if self._frame is not None and self._frame.eof:
                self._frame = None
            chunk = rest or self._file.read(
                1 << 14
            )  # small, because a chunk can decompress to thousands of times its size
            if not chunk:
                if self._frame is not None:
                    raise ZstdDamagedError("the last frame has no end")
                return 0
            self._frame = self._frame or self._begin()
            try:
                self._held = self._frame.decompress(chunk)
            except self._error as error:
                raise ZstdDamagedError(str(error)) from None
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count
