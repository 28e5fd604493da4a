"""The .idx file of a megatron-core dataset, read and written column by column: 20 bytes a document, no Python object each.

megatron-core's own builder keeps two Python integers a document, and its reader takes a cut file for a whole one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flagscale_like.errors import DataError

HEADER = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
FIXED_BYTES = len(HEADER) + struct.calcsize("<BQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # megatron-core's DType


def token_dtype(vocab_size: int) -> np.dtype:
    """What a token takes in the .bin: megatron-core's choice."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def write_index(path: Path, lengths: Sequence[np.ndarray], dtype: np.dtype) -> None:
    """Write the .idx of documents of one sequence each.

    Args:
        lengths: tokens of each document, int32, in parts that follow each other.
    """
    count = sum(len(part) for part in lengths)
    with open(path, "wb") as file:
        file.write(HEADER + struct.pack("<BQQ", DTYPE_CODES[dtype], count, count + 1))
        for part in lengths:
            file.write(part.astype("<i4").tobytes())
        offset = 0
        for part in lengths:  # the byte at which each sequence begins
            ends = offset + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            file.write((ends - part.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
            offset = int(ends[-1]) if len(ends) else offset
        for start in range(0, count + 1, 1 << 20):  # the sequence with which each document begins, and the end
            file.write(np.arange(start, min(start + (1 << 20), count + 1), dtype="<i8").tobytes())


def read_lengths(prefix: str) -> np.ndarray:
    """Tokens of each document of an index, after comparing the sizes of .idx and .bin with what its header says.

    Raises:
        DataError: another file, a cut one, or no documents.
    """
    code, sequences, documents = _read_header(prefix)
    path = Path(prefix + ".idx")
    size, wanted = (
        path.stat().st_size,
        FIXED_BYTES + sequences * (4 + 8) + documents * 8,
    )  # lengths, pointers, documents
    if size != wanted:
        raise DataError(f"data source {prefix}: .idx has {size} bytes, its header describes {wanted}: cut short?")
    lengths = np.zeros(0, dtype=np.int32)
    if sequences:
        lengths = np.memmap(path, dtype=np.int32, mode="r", offset=FIXED_BYTES, shape=(sequences,))
    tokens = int(lengths.sum(dtype=np.int64))
    if documents < 2 or tokens == 0:
        raise DataError(f"data source {prefix}: holds no documents")
    size, wanted = Path(prefix + ".bin").stat().st_size, tokens * np.dtype(DTYPES[code]).itemsize
    if size != wanted:
        raise DataError(f"data source {prefix}: .bin has {size} bytes, its .idx describes {wanted}: cut short?")
    return lengths


def read_tokens(prefix: str, lengths: np.ndarray, document: int) -> np.ndarray:
    """Token ids of one document of an index whose `read_lengths` are given."""
    dtype = np.dtype(DTYPES[_read_header(prefix)[0]])
    offset = int(lengths[:document].sum(dtype=np.int64)) * dtype.itemsize
    return np.fromfile(prefix + ".bin", dtype=dtype, count=int(lengths[document]), offset=offset)


def _read_header(prefix: str) -> tuple[int, int, int]:
    """Code of the token type, sequences, and document boundaries."""
    with open(prefix + ".idx", "rb") as file:
        head = file.read(FIXED_BYTES)
    if len(head) < FIXED_BYTES or not head.startswith(HEADER):
        raise DataError(f"data source {prefix}: {prefix}.idx is not a megatron index")
    code, sequences, documents = struct.unpack_from("<BQQ", head, len(HEADER))
    if code not in DTYPES:
        raise DataError(f"data source {prefix}: {prefix}.idx names token type {code}, which is no integer")
    return code, sequences, documents
