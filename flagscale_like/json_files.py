"""Files of JSON, as every part of the project writes and reads them: one object, or one record a line."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# json.loads raises RecursionError on nesting that only an attacker writes.
BAD_JSON = (ValueError, RecursionError)
# What reading values raises that are not those which the program wrote: int(inf) is an OverflowError.
BAD_VALUES = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
# A disk that takes no more is no bug of ours, wherever it is met.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

BLOCK_BYTES = 1 << 16

_failing: set[str] = set()


@contextmanager
def dispensable(path: Path | str) -> Iterator[None]:
    """Write to a file that a run can do without: records, plots.

    If the disk takes no more, one line says so and the block is given up. A second line says when the file is written again.
    Other errors are raised.
    """
    name = str(path)
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        if name not in _failing:
            _failing.add(name)
            print(f"warning: {name}: {error.strerror}: training goes on without what belongs there", file=sys.stderr)
    else:
        if name in _failing:
            _failing.discard(name)
            print(f"{name}: is written again; what was left out is lost", file=sys.stderr)


def write_json(path: Path, value: object) -> bytes:
    """Write one JSON value through a temporary file, an fsync and a rename; returns the bytes written."""
    data = json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"
    replace_file(path, data)
    return data


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, and never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def open_records(path: Path) -> IO[bytes]:
    """Open a file of records for appending. A last line that a kill cut short is ended, so that it spoils no other."""
    file = open(path, "a+b")  # noqa: SIM115
    if file.tell():
        file.seek(-1, os.SEEK_END)
    if file.read(1) not in (b"", b"\n"):
        file.write(b"\n")
    return file


def write_record(file: IO[bytes], record: Mapping[str, Any]) -> None:
    """Add one line. NaN and infinity are no JSON and become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    file.write(json.dumps(finite).encode("utf-8") + b"\n")
    file.flush()


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line to a file that a run can do without; see `dispensable`."""
    with dispensable(path), open_records(path) as file:
        write_record(file, record)


def lines_of(text: str) -> list[str]:
    """The lines of a text that has a JSON value in each.

    Only a line feed ends one. str.splitlines() also ends a line at U+2028, U+2029 and U+0085, which JSON allows in a text.
    """
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def read_records(path: Path) -> list[dict[str, Any]]:
    """All of records(): for a file that is short."""
    return list(records(path))


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file's lines, one by one. A line that holds none (cut short by a kill) is left out, and said."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            record = _parsed(line.removesuffix(b"\n"))
            if record is not None:
                yield record
            elif line != b"\n":
                print(f"{path}: an unreadable line was left out", file=sys.stderr)


def records_backwards(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a file from the last one on, each with the byte at which its line begins. No more is read than is taken.

    A line that holds no JSON object is left out, and said.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        begin, rest = (
            file.seek(0, os.SEEK_END),
            b"",
        )  # rest: of the file's bytes from `begin` on, the unfinished first line
        while begin:
            size = min(BLOCK_BYTES, begin)
            begin -= size
            file.seek(begin)
            block = file.read(size) + rest
            end, lines = begin + len(block), block.split(b"\n")
            for line in reversed(lines[1:] if begin else lines):
                at = end - len(line)
                end = at - 1
                record = _parsed(line)
                if record is not None:
                    yield at, record
                elif line:
                    print(f"{path}: an unreadable line was left out", file=sys.stderr)
            rest = lines[0]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8", errors="replace")) if line else None
    except BAD_JSON:
        return None
    return record if isinstance(record, dict) else None


def keep_records(path: Path, key: str, last: int, *, in_order: str = "") -> None:
    """Drop the records at the end whose `key` is greater than `last`: the run that goes on from there writes them again.

    Earlier ones stay, those too that a rewind gave up. A file of any length is read from its end, and cut there.

    Args:
        in_order: a name that only records have whose `key` grows; others may come late, as the time that a save took does.
    """
    cut, late = None, []
    for at, record in records_backwards(path):
        if record.get(key, 0) > last:
            cut = at
        elif in_order and in_order not in record:
            late.append((at, record))
        else:
            break
    if cut is None:
        return
    with open(path, "r+b") as file:
        file.truncate(cut)
        file.seek(cut)
        for at, record in reversed(late):
            if at > cut:
                write_record(file, record)
