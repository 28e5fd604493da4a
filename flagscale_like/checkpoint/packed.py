"""Integers in 32-bit words, and weights stored as such: the tensors of compressed-tensors' pack-quantized format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flagscale_like.checkpoint.tensor_file import TensorSpec
from flagscale_like.families.quantization import Scheme

PACKED, SCALE, SHAPE, ZERO = "_packed", "_scale", "_shape", "_zero_point"  # behind the name of the weight


class WeightFile(Protocol):
    """A file that tensors are read from: a TensorFile or a PickleFile."""

    path: Path
    specs: dict[str, TensorSpec]

    def get_tensor(self, name: str, *, whole: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Quantized:
    """A matrix as integers.

    Attributes:
        values: [rows, columns] int8.
        scale: [rows, groups], in the dtype of the weights.
        zero: [rows, groups] int8; None where symmetric.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None

    def dequantize(self) -> Tensor:
        """scale * (q - zero), [rows, columns] fp32."""
        rows, groups = self.scale.shape
        values = self.values.view(rows, groups, -1).float()
        if self.zero is not None:
            values = values - self.zero.unsqueeze(-1).float()
        return (values * self.scale.unsqueeze(-1).float()).view(rows, -1)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers into 32-bit words, the first value in the lowest bits, each raised by 2^(bits - 1).

    Args:
        values: [rows, columns] int8 in the signed range.

    Returns:
        [rows, ceil(columns * bits / 32)] int32.
    """
    unsigned = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    a_word = 32 // bits
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % a_word))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)  # little-endian, as safetensors is


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack(): [rows, columns] int8."""
    raised = words.contiguous().view(torch.uint8)
    if bits == 4:
        raised = torch.stack((raised & 15, raised >> 4), dim=-1).flatten(1)
    return (raised[:, :columns].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


class PackedWeight:
    """One quantized weight, read as the matrix that it stands for, in the dtype of its scales.

    Attributes:
        path: of the file with its integers.
        specs: that of the matrix, by its name.

    Raises:
        ValueError: a tensor of it is missing, or of another shape.
    """

    def __init__(self, name: str, files: Mapping[str, WeightFile], scheme: Scheme) -> None:
        wanted = [PACKED, SCALE, SHAPE] + ([] if scheme.symmetric else [ZERO])
        missing = [name + part for part in wanted if name + part not in files]
        if missing:
            raise ValueError(f"{missing[0]} is missing, of a quantized weight")
        self._name, self._files, self._scheme = name, files, scheme
        self.path = files[name + PACKED].path
        rows = next(iter(files[name + PACKED].specs[name + PACKED].shape), 0)
        a_word = 32 // scheme.bits
        shape = self._stored(SHAPE).tolist()
        if not isinstance(shape, list) or len(shape) != 2 or int(shape[0]) != rows:
            raise ValueError(f"{name}{SHAPE} is {shape}, the weight has {rows} rows")
        columns = int(shape[1])
        groups = -(-columns // scheme.group_size)
        shapes = {
            PACKED: (rows, -(-columns // a_word)),
            SCALE: (rows, groups),
            SHAPE: (2,),
            ZERO: (-(-rows // a_word), groups),
        }
        for part in wanted:
            spec = files[name + part].specs[name + part]
            if spec.shape != shapes[part]:
                raise ValueError(f"{name}{part} has shape {list(spec.shape)}, its weight makes it {list(shapes[part])}")
            if part in (PACKED, ZERO) and spec.dtype != torch.int32:
                raise ValueError(f"{name}{part} is {str(spec.dtype).removeprefix('torch.')}, must be int32")
        scale = files[name + SCALE].specs[name + SCALE]
        self.specs = {name: TensorSpec(name, scale.dtype, (rows, columns))}

    def _stored(self, part: str) -> Tensor:
        return self._files[self._name + part].get_tensor(self._name + part, whole=True)

    def get_tensor(self, name: str, *, whole: bool = False) -> Tensor:
        """The matrix, scale * (q - zero)."""
        spec, bits = self.specs[name], self._scheme.bits
        zero = None
        if not self._scheme.symmetric:
            zero = unpack(self._stored(ZERO).T.contiguous(), bits, spec.shape[0]).T
        values = Quantized(unpack(self._stored(PACKED), bits, spec.shape[1]), self._stored(SCALE), zero)
        return values.dequantize().to(spec.dtype)


def with_packed(files: Mapping[str, WeightFile], scheme: Scheme) -> dict[str, WeightFile | PackedWeight]:
    """The files by tensor, each quantized weight under its own name in place of the tensors that it is stored as.

    Raises:
        ValueError: see PackedWeight.
    """
    names = [name.removesuffix(PACKED) for name in files if name.endswith(".weight" + PACKED)]
    parts = {name + part for name in names for part in (PACKED, SCALE, SHAPE, ZERO)}
    return {name: file for name, file in files.items() if name not in parts} | {
        name: PackedWeight(name, files, scheme) for name in names
    }
