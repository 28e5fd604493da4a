"""INT8 and INT4 weights, group-wise, in the compressed-tensors format ("pack-quantized").

The output is safetensors and JSON, like the source folder; transformers (with the compressed-tensors package), vLLM and
SGLang load it, on CPU and GPU. To write it needs no library.

The rows of every projection matrix are cut into groups of `group_size` weights, which share a scale and, unless symmetric,
a zero point: w ~ scale * (q - zero). The range of a group is shrunk to where its squared error is least: cutting off a few
outliers pays for finer steps. Embedding, output matrix, norms and biases stay as they are.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flagscale_like.checkpoint.companions import GENERATION, code_files, tokenizer_files
from flagscale_like.checkpoint.hf import write_index, written_aside
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.packed import Quantized, pack
from flagscale_like.checkpoint.tensor_file import TensorSpec, write_tensors
from flagscale_like.errors import ConversionError, required
from flagscale_like.families.quantization import Scheme
from flagscale_like.json_files import write_json

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
ROWS_AT_ONCE = 1024


def quantize(weight: Tensor, scheme: Scheme) -> Quantized:
    """Quantize a matrix. Of the ranges in SHRINK, each group takes that of the least squared error.

    Args:
        weight: [rows, columns]; columns a multiple of the group size.
    """
    parts = [_quantize_rows(rows, scheme) for rows in weight.split(ROWS_AT_ONCE)]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Quantized(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _quantize_rows(weight: Tensor, scheme: Scheme) -> Quantized:
    groups = weight.float().view(weight.shape[0], -1, scheme.group_size)  # [r, c] -> [r, groups, group size]
    levels = scheme.high - scheme.low
    if scheme.symmetric:
        high = groups.abs().amax(-1)
        low = -high
    else:
        high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)  # 0 stays exact
    best: Quantized | None = None
    least = torch.full(high.shape, float("inf"))
    for shrink in SHRINK:
        # The scale is rounded to the dtype that it is stored in before anything is divided by it.
        scale = ((high - low) * (shrink / levels)).to(weight.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        wide = scale.float().unsqueeze(-1)
        zero = torch.zeros_like(high)
        if not scheme.symmetric:
            zero = (scheme.low - low * shrink / scale.float()).round().clamp(scheme.low, scheme.high)
        values = ((groups / wide).round() + zero.unsqueeze(-1)).clamp(scheme.low, scheme.high)
        error = ((values - zero.unsqueeze(-1)) * wide - groups).square().sum(-1)
        found = Quantized(values.to(torch.int8), scale, None if scheme.symmetric else zero.to(torch.int8))
        if best is None:
            best, least = found, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Quantized(
            torch.where(better.unsqueeze(-1), found.values, best.values),
            torch.where(better, found.scale, best.scale),
            None if found.zero is None or best.zero is None else torch.where(better, found.zero, best.zero),
        )
    best = required(best, "a scale to try")
    return Quantized(best.values.view(weight.shape), best.scale, best.zero)


@dataclass(frozen=True)
class Summary:
    """What quantize_folder() did.

    Attributes:
        matrices: how many were quantized.
        bytes_before, bytes_after: of the tensors, without the headers of their files.
        relative_error: root of the summed squared errors over the root of the summed squared weights.
    """

    matrices: int
    bytes_before: int
    bytes_after: int
    relative_error: float


def quantize_folder(source: Path, out: Path, scheme: Scheme) -> Summary:
    """Write a quantized Hugging Face folder, a matrix at a time.

    Raises:
        ConversionError: the folder cannot be read (see HfFolder); a matrix has columns that the group size does not divide;
            `out` exists or cannot be written.
    """
    folder = HfFolder(source)
    if folder.quantization is not None:
        raise ConversionError(f"{folder.folder}: is quantized already: quantize the folder that it was made from")
    if folder.arch.experts is not None:
        raise ConversionError(
            f"{folder.folder}: has experts, which transformers holds stacked, and not as the linear modules that this format "
            "is for: only dense models are quantized"
        )
    _check_columns(folder, scheme)
    tally = _Tally()
    with written_aside(out) as temporary:
        weight_map: dict[str, str] = {}
        for name, specs in folder.files().items():
            written = [new for spec in specs for new in _stored_specs(spec, scheme)]
            tensors = _stored_tensors(folder, specs, scheme, tally)
            write_tensors(temporary / name, written, tensors, {"format": "pt"})
            weight_map |= {spec.name: name for spec in written}
            tally.bytes_before += sum(spec.nbytes for spec in specs)
            tally.bytes_after += sum(spec.nbytes for spec in written)
        if len(folder.files()) > 1:
            write_index(temporary, weight_map, tally.bytes_after)
        config = json.loads((folder.folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = scheme.config()
        write_json(temporary / "config.json", config)
        code = code_files(folder.folder, config.get("auto_map"))
        for name in {*tokenizer_files(folder.folder), *code, GENERATION}:
            if (folder.folder / name).is_file():
                shutil.copyfile(folder.folder / name, temporary / name)
    error = (tally.squared_error / tally.squared_weights) ** 0.5 if tally.squared_weights else 0.0
    return Summary(tally.matrices, tally.bytes_before, tally.bytes_after, error)


def _check_columns(folder: HfFolder, scheme: Scheme) -> None:
    matrices = [spec for spec in folder.specs() if _is_quantized(spec)]
    wrong = next((spec for spec in matrices if spec.shape[1] % scheme.group_size), None)
    if wrong is None:
        return
    shared = math.gcd(*(spec.shape[1] for spec in matrices))
    fitting = [size for size in range(8, shared + 1, 8) if shared % size == 0]
    below = [size for size in fitting if size < scheme.group_size][-1:]
    near = below + [size for size in fitting if size > scheme.group_size][:1]
    fits = f"group size {' or '.join(map(str, near))} would do" if near else "no multiple of 8 divides all matrices"
    raise ConversionError(
        f"{folder.folder}: {wrong.name} has {wrong.shape[1]} columns, which group_size ({scheme.group_size}) must divide: "
        f"{fits}"
    )


@dataclass
class _Tally:
    matrices: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    squared_error: float = 0.0
    squared_weights: float = 0.0


def _is_quantized(spec: TensorSpec) -> bool:
    """Whether it is a matrix of a layer's linear module. Embedding and output matrix are not."""
    return len(spec.shape) == 2 and spec.name.startswith("model.layers.") and spec.name.endswith(".weight")


def _stored_specs(spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
    """The tensors that are stored for a tensor, in the order of _stored_tensors()."""
    if not _is_quantized(spec):
        return [spec]
    rows, columns = spec.shape
    groups, a_word = columns // scheme.group_size, 32 // scheme.bits
    stored = [
        TensorSpec(spec.name + "_packed", torch.int32, (rows, columns // a_word)),
        TensorSpec(spec.name + "_scale", spec.dtype, (rows, groups)),
        TensorSpec(spec.name + "_shape", torch.int64, (2,)),
    ]
    if not scheme.symmetric:  # zero points are packed down the rows
        stored.append(TensorSpec(spec.name + "_zero_point", torch.int32, (-(-rows // a_word), groups)))
    return stored


def _stored_tensors(folder: HfFolder, specs: list[TensorSpec], scheme: Scheme, tally: _Tally) -> Iterator[Tensor]:
    for spec in specs:
        weight = folder.hf_tensor(spec.name)
        if not _is_quantized(spec):
            yield weight
            continue
        found = quantize(weight, scheme)
        tally.matrices += 1
        tally.squared_error += (found.dequantize() - weight.float()).square().sum().item()
        tally.squared_weights += weight.float().square().sum().item()
        yield pack(found.values, scheme.bits)
        yield found.scale
        yield torch.tensor(spec.shape)
        if found.zero is not None:
            yield pack(found.zero.T, scheme.bits).T.contiguous()
