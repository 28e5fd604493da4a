"""Upcycling: a dense model as a mixture of experts that computes the same, each expert a copy of its FFN, or a part of one.

Sparse upcycling is Komatsuzaki et al. 2023; parts of FFNs, chosen together by equal rows of the router, are the virtual
groups of He et al. 2024. What is held at a time is a layer's dense matrix and one expert's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from flagscale_like.arch import ModelArch, Parameter, Role, parameters
from flagscale_like.checkpoint.adapters import Base
from flagscale_like.checkpoint.companions import read_companions, write_companions
from flagscale_like.checkpoint.format import WrittenFile, finish_folder, write_fragments
from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.checkpoint.hf import MAX_FILE_BYTES, in_processes, split_rules, written_aside
from flagscale_like.checkpoint.manifest import COMPANIONS, STATE, write_json
from flagscale_like.checkpoint.tensor_file import TensorSpec, ahead
from flagscale_like.errors import ConversionError
from flagscale_like.families import families


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense model becomes a mixture of experts.

    Attributes:
        experts: of a layer.
        top_k: experts that a token goes to.
        split: parts that each copy of the FFN is cut into, each an expert of that fraction of its width; 1 keeps it whole.
        shared: one more copy of the FFN is that which every token goes through. Its output and the experts' count half.
        noise: standard deviation of what is added to each expert's matrices, relative to that of the matrix. 0 adds nothing:
            the model then computes what the dense one does.
        dense_layers: the first layers that stay as they are.
        seed: of the router and the noise.
    """

    experts: int
    top_k: int
    split: int = 1
    shared: bool = False
    noise: float = 0.0
    dense_layers: int = 0
    seed: int = 0

    def arch(self, dense: ModelArch) -> ModelArch:
        """The shape of the mixture of experts, with the first family that can be exported; else with the dense model's.

        Raises:
            ConversionError: the model has experts, or numbers that do not fit each other.
        """
        if dense.experts is not None:
            raise ConversionError(f"the model has experts already ({dense.experts.count} a layer): give a dense one")
        for name, whole in (("--experts", self.experts), ("--top-k", self.top_k)):
            if whole % self.split:
                raise ConversionError(f"{name} ({whole}) must be divisible by --split ({self.split})")
        if dense.ffn_hidden_size % self.split:
            raise ConversionError(
                f"model.ffn_hidden_size ({dense.ffn_hidden_size}) must be divisible by --split ({self.split})"
            )
        if self.top_k == 1:
            raise ConversionError(
                "--top-k 1 would change what the model computes: one expert's weight is its score, and not 1; give 2 or more"
            )
        experts = {
            "count": self.experts,
            "top_k": self.top_k,
            "ffn_hidden_size": dense.ffn_hidden_size // self.split,
            "shared_ffn_hidden_size": dense.ffn_hidden_size if self.shared else 0,
            "scale": float(self.split),  # the weights of a copy's parts add up to its own
            "dense_layers": self.dense_layers,
        }
        try:
            arch = ModelArch.model_validate({**dense.model_dump(), "experts": experts})
        except ValidationError as error:
            raise ConversionError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None
        return arch.model_copy(update={"family": expressed_by(arch) or dense.family})


def expressed_by(arch: ModelArch) -> str | None:
    """The first family as which a model can be exported; None where there is none."""
    for name, family in families().items():
        try:
            family.hf_config(arch)
        except ConversionError:
            continue
        return name
    return None


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor of the mixture of experts that is made at once.

    Attributes:
        expert: of a tensor that is stacked over experts, the one whose matrix it is.
        shape: of the whole tensor.
    """

    parameter: Parameter
    shape: tuple[int, ...]
    expert: int | None = None

    @property
    def fragment(self) -> Fragment:
        shape = self.shape
        if self.expert is None:
            return Fragment(self.parameter.name, shape, (0,) * len(shape), shape, 0, prod(shape))
        first = (self.expert, *(0 for _ in shape[1:]))
        return Fragment(self.parameter.name, shape, first, (1, *shape[1:]), 0, self.numel)

    @property
    def numel(self) -> int:
        return prod(self.shape if self.expert is None else self.shape[1:])


def _pieces(source: Base, arch: ModelArch) -> list[_Piece]:
    """All tensors of the mixture of experts, in the order of the model. Vocabulary and head are as the source has them."""
    held, found = set(source.keys()), []
    for parameter in parameters(arch):
        if parameter.name in held:
            found.append(_Piece(parameter, tuple(source.global_shape(parameter.name))))
        elif parameter.experts:
            found += [_Piece(parameter, parameter.shape, expert) for expert in range(parameter.experts)]
        else:
            found.append(_Piece(parameter, parameter.shape))
    return found


def _dense_name(parameter: Parameter) -> str:
    """The dense FFN's matrix that an expert's, or the shared FFN's, is made of."""
    return f"decoder.layers.{parameter.layer}.mlp.{parameter.module}.weight"


class _Maker:
    """Makes the pieces. A dense matrix is kept for the experts of its layer, which follow one another."""

    def __init__(self, source: Base, arch: ModelArch, options: Upcycling) -> None:
        self.source, self.arch, self.options = source, arch, options
        self.held = set(source.keys())
        self._last: tuple[str, Tensor] | None = None

    def dtype(self, piece: _Piece) -> torch.dtype:
        """The source's, and of a router that of its layer's norm."""
        name = piece.parameter.name
        if name in self.held:
            return self.source.dtype(name)
        if piece.parameter.role is Role.ROUTER:
            return self.source.dtype(f"decoder.layers.{piece.parameter.layer}.pre_mlp_layernorm.weight")
        return self.source.dtype(_dense_name(piece.parameter))

    def make(self, piece: _Piece) -> Tensor:
        """The piece's elements, [numel]."""
        parameter, options = piece.parameter, self.options
        if parameter.name in self.held:
            return self.source.full(parameter.name).reshape(-1)
        if parameter.role is Role.ROUTER:
            copies = self.arch.required_experts.count // options.split
            rows = self._normal(parameter.name, (copies, parameter.shape[1])) * self.arch.init_std
            return rows.repeat_interleave(options.split, dim=0).to(self.dtype(piece)).reshape(-1)
        matrix = self._part(parameter, piece.expert)
        if options.noise and piece.expert is not None:
            noise = self._normal(f"{parameter.name}/{piece.expert}", tuple(matrix.shape))
            matrix = (matrix.float() + noise * (options.noise * matrix.float().std())).to(matrix.dtype)
        if options.shared and parameter.role is Role.FFN_OUT:
            matrix = matrix / 2
        return matrix.reshape(-1)

    def _part(self, parameter: Parameter, expert: int | None) -> Tensor:
        """The dense matrix, or of it the channels of this expert's part."""
        name = _dense_name(parameter)
        if self._last is None or self._last[0] != name:
            self._last = (name, self.source.full(name))
        whole, split = self._last[1], self.options.split
        if expert is None or split == 1:
            return whole
        place = expert % split
        if parameter.role is Role.FFN_OUT:
            return whole.chunk(split, dim=1)[place]
        return torch.cat([half.chunk(split)[place] for half in whole.chunk(2)])  # [gate; up]

    def _normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Numbers that depend on the seed and the name alone: fp32, standard deviation 1."""
        digest = hashlib.sha256(f"{self.options.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
        return torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class _UpcycledFile:
    """Writes one file; called with its number. Picklable: the source opens its files again in another process."""

    source: Base
    arch: ModelArch
    options: Upcycling
    target: Path
    groups: list[list[_Piece]]

    def __call__(self, index: int) -> WrittenFile:
        maker, pieces = _Maker(self.source, self.arch, self.options), self.groups[index]
        specs = [TensorSpec(f"{i}.param", maker.dtype(piece), (piece.numel,)) for i, piece in enumerate(pieces)]
        tensors: Iterator[Tensor] = map(maker.make, pieces)
        path = self.target / f"rank_{index:05d}.safetensors"
        return write_fragments(path, [piece.fragment for piece in pieces], ahead(tensors), specs)


def upcycle(
    source: Base,
    out: Path,
    options: Upcycling,
    *,
    workers: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> ModelArch:
    """Write a native checkpoint of a dense model's weights as a mixture of experts, without optimizer states.

    Args:
        workers, max_file_bytes: see import_folder().

    Returns:
        Its architecture.

    Raises:
        ConversionError: the options do not fit the model, or `out` exists or cannot be written.
    """
    arch = options.arch(source.arch)
    maker = _Maker(source, arch, options)
    pieces = _pieces(source, arch)
    lost = sorted({name for name in source.keys() if ".mlp." not in name} - {p.parameter.name for p in pieces})
    if lost:
        raise ConversionError(f"{source.folder}: holds tensors that the model does not have: {', '.join(lost[:3])}")
    groups = split_rules(
        pieces, lambda piece: piece.numel * maker.dtype(piece).itemsize, files=workers, max_bytes=max_file_bytes
    )
    with written_aside(out) as temporary:
        job = _UpcycledFile(source, arch, options, temporary, groups)
        written = in_processes(job, len(groups), workers)
        folders = [source.folder / COMPANIONS, source.folder]
        beside = write_companions(read_companions(folders), temporary)
        state = {
            "step": 0,
            "consumed_samples": 0,
            "layout": {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
            "model": arch.model_dump(mode="json"),
            "hugging_face": source.origin().record(),
        }
        finish_folder(temporary, written, [write_json(temporary / STATE, state), *beside])
    return arch
