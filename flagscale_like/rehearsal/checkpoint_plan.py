"""The index that a save would have, and what a load on another layout would read, without a tensor or a rank.

Where each element lies follows from the table of parameters, megatron-core's buffers (planner.memory) and the pieces of a
parameter (engine.shards). A rank owns at most a share of each bucket, so a checkpoint of 16,384 ranks has some ten fragments
a file, and its index is built in seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flagscale_like.arch import ModelArch, Parameter, Role
from flagscale_like.checkpoint.dealing import deal
from flagscale_like.checkpoint.fragments import Fragment, elements_within
from flagscale_like.checkpoint.index import Form, FragmentTable, build_table, pack_rows
from flagscale_like.checkpoint.shard import MOMENTS
from flagscale_like.config import Lora, RunConfig
from flagscale_like.engine.shards import Piece, pieces_of
from flagscale_like.errors import ConfigError
from flagscale_like.planner.layout import Layout
from flagscale_like.planner.memory import Buffer, chunk_adapters, chunk_parameters, stage_buffers

FP32 = 4  # bytes of an element of a master weight or a moment
FROZEN: Form = (("param", "F32"),)  # a router's bias, the one frozen parameter that is saved here
TRAINED: Form = tuple(sorted((kind, "F32") for kind in ("param", *MOMENTS)))


@dataclass(frozen=True)
class States:
    """What of a run its checkpoints depend on.

    Attributes:
        lora: with it the adapters alone are saved.
    """

    arch: ModelArch
    layout: Layout
    lora: Lora | None = None

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> States:
        """Those of a configuration on `world_size` ranks.

        Raises:
            ConfigError: the world size does not fit the layout, or the run trains what is not planned here.
        """
        unknown = "train.frozen" if config.train.frozen else ""
        if config.objective.head != "language_model":
            unknown = f"objective.kind {config.objective.kind}"
        if unknown:
            raise ConfigError(f"a checkpoint with {unknown} is not planned: leave it out, or save one and look at it")
        return cls(config.model, Layout.of(config, world_size), config.lora)


@dataclass(frozen=True)
class Owned:
    """A fragment that a rank owns: it updates it, and saves it where its copy is the primary one."""

    rank: int
    fragment: Fragment
    primary: bool
    trained: bool


@dataclass(frozen=True)
class _Held:
    """A parameter of a stage's chunk.

    Attributes:
        span, bucket: where it and its bucket lie in the buffer; None for what has no gradient.
        copy: the last stage's copy of a tied embedding.
        apart: an expert's, whose copies lie on the ranks that ep leaves.
    """

    parameter: Parameter
    span: tuple[int, int] | None
    bucket: tuple[int, int] | None
    copy: bool
    apart: bool


def _stage(states: States, stage: int) -> Iterator[_Held]:
    """The parameters of a stage, chunk by chunk, in the built model's order."""
    arch, layout, lora = states.arch, states.layout, states.lora
    buffers = iter(stage_buffers(arch, layout, stage, lora))
    for chunk in range(layout.vpp):
        held = chunk_parameters(arch, layout, stage, chunk)
        if lora is not None:
            held = chunk_adapters(arch, lora, layout, stage, chunk)
        trained = [p for p in held if p.role is not Role.ROUTER_BIAS]
        apart = [bool(p.experts) and layout.cuts_experts for p in trained]
        places: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
        for experts in sorted(set(apart)):
            own = [i for i, is_apart in enumerate(apart) if is_apart == experts]
            places |= dict(zip(own, _places(next(buffers)), strict=True))
        number = 0
        for place, parameter in enumerate(held):
            copy = arch.tie_embeddings and layout.pp > 1 and stage > 0 and place == len(held) - 1
            copy = copy and parameter.role.is_vocabulary
            if parameter.role is Role.ROUTER_BIAS:
                yield _Held(parameter, None, None, copy=False, apart=False)
                continue
            yield _Held(parameter, *places[number], copy=copy, apart=apart[number])
            number += 1


def _places(buffer: Buffer) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Of each parameter, in the model's order, its span and its bucket."""
    ends = np.array([end for _, end in buffer.buckets])
    starts = [start for start, _ in buffer.spans]
    of = np.searchsorted(ends, starts, side="right")
    found = [(span, buffer.buckets[int(bucket)]) for span, bucket in zip(buffer.spans, of, strict=True)]
    return found[::-1]  # a buffer has them in reverse order


def owned_fragments(states: States) -> Iterator[Owned]:
    """What each rank owns, stage by stage; of one rank, in the order in which it saves it."""
    layout = states.layout
    ranks = layout.world_size // layout.pp
    for stage in range(layout.pp):
        for held in _stage(states, stage):
            stride = layout.ep if held.apart else layout.tp
            for part in range(stride):  # of the tensor- or expert-parallel ranks that the parameter is cut over
                pieces = _pieces(held, layout, part)
                numel = sum(piece.box.numel for piece in pieces)
                for piece in pieces:
                    for replica, start, stop in _shares(held, numel, ranks // stride):
                        fragment = piece.cut(start, stop)
                        if fragment is not None:
                            rank = stage * ranks + replica * stride + part
                            yield Owned(rank, fragment, piece.primary and not held.copy, held.span is not None)


def _pieces(held: _Held, layout: Layout, part: int) -> list[Piece]:
    if held.apart:
        return pieces_of(held.parameter, tp=1, tp_rank=0, ep=layout.ep, ep_rank=part)
    return pieces_of(held.parameter, tp=layout.tp, tp_rank=part, ep=1, ep_rank=0)


def _shares(held: _Held, numel: int, replicas: int) -> Iterator[tuple[int, int, int]]:
    """(replica, start, stop) of the flat parameter for each replica that owns some of it."""
    if held.span is None or held.bucket is None:  # dealt out in equal parts
        bounds = [numel * replica // replicas for replica in range(replicas + 1)]
        yield from ((i, bounds[i], bounds[i + 1]) for i in range(replicas) if bounds[i] < bounds[i + 1])
        return
    (start, stop), (begin, end) = held.span, held.bucket
    size = (end - begin) // replicas
    for replica in range((start - begin) // size, (stop - 1 - begin) // size + 1):
        low = begin + replica * size
        yield replica, max(start, low) - start, min(stop, low + size) - start


def planned_index(states: States) -> FragmentTable:
    """The index of a checkpoint that these ranks save, fragment for fragment."""
    files: dict[int, list[Owned]] = defaultdict(list)
    for owned in owned_fragments(states):
        if owned.primary:
            files[owned.rank].append(owned)
    return build_table(
        pack_rows(
            f"rank_{rank:05d}.safetensors",
            [owned.fragment for owned in files[rank]],
            [TRAINED if owned.trained else FROZEN for owned in files[rank]],
        )
        for rank in range(states.layout.world_size)
    )


def bytes_of_files(table: FragmentTable) -> np.ndarray:
    """Bytes of tensors in each file of an index whose tensors are all fp32."""
    kinds = np.array([len(form) for form in table.names.forms] or [0])
    elements = (table.stop - table.start) * kinds[table.form]
    return np.bincount(table.file, weights=elements, minlength=len(table.names.files)) * FP32


@dataclass(frozen=True)
class LoadPlan:
    """What each rank of a layout reads to go on from a checkpoint.

    Attributes:
        weights, states: [ranks] bytes of its share of the frozen weights, and of its master weights and moments, from which
            the weights of what is trained are made.
        files: [ranks] how many of the checkpoint's files a rank opens.
        fragments: [ranks] how many parts of files it reads.
    """

    weights: np.ndarray
    states: np.ndarray
    files: np.ndarray
    fragments: np.ndarray

    @property
    def bytes(self) -> np.ndarray:
        return self.weights + self.states

    def seconds(self, gb_per_s: float, *, ranks_per_node: int = 8, node_gb_per_s: float | None = None) -> float:
        """Seconds of the load.

        Args:
            gb_per_s: that the file system gives to all ranks together, 1e9 bytes/s.
            node_gb_per_s: that one node can take at most; None is no limit.
        """
        whole = float(self.bytes.sum()) / (gb_per_s * 1e9)
        if node_gb_per_s is None:
            return whole
        starts = np.arange(0, len(self.bytes), ranks_per_node)
        return max(whole, float(np.add.reduceat(self.bytes, starts).max()) / (node_gb_per_s * 1e9))


class _Reads:
    """What of a checkpoint fragments need: bytes of one kind, files, and how many parts of files."""

    def __init__(self, table: FragmentTable) -> None:
        self.table = table

    def of(self, fragments: list[Fragment]) -> tuple[int, np.ndarray, int]:
        files, elements, parts = [np.zeros(0, dtype=np.int32)], 0, 0
        for fragment in fragments:
            rows = self.table.overlapping_rows(fragment)
            files.append(self.table.file[rows])
            elements += elements_within(fragment, self.table.global_shape(fragment.key))
            parts += len(rows)
        return elements * FP32, np.unique(np.concatenate(files)), parts


def plan_load(table: FragmentTable, states: States) -> LoadPlan:
    """What the ranks of a layout read of a checkpoint: frozen weights that are dealt to them, the states of what they own.

    A rank reads the elements that it wants and no others; where a box is cut in another dimension, the file system reads
    whole pages around them.

    Raises:
        ConfigError: the checkpoint lacks a tensor of the model, has one too many, or one in another shape.
    """
    world, reads = states.layout.world_size, _Reads(table)
    _check_tensors(table, states)
    owned: dict[int, list[Fragment]] = defaultdict(list)
    for one in owned_fragments(states):
        if one.trained:
            owned[one.rank].append(one.fragment)
    kinds = 1 + len(MOMENTS)  # master weights and moments
    dealt = _dealt(states)
    found = np.zeros((4, world), dtype=np.int64)
    for rank in range(world):
        own_bytes, own_files, own_parts = reads.of(owned[rank])
        weights, files, parts = reads.of(dealt[rank])
        found[:, rank] = weights, kinds * own_bytes, len(np.union1d(own_files, files)), parts + kinds * own_parts
    return LoadPlan(*found)


def _dealt(states: States) -> dict[int, list[Fragment]]:
    """The frozen weights that each rank reads for all that hold them."""
    layout, found = states.layout, defaultdict(list)
    ranks = layout.world_size // layout.pp
    for stage in range(layout.pp):
        frozen = sorted((one for one in _stage(states, stage) if one.span is None), key=lambda one: one.parameter.name)
        for shard in range(layout.tp if frozen else 0):
            held = [_pieces(one, layout, shard) for one in frozen]
            sizes = [(sum(piece.box.numel for piece in pieces), 1) for pieces in held]
            for part in deal(sizes, ranks // layout.tp):
                fragments = (piece.cut(part.start, part.stop) for piece in held[part.number])
                found[stage * ranks + part.reader * layout.tp + shard] += filter(None, fragments)
    return found


def _check_tensors(table: FragmentTable, states: States) -> None:
    wanted = {held.parameter.name for stage in range(states.layout.pp) for held in _stage(states, stage)}
    if unknown := sorted(set(table.keys()) - wanted):
        raise ConfigError(f"the checkpoint holds {unknown[0]}, which the model has not: it is of another model")
    for stage in range(states.layout.pp):
        for held in _stage(states, stage):
            name, shape = held.parameter.name, held.parameter.shape
            if name not in table:
                raise ConfigError(f"the checkpoint holds no {name}: it is of another model")
            saved = table.global_shape(name)
            if saved[1:] != shape[1:] or (saved[0] != shape[0] and not held.parameter.role.is_vocabulary):
                raise ConfigError(f"{name} has shape {saved} in the checkpoint, and {shape} in the model")


def describe_save(table: FragmentTable, layout: Layout, gb_per_s: float) -> str:
    """How large a checkpoint is, and how evenly its files share it.

    Args:
        gb_per_s: that all ranks together write, 1e9 bytes/s.
    """
    sizes = bytes_of_files(table)
    index = sum(getattr(table, name).nbytes for name in ("start", "stop", "file", "place", "form", "offset", "shape"))
    return (
        f"saved by {layout.world_size:,} ranks ({layout.describe()}): {len(sizes):,} files, {sizes.sum() / 1e9:,.1f} GB; "
        f"a file has {sizes.mean() / 1e6:,.1f} MB on average, {sizes.min() / 1e6:,.1f} at least and "
        f"{sizes.max() / 1e6:,.1f} at most; {sizes.sum() / gb_per_s / 1e9:,.1f} s at {gb_per_s:g} GB/s\n"
        f"index: {len(table):,} fragments of {len(table.keys()):,} tensors, {index / 1e6:,.1f} MB"
    )


def describe_load(  # what is loaded, by whom, and the file system
    table: FragmentTable, plan: LoadPlan, layout: Layout, gb_per_s: float, node_gb_per_s: float | None
) -> str:
    """What a load costs: files, bytes and time.

    Args:
        table: of the checkpoint.
    """
    total, each, files = plan.bytes.sum(), plan.bytes, plan.files
    saved = bytes_of_files(table).sum()
    limit = f", and at most {node_gb_per_s:g} GB/s a node of 8" if node_gb_per_s is not None else ""
    seconds = plan.seconds(gb_per_s, node_gb_per_s=node_gb_per_s)
    return (
        f"loaded by {layout.world_size:,} ranks ({layout.describe()}): a rank opens {files.mean():,.1f} files on average and "
        f"{files.max():,} at most, and reads {plan.fragments.mean():,.0f} parts of them\n"
        f"bytes: {each.mean() / 1e9:,.2f} GB a rank on average, {each.max() / 1e9:,.2f} at most (rank {int(each.argmax())}); "
        f"{total / 1e9:,.1f} GB in all, {total / saved:.2f} x the checkpoint; the check of all files before it reads "
        f"{saved / 1e9:,.1f} GB\n"
        f"time: {seconds:,.1f} s at {gb_per_s:g} GB/s of the file system{limit}"
    )
