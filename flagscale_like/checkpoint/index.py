"""The index of a checkpoint: one table that says which file holds which elements of which tensor.

Every file lists its own fragments in its header. The index repeats these lists in one file, `index.safetensors`, so that a
rank finds what it wants without opening the files of all ranks. It is derived data: without it, or where it is damaged,
a reader builds the same table from the headers.

The table has three levels, each sorted: tensors by name; the boxes of a tensor that were saved, by offset; the flat ranges
of a box, by their first element. A tensor's boxes and a box's ranges are thus consecutive, and a search of a range is a
binary search. The arrays are memory-mapped from the file: the processes of a node share its pages in the page cache.
"""

from __future__ import annotations

import functools
import itertools
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from flagscale_like.checkpoint.fragments import Fragment, Index, overlaps
from flagscale_like.checkpoint.manifest import INDEX, FileRecord
from flagscale_like.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, TensorFile, TensorSpec, write_tensors
from flagscale_like.json_files import BAD_JSON

LARGEST = 1 << 62  # sizes and flat positions stay below it, so that int64 sums of two do not overflow
KEY, FORM, START, STOP, BOX = 0, 1, 2, 3, 4  # columns of packed rows; offset and shape follow from BOX on

# What a fragment holds: (kind, name of its dtype in safetensors) of each of its tensors, sorted by kind.
Form = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Row:
    """A fragment, and where it lies.

    Attributes:
        file: name of the file.
        place: the fragment's number in the file.
        form: its kinds and their dtypes.
    """

    fragment: Fragment
    file: str
    place: int
    form: Form


def forms_of(specs: Iterable[TensorSpec], count: int) -> list[Form]:
    """The form of each of a file's `count` fragments, from the names and dtypes of its tensors (`{place}.{kind}`)."""
    found: list[list[tuple[str, str]]] = [[] for _ in range(count)]
    for spec in specs:
        place, _, kind = spec.name.partition(".")
        if place.isascii() and place.isdigit() and int(place) < count:
            found[int(place)].append((kind, DTYPE_NAMES[spec.dtype]))
    return [tuple(sorted(form)) for form in found]


def pack_rows(file: str, fragments: Sequence[Fragment], forms: Sequence[Form]) -> bytes:
    """One file's part of the table, compressed: ranks send it to rank 0, some hundred bytes to a few thousand each."""
    keys: dict[tuple[str, Index], int] = {}
    kinds: dict[Form, int] = {}
    width = max((len(fragment.global_shape) for fragment in fragments), default=1)
    rows = np.zeros((len(fragments), BOX + 2 * width), dtype="<i8")
    rows[:, BOX + width :] = 1
    for row, fragment, form in zip(rows, fragments, forms, strict=True):
        row[KEY] = keys.setdefault((fragment.key, fragment.global_shape), len(keys))
        row[FORM] = kinds.setdefault(form, len(kinds))
        row[START], row[STOP] = fragment.start, fragment.stop
        row[BOX : BOX + len(fragment.offset)] = fragment.offset
        row[BOX + width : BOX + width + len(fragment.shape)] = fragment.shape
    header = json.dumps({"file": file, "width": width, "keys": list(keys), "forms": list(kinds)}).encode()
    return zlib.compress(struct.pack("<Q", len(header)) + header + rows.tobytes(), level=1)


def _form(listed: Iterable[Iterable[str]]) -> Form:
    return tuple((kind, dtype) for kind, dtype in listed)


def build_table(packed: Iterable[bytes]) -> FragmentTable:
    """The table of all files, from what `pack_rows` made of each.

    Raises:
        ValueError: two files give one tensor different shapes, or an element is listed twice.
    """
    keys: dict[tuple[str, Index], int] = {}
    forms: dict[Form, int] = {}
    files, parts = [], []
    for data in map(zlib.decompress, packed):
        end = 8 + struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8:end])
        rows = np.frombuffer(data, dtype="<i8", offset=end).reshape(-1, BOX + 2 * header["width"]).copy()
        if len(rows):
            of_key = [keys.setdefault((key, tuple(shape)), len(keys)) for key, shape in header["keys"]]
            of_form = [forms.setdefault(_form(listed), len(forms)) for listed in header["forms"]]
            rows[:, KEY] = np.array(of_key)[rows[:, KEY]]
            rows[:, FORM] = np.array(of_form)[rows[:, FORM]]
        files.append(header["file"])
        parts.append(rows)
    shapes: dict[str, Index] = {}
    for key, shape in keys:
        if shapes.setdefault(key, shape) != shape:
            raise ValueError(f"{key} has two shapes: {shapes[key]} and {shape}")
    order = {key: number for number, key in enumerate(sorted(shapes))}
    sorted_keys = np.array([order[key] for key, _ in keys], dtype=np.int64)
    width = max(map(len, shapes.values()), default=1)
    rows = np.concatenate([_widen(part, width) for part in parts]) if parts else np.zeros((0, BOX + 2 * width), "<i8")
    counts = [len(part) for part in parts]
    if len(rows):
        rows[:, KEY] = sorted_keys[rows[:, KEY]]
    table = _sorted_table(
        rows,
        file=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        place=np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.zeros(0, np.int32)]),
        names=_Names([(key, shapes[key]) for key in order], files, list(forms)),
    )
    table.check()
    return table


def _widen(rows: np.ndarray, width: int) -> np.ndarray:
    """The same rows with boxes of `width` dimensions: of offset 0 and size 1 in those that are added."""
    own = (rows.shape[1] - BOX) // 2
    if own == width:
        return rows
    wide = np.zeros((len(rows), BOX + 2 * width), dtype=rows.dtype)
    wide[:, BOX + width :] = 1
    own = min(own, width)  # a file without rows has the width 1
    wide[:, : BOX + own] = rows[:, : BOX + own]
    wide[:, BOX + width : BOX + width + own] = rows[:, BOX + own : BOX + 2 * own]
    return wide


def _sorted_table(rows: np.ndarray, *, file: np.ndarray, place: np.ndarray, names: _Names) -> FragmentTable:
    width = (rows.shape[1] - BOX) // 2
    by = [rows[:, START], *(rows[:, column] for column in reversed(range(BOX, rows.shape[1]))), rows[:, KEY]]
    order = np.lexsort(by)
    rows = rows[order]
    box = np.concatenate([rows[:, [KEY]], rows[:, BOX:]], axis=1)
    begins = (
        np.flatnonzero(np.concatenate([[True], (box[1:] != box[:-1]).any(axis=1)])) if len(rows) else np.zeros(0, int)
    )
    boxes = box[begins]
    return FragmentTable(
        names=names,
        key_boxes=np.searchsorted(boxes[:, 0], np.arange(len(names.keys) + 1)).astype(np.int64),
        offset=boxes[:, 1 : 1 + width].copy(),
        shape=boxes[:, 1 + width :].copy(),
        box_rows=np.append(begins, len(rows)).astype(np.int64),
        start=rows[:, START].copy(),
        stop=rows[:, STOP].copy(),
        file=file[order],
        place=place[order],
        form=rows[:, FORM].astype(np.int32),
    )


@dataclass(frozen=True)
class _Names:
    """What the numbers of a table stand for.

    Attributes:
        keys: name and global shape of each tensor, sorted.
        files: names of the files.
        forms: see Form.
    """

    keys: list[tuple[str, Index]]
    files: list[str]
    forms: list[Form]


@dataclass(frozen=True)
class FragmentTable:
    """Every fragment of a checkpoint. Boxes have as many dimensions as the tensor with most; the others have size 1.

    Attributes:
        key_boxes: [tensors + 1] first box of each tensor, and how many boxes there are.
        offset, shape: [boxes, dimensions].
        box_rows: [boxes + 1] first row of each box, and how many rows there are.
        start, stop: [rows] the flat range of a box that a fragment holds.
        file, place, form: [rows] number of its file, its own number there, and what it holds.
    """

    names: _Names
    key_boxes: np.ndarray
    offset: np.ndarray
    shape: np.ndarray
    box_rows: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    file: np.ndarray
    place: np.ndarray
    form: np.ndarray

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        """The number of each tensor."""
        return {key: number for number, (key, _) in enumerate(self.names.keys)}

    def __len__(self) -> int:
        return len(self.start)

    def __contains__(self, key: str) -> bool:
        return key in self._numbers

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return list(self._numbers)

    def global_shape(self, key: str) -> Index:
        """Raises KeyError where there is no such tensor."""
        return self.names.keys[self._numbers[key]][1]

    def forms(self, key: str | None = None) -> list[Form]:
        """The different forms of a tensor's fragments, or of all."""
        held = self.form if key is None else self.form[slice(*self._row_range(key))]
        return [self.names.forms[number] for number in np.unique(held)]

    def rows(self, key: str) -> int:
        """How many fragments a tensor has."""
        first, last = self._row_range(key)
        return last - first

    def row(self, key: str, number: int = 0) -> Row:
        """A fragment of a tensor, the first by default."""
        first, _ = self._row_range(key)
        box = int(np.searchsorted(self.box_rows, first + number, side="right")) - 1
        return next(self._rows(key, box, first + number, first + number + 1))

    def overlapping(self, target: Fragment) -> Iterator[Row]:
        """The fragments that hold elements of `target`, a fragment of the tensor's own number of dimensions."""
        for box, numbers in self._overlapping(target):
            for number in numbers.tolist():
                yield from self._rows(target.key, box, number, number + 1)

    def overlapping_rows(self, target: Fragment) -> np.ndarray:
        """The numbers of the same fragments, as places in the arrays of rows; for those who read none of them."""
        found = [numbers for _, numbers in self._overlapping(target)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def _overlapping(self, target: Fragment) -> Iterator[tuple[int, np.ndarray]]:
        """Of each box that holds elements of `target` the numbers of the rows that do."""
        number = self._numbers[target.key]
        first, last = self.key_boxes[number], self.key_boxes[number + 1]
        padding = self.offset.shape[1] - len(target.offset)
        low = np.array([*target.offset, *[0] * padding])
        high = low + np.array([*target.shape, *[1] * padding])
        offset, shape = self.offset[first:last], self.shape[first:last]
        for box in (first + np.flatnonzero(((offset < high) & (low < offset + shape)).all(axis=1))).tolist():
            dims = len(target.shape)
            same = (tuple(self.offset[box, :dims].tolist()), tuple(self.shape[box, :dims].tolist())) == (
                target.offset,
                target.shape,
            )
            begin, end = (target.start, target.stop) if same else self._flat_range(box, target)
            a, b = int(self.box_rows[box]), int(self.box_rows[box + 1])
            numbers = np.arange(
                a + np.searchsorted(self.stop[a:b], begin, "right"),
                a + np.searchsorted(self.start[a:b], end, "left"),
            )
            yield box, numbers if same else self._exact(box, numbers, target)

    def _exact(self, box: int, numbers: np.ndarray, target: Fragment) -> np.ndarray:
        """Those of a box's rows that share elements with `target`, a fragment of another box that overlaps with it."""
        # A row that holds a whole line of its box, of which the target has all that lies in its own box, shares elements.
        line, mine = prod(target.shape[1:]), max(1, prod(self.shape[box, 1:].tolist()))
        offset = int(self.offset[box, 0])
        first, last = -(-self.start[numbers] // mine) + offset, self.stop[numbers] // mine + offset
        low, high = target.offset[0] + -(-target.start // line), target.offset[0] + target.stop // line
        sure = np.maximum(first, low) < np.minimum(last, high)
        for place in np.flatnonzero(~sure).tolist():
            (row,) = self._rows(target.key, box, int(numbers[place]), int(numbers[place]) + 1)
            sure[place] = next(overlaps(row.fragment, target), None) is not None
        return numbers[sure]

    def _flat_range(self, box: int, target: Fragment) -> tuple[int, int]:
        """The flat range of a box in which the rows lie (of its first dimension) that `target` touches."""
        line, mine = prod(target.shape[1:]), prod(self.shape[box, 1:].tolist())
        offset, size = int(self.offset[box, 0]), int(self.shape[box, 0])
        first = target.offset[0] + target.start // line - offset
        last = target.offset[0] + (target.stop - 1) // line + 1 - offset
        return max(first, 0) * mine, max(min(last, size), 0) * mine

    def _row_range(self, key: str) -> tuple[int, int]:
        number = self._numbers[key]
        return int(self.box_rows[self.key_boxes[number]]), int(self.box_rows[self.key_boxes[number + 1]])

    def _rows(self, key: str, box: int, first: int, last: int) -> Iterator[Row]:
        """Rows [first, last) of a box."""
        shape = self.global_shape(key)
        offset, size = (tuple(part[box, : len(shape)].tolist()) for part in (self.offset, self.shape))
        columns = (part[first:last].tolist() for part in (self.start, self.stop, self.file, self.place, self.form))
        for start, stop, file, place, form in zip(*columns, strict=True):
            fragment = Fragment(key, shape, offset, size, start, stop)
            yield Row(fragment, self.names.files[file], place, self.names.forms[form])

    def check(self) -> None:
        """Whether the table makes sense: sizes, order, and every fragment inside its tensor; no range listed twice.

        Boxes of one tensor that overlap are found by `check_boxes`.

        Raises:
            ValueError: it does not.
        """
        keys, boxes, rows, width = len(self.names.keys), len(self.offset), len(self.start), self.offset.shape[1]
        if not all(1 <= len(shape) <= width for _, shape in self.names.keys):
            raise ValueError("a tensor has no shape, or more dimensions than the table")
        for counts, length, end in ((self.key_boxes, keys, boxes), (self.box_rows, boxes, rows)):
            if len(counts) != length + 1 or counts[0] != 0 or counts[-1] != end or (np.diff(counts) < 1).any():
                raise ValueError("a tensor without boxes, or a box without fragments")
        disorder = np.diff(self.offset[:, 0]) < 0
        disorder[self.key_boxes[1:-1] - 1] = False  # the next box is of another tensor
        if disorder.any():
            raise ValueError(f"the boxes of {self._key_of(int(np.argmax(disorder)))} are not in order")
        limits = np.ones((keys, width), dtype=np.int64)
        for limit, (_, shape) in zip(limits, self.names.keys, strict=True):
            limit[: len(shape)] = shape
        limits = np.repeat(limits, np.diff(self.key_boxes), axis=0)
        inside = (self.offset >= 0) & (self.shape >= 0) & (self.shape <= limits)
        inside &= self.offset <= limits - self.shape
        small = np.prod(self.shape, axis=1, dtype=np.float64) < LARGEST
        if not (inside.all(axis=1) & small).all():
            box = int(np.argmin(inside.all(axis=1) & small))
            raise ValueError(f"a box of {self._key_of(box)} leaves its tensor")
        numel = np.repeat(np.prod(self.shape, axis=1), np.diff(self.box_rows))
        wrong = (self.start < 0) | (self.start >= self.stop) | (self.stop > numel)
        if wrong.any():
            raise ValueError(f"a fragment of {self._key_of_row(int(np.argmax(wrong)))} leaves its tensor")
        twice = self.stop[:-1] > self.start[1:]
        twice[self.box_rows[1:-1] - 1] = False  # the next row is of another box
        if twice.any():
            raise ValueError(f"elements of {self._key_of_row(int(np.argmax(twice)))} are listed twice")
        for numbers, count in ((self.file, len(self.names.files)), (self.form, len(self.names.forms))):
            if rows and not (numbers.min() >= 0 and numbers.max() < count):
                raise ValueError("a number of a file or of a form is out of range")
        if rows and self.place.min() < 0:
            raise ValueError("a fragment's number is negative")

    def check_boxes(self, key: str) -> None:
        """No two boxes of a tensor overlap: else elements would be counted twice, and others could be missing.

        Raises:
            ValueError: two do.
        """
        number = self._numbers[key]
        first, last = self.key_boxes[number], self.key_boxes[number + 1]
        low = self.offset[first:last]
        high = low + self.shape[first:last]
        ends = np.searchsorted(low[:, 0], high[:, 0])  # sorted by offset: later boxes begin below this one
        for box, end in enumerate(ends.tolist()):
            later = slice(box + 1, end)
            if ((low[later] < high[box]) & (low[box] < high[later])).all(axis=1).any():
                raise ValueError(f"elements of {key} are listed twice")

    def _key_of(self, box: int) -> str:
        return self.names.keys[int(np.searchsorted(self.key_boxes, box, side="right")) - 1][0]

    def _key_of_row(self, row: int) -> str:
        return self._key_of(int(np.searchsorted(self.box_rows, row, side="right")) - 1)

    def save(self, path: Path, *, sha256: bool = False) -> FileRecord:
        """Write it as a safetensors file.

        Raises:
            OSError: no space, no permission.
        """
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}
        specs = [TensorSpec(name, array.dtype, tuple(array.shape)) for name, array in arrays.items()]
        names = {name: json.dumps(getattr(self.names, name)) for name in ("keys", "files", "forms")}
        return write_tensors(path, specs, arrays.values(), {"format": "pt", **names}, sha256=sha256)

    @staticmethod
    def load(path: Path) -> FragmentTable:
        """Map a file that `save` wrote, and check it.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such file, or makes no sense.
        """
        file = TensorFile(path)
        try:
            listed = {name: json.loads(file.metadata[name]) for name in ("keys", "files", "forms")}
            keys = [(key, tuple(shape)) for key, shape in listed["keys"]]
            forms = [_form(form) for form in listed["forms"]]
            arrays = {name: file.get_tensor(name).numpy() for name in ARRAYS}
        except (*BAD_JSON, KeyError, TypeError) as error:
            raise ValueError(f"no index ({type(error).__name__}: {error})") from None
        finally:
            file.close()
        texts = [
            *(key for key, _ in keys),
            *listed["files"],
            *(text for form in forms for pair in form for text in pair),
        ]
        sizes = [size for _, shape in keys for size in shape]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name in it is no text")
        if not all(isinstance(size, int) and 0 <= size < LARGEST for size in sizes):
            raise ValueError("a size in it is no natural number")
        if any(dtype not in DTYPES for form in forms for _, dtype in form):
            raise ValueError("a dtype in it is not known")
        if any(a >= b for (a, _), (b, _) in itertools.pairwise(keys)):
            raise ValueError("its tensors are not in order")
        rows = len(arrays["start"])
        for name, (dtype, dims) in ARRAYS.items():
            array = arrays[name]
            if array.dtype != dtype or array.ndim != dims or (name in ROW_ARRAYS and len(array) != rows):
                raise ValueError(f"{name} has the dtype {array.dtype} and the shape {list(array.shape)}")
        if arrays["offset"].shape != arrays["shape"].shape or not arrays["offset"].shape[1]:
            raise ValueError("its boxes have no shape")
        table = FragmentTable(_Names(keys, listed["files"], forms), **arrays)
        table.check()
        return table


ROW_ARRAYS = ("start", "stop", "file", "place", "form")
ARRAYS = {
    "key_boxes": (np.int64, 1),
    "offset": (np.int64, 2),
    "shape": (np.int64, 2),
    "box_rows": (np.int64, 1),
    "start": (np.int64, 1),
    "stop": (np.int64, 1),
    "file": (np.int32, 1),
    "place": (np.int32, 1),
    "form": (np.int32, 1),
}


def write_index(folder: Path, packed: Iterable[bytes], *, sha256: bool = False) -> FileRecord:
    """Write a checkpoint's index.

    Args:
        packed: what `pack_rows` made of each file's fragments.

    Raises:
        OSError: no space, no permission.
    """
    return build_table(packed).save(folder / INDEX, sha256=sha256)
