"""Reads and writes the .idx file of a megatron-core dataset as NumPy columns, 20 bytes for each document.

megatron-core's own builder keeps two Python integers for each document, and its reader does not notice a truncated file.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flagscale_like.errors import DataError

HEADER = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
BLOCK = 1 << 20  # documents that are checked at a time
DTYPE_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.float32): 7, np.dtype(np.uint16): 8}
FIXED_BYTES = len(HEADER) + struct.calcsize("<BQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 7: "<f4", 8: "<u2"}  # megatron-core's DType


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of a token in the .bin file, chosen as megatron-core chooses it."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def write_index(path: Path, lengths: Sequence[np.ndarray], dtype: np.dtype) -> None:
    """Write an .idx file in which each document is one sequence.

    Args:
        lengths: int32 arrays; concatenated, they hold the number of tokens of each document.
        dtype: the dtype of the tokens in the .bin file.
    """
    count = sum(len(part) for part in lengths)
    with open(path, "wb") as file:
        file.write(HEADER + struct.pack("<BQQ", DTYPE_CODES[dtype], count, count + 1))
        for part in lengths:
            file.write(part.astype("<i4").tobytes())
        offset = 0
        for part in lengths:  # the byte offset of each sequence
            ends = offset + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            file.write((ends - part.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
            offset = int(ends[-1]) if len(ends) else offset
        for start in range(0, count + 1, 1 << 20):  # the first sequence of each document, and the number of sequences
            file.write(np.arange(start, min(start + (1 << 20), count + 1), dtype="<i8").tobytes())


def read_lengths(prefix: str) -> np.ndarray:
    """Read the number of tokens of each document, int32, memory-mapped.

    Raises:
        DataError: the .idx is not a megatron-core index, the size of .idx or .bin disagrees with the header, or the index
            holds no documents.
    """
    code, sequences, documents = _read_header(prefix)
    path = Path(prefix + ".idx")
    size, wanted = (
        path.stat().st_size,
        FIXED_BYTES + sequences * (4 + 8) + documents * 8,
    )  # lengths, pointers, documents
    if size != wanted:
        raise DataError(
            f"data source {prefix}: the .idx has {size} bytes, its header describes {wanted}: it may be truncated: run "
            "`preprocess` again, or copy the file again"
        )
    lengths = np.zeros(0, dtype=np.int32)
    if sequences:
        lengths = np.memmap(path, dtype=np.int32, mode="r", offset=FIXED_BYTES, shape=(sequences,))
    tokens = int(lengths.sum(dtype=np.int64))
    if documents < 2 or tokens == 0:
        raise DataError(f"data source {prefix}: holds no documents")
    size, wanted = Path(prefix + ".bin").stat().st_size, tokens * np.dtype(DTYPES[code]).itemsize
    if size != wanted:
        raise DataError(
            f"data source {prefix}: the .bin has {size} bytes, its .idx describes {wanted}: it may be truncated: run "
            "`preprocess` again, or copy the file again"
        )
    return lengths


def check_index(prefix: str) -> None:
    """Check that every document that an .idx lists lies in its .bin: megatron-core reads where the index points.

    Reads the whole index, in blocks; a second call for a file that has not changed reads nothing.

    Raises:
        DataError: as `read_lengths`; or a length, an offset or a boundary of documents is not valid.
    """
    read_lengths(prefix)
    _check_columns(prefix, Path(prefix + ".idx").stat().st_mtime_ns, Path(prefix + ".bin").stat().st_size)


@functools.lru_cache(maxsize=1024)
def _check_columns(prefix: str, mtime_ns: int, bin_bytes: int) -> None:
    """Compare each column of an .idx with the bytes of its .bin. The other arguments tell versions of a file apart."""
    code, sequences, boundaries = _read_header(prefix)
    itemsize, at, path = np.dtype(DTYPES[code]).itemsize, FIXED_BYTES, prefix + ".idx"
    lengths = np.memmap(path, dtype="<i4", mode="r", offset=at, shape=(sequences,))
    offsets = np.memmap(path, dtype="<i8", mode="r", offset=at + 4 * sequences, shape=(sequences,))
    documents = np.memmap(path, dtype="<i8", mode="r", offset=at + 12 * sequences, shape=(boundaries,))
    for first in range(0, sequences, BLOCK):
        size = lengths[first : first + BLOCK].astype(np.int64) * itemsize
        start = offsets[first : first + BLOCK]
        if size.min() < 0 or start.min() < 0 or (start > bin_bytes - size).any() or (start % itemsize).any():
            raise _bad_column(prefix, "places a document outside of the .bin")
    last = 0
    for first in range(0, boundaries, BLOCK):
        part = documents[first : first + BLOCK]
        if part[0] < last or (np.diff(part) < 0).any():
            raise _bad_column(prefix, "lists documents that do not follow each other")
        last = int(part[-1])
    if documents[0] != 0 or last != sequences:
        raise _bad_column(prefix, f"lists documents from {documents[0]} to {last}, of {sequences}")


def _bad_column(prefix: str, problem: str) -> DataError:
    return DataError(
        f"data source {prefix}: the .idx {problem}: it is damaged; run `preprocess` again, or copy the file again"
    )


def read_tokens(prefix: str, lengths: np.ndarray, document: int) -> np.ndarray:
    """Read the token ids of one document. `lengths` is what `read_lengths` returned for the same prefix."""
    dtype = np.dtype(DTYPES[_read_header(prefix)[0]])
    offset = int(lengths[:document].sum(dtype=np.int64)) * dtype.itemsize
    return np.fromfile(prefix + ".bin", dtype=dtype, count=int(lengths[document]), offset=offset)


def _read_header(prefix: str) -> tuple[int, int, int]:
    """Return the code of the token dtype, the number of sequences, and the number of document boundaries."""
    with open(prefix + ".idx", "rb") as file:
        head = file.read(FIXED_BYTES)
    if len(head) < FIXED_BYTES or not head.startswith(HEADER):
        raise DataError(f"data source {prefix}: {prefix}.idx is not a megatron index")
    code, sequences, documents = struct.unpack_from("<BQQ", head, len(HEADER))
    if code not in DTYPES:
        raise DataError(f"data source {prefix}: {prefix}.idx names token type {code}, which is not an integer type")
    return code, sequences, documents
