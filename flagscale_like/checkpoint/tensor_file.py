"""Read and write safetensors files one tensor at a time, so that memory holds the tensors in use and not the file.

The safetensors library maps a whole file, whose pages stay resident once touched, and writes from a whole dictionary. Here
a tensor is mapped when it is asked for and unmapped with its last reference; a file is written from an iterator.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagscale_like.checkpoint.manifest import Checksum, FileRecord

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRITE_BACK_BYTES = 16 << 20
LARGEST_HEADER_BYTES = 100 << 20  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """Reads one safetensors file.

    Attributes:
        metadata: the header's `__metadata__`.
        specs: every tensor, by name.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no safetensors file, or it is shorter than its header says; the message gives both sizes.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = open(self.path, "rb")  # noqa: SIM115  (open as long as the object lives)
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= LARGEST_HEADER_BYTES or 8 + length > size:
            raise ValueError(f"not a safetensors file, or truncated: {size} bytes, a header of {length} announced")
        try:
            header: dict[str, Any] = json.loads(self._file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._begins = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
            ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
            self.specs = {
                name: TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"its safetensors header is damaged ({type(error).__name__}: {error})") from None
        for spec, end in zip(self.specs.values(), ends, strict=True):
            if (
                any(not isinstance(size, int) or size < 0 for size in spec.shape)
                or end - self._begins[spec.name] != spec.nbytes
            ):
                raise ValueError(
                    f"its safetensors header is damaged: {spec.name} of shape {list(spec.shape)} has "
                    f"{end - self._begins[spec.name]} bytes"
                )
            if self._begins[spec.name] < 8 + length or end > size:
                raise ValueError(f"truncated: {size} bytes, its header describes {max(ends)}")

    def keys(self) -> list[str]:
        """Names of the tensors, in the order of the file."""
        return list(self.specs)

    def get_tensor(self, name: str, *, whole: bool = False) -> Tensor:
        """A tensor on the host. Its pages are read when touched; writing to it does not reach the file.

        Args:
            whole: the caller will read all of it: the system may begin to read ahead.

        Raises:
            KeyError: the file has no tensor of this name.
        """
        spec = self.specs[name]
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        begin = self._begins[name]
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(self._file.fileno(), begin - page + spec.nbytes, access=mmap.ACCESS_COPY, offset=page)
        if whole and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), begin, spec.nbytes, os.POSIX_FADV_WILLNEED)
        elif hasattr(mmap, "MADV_SEQUENTIAL"):
            view.madvise(mmap.MADV_SEQUENTIAL)
        flat = torch.frombuffer(view, dtype=torch.uint8, count=spec.nbytes, offset=begin - page)
        if begin % spec.dtype.itemsize:  # the format does not promise alignment
            flat = flat.clone()
        return flat.view(spec.dtype).view(spec.shape)

    def read_into(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, a contiguous host tensor of the same dtype, with the tensor's elements from `first` on. Maps no page.

        Raises:
            OSError: the file ended, or the disk failed.
        """
        spec = self.specs[name]
        assert out.dtype == spec.dtype
        assert first + out.numel() <= prod(spec.shape)
        at, data = self._begins[name] + first * spec.dtype.itemsize, memoryview(out.view(torch.uint8).numpy())
        while data:  # one read moves at most 2 GiB on Linux
            count = os.preadv(self._file.fileno(), [data], at)
            if not count:
                raise OSError(errno.EIO, "the file ended while it was read", str(self.path))
            at, data = at + count, data[count:]

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        self._file.close()


@contextmanager
def _write_back(handle: int) -> Iterator[Callable[[int], None]]:
    """Send written data to the disk in a thread, while the caller prepares the next: the kernel alone would start late.

    The system reports an error of the disk once for a file, so an error of the thread's fsync is raised here.

    Yields:
        A function to call after each write, with the number of bytes written.
    """
    fresh = 0
    with ThreadPoolExecutor(1) as thread:
        pending = None

        def written(count: int) -> None:
            nonlocal fresh, pending
            fresh += count
            if fresh >= WRITE_BACK_BYTES and (pending is None or pending.done()):
                if pending is not None:
                    pending.result()
                fresh, pending = 0, thread.submit(os.fsync, handle)

        yield written
        if pending is not None:
            pending.result()


def ahead(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tensors; a thread reads the next one while the caller uses the last."""
    source = iter(tensors)

    def following() -> Tensor | None:
        return next(source, None)

    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(following)
        while (tensor := pending.result()) is not None:
            pending = reader.submit(following)
            yield tensor


def write_tensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    metadata: dict[str, str],
    *,
    sha256: bool = False,
) -> FileRecord:
    """Write a safetensors file from an iterator, checksummed in the same pass, and fsynced.

    Each call of a hash or a write takes a whole tensor, and releases the interpreter lock meanwhile: to take the lock back
    from a busy thread costs 5 ms, so small pieces would be slow.

    Args:
        specs: name, dtype and shape of each tensor, in the order of `tensors`.
        metadata: for the header's `__metadata__`.
        sha256: also compute the file's sha256.

    Returns:
        The file's record for the manifest.

    Raises:
        OSError: no space, no permission.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    checksum = Checksum(sha256=sha256)
    with open(path, "wb", buffering=0) as file, _write_back(file.fileno()) as written:

        def put(data: memoryview) -> None:
            checksum.update(data)
            while data:  # one write moves at most 2 GiB on Linux
                count = file.write(data)
                written(count)
                data = data[count:]

        put(memoryview(struct.pack("<Q", len(encoded)) + encoded))
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
            if spec.nbytes:
                flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
                put(memoryview(flat.view(torch.uint8).numpy()))
        os.fsync(file.fileno())
    return checksum.record(path.name)
