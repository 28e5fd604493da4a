"""Fill an engine's weights and optimizer states from a checkpoint or a Hugging Face folder, on any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from flagscale_like.checkpoint.adapters import AdaptedWeights, identify
from flagscale_like.checkpoint.dealing import deal
from flagscale_like.checkpoint.format import CheckpointReader, is_vocabulary, keys_of
from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.shard import MOMENTS
from flagscale_like.checkpoint.store import WeightSource, layout_record
from flagscale_like.engine.shards import (
    OwnedShard,
    Piece,
    ensure_moments,
    parameter_pieces,
    set_adam_step,
    set_loss_scaler_state,
    share_master_weights,
)
from flagscale_like.errors import CheckpointError, ConversionError, UserError
from flagscale_like.model.build import LanguageModel
from flagscale_like.model.experts import is_expert
from flagscale_like.runtime.parallel import ParallelContext, agree
from flagscale_like.runtime.random_state import random_states, set_random_states

READERS = 4  # threads: while one copies what it read, the disk works for another


@dataclass(frozen=True)
class Left:
    """What a load that is not strict did not find.

    Attributes:
        reasons: in words, the same on every rank.
        parameters: of this rank, without a weight.
    """

    reasons: list[str]
    parameters: set[nn.Parameter]


@torch.no_grad()
def load_weights(
    source: WeightSource,
    models: list[LanguageModel],
    ctx: ParallelContext,
    *,
    strict: bool = True,
    prefix: str = "",
    wanted: Callable[[str], bool] | None = None,
    unused: frozenset[str] = frozenset(),
    states_follow: bool = False,
) -> Left:
    """Fill the models' parameters on this layout, in the models' dtype. All ranks call it.

    Each part is read by one of the ranks that hold it, which sends it to the others.

    Args:
        strict: every tensor of the model and of the source has its counterpart; otherwise what does not fit is left.
        prefix: of the model's keys in the source; see Engine.name.
        wanted: whether a parameter, by its name, is to come from the source; the others are left.
        unused: names of parameters that the source may have and the model has not.
        states_follow: check all, and read what is frozen alone: load_optimizer() makes the rest from the master weights.

    Raises:
        CheckpointError: strict, and tensors are missing, of another shape, or too many; before any is written. Or a rank
            cannot read its part; on all ranks.
    """
    everything = [
        (p, piece) for model in models for p, held in parameter_pieces(model, ctx, prefix).items() for piece in held
    ]

    def is_wanted(piece: Piece) -> bool:
        return wanted is None or wanted(piece.box.key.removeprefix(prefix))

    pieces = [(p, piece) for p, piece in everything if is_wanted(piece)]
    vocab_size = models[0].arch.vocab_size
    misfits: dict[str, str] = {}
    for _, piece in pieces:
        try:
            source.check(piece.box)
            if source.arch.vocab_size != vocab_size and is_vocabulary(piece.box.key):
                misfits[piece.box.key] = (
                    f"{source.folder}: {piece.box.key} is of a vocabulary of {source.arch.vocab_size}, "
                    f"the model's is of {vocab_size}"
                )
        except (CheckpointError, ConversionError) as error:
            misfits[piece.box.key] = str(error)
    gathered = ctx.gather(misfits)
    unfit = {key for found in gathered for key in found}
    problems = sorted({text for found in gathered for text in found.values()})
    own = {piece.box.key for _, piece in everything} | {prefix + name for name in unused}
    extra = _unheld(keys_of(source, prefix), own, ctx)
    problems += [f"{source.folder}: the model has no {key}" for key in extra]
    if problems and strict:
        raise CheckpointError("; ".join(problems))
    held: dict[nn.Parameter, list[Piece]] = {}
    for p, piece in pieces:
        if piece.box.key not in unfit and not (states_follow and p.requires_grad):
            held.setdefault(p, []).append(piece)
    _read_and_share(held, source, ctx)
    return Left(problems, {p for p, piece in everything if piece.box.key in unfit or not is_wanted(piece)})


def _unheld(keys: Iterable[str], own: set[str], ctx: ParallelContext) -> list[str]:
    """Those of a source's keys that no rank has among its own. All call it.

    A number for each key is added up: to gather names would take memory that grows with the number of ranks.
    """
    names = sorted(keys)
    holders = ctx.sum([float(name in own) for name in names])
    return [name for name, count in zip(names, holders, strict=True) if not count]


def _read_and_share(held: dict[nn.Parameter, list[Piece]], source: WeightSource, ctx: ParallelContext) -> None:
    """Read of each parameter what is dealt to this rank, and get the rest from the ranks that hold the same. All call it.

    Parts are read to where they belong and sent from there: nothing is held twice, but a part on its way to a device.
    """
    flat = {p: p.data.view(-1) for p in held}
    dealt = []
    for expert in (False, True):
        own = sorted((p for p in held if is_expert(p) == expert), key=lambda p: held[p][0].box.key)
        sizes = [(p.numel(), _grain(held[p], source)) for p in own]
        group = ctx.replica_group(expert=expert)
        dealt.append((group, [(own[part.number], part) for part in deal(sizes, group.size())]))
    fills = [
        (flat[p][piece.start + fragment.start :][: fragment.numel], "param", fragment)
        for group, parts in dealt
        for p, part in parts
        if part.reader == group.rank()
        for piece in held[p]
        if (fragment := piece.cut(part.start, part.stop)) is not None
    ]
    agree(ctx, lambda: _fill(fills, source))
    for group, parts in dealt:
        for p, part in parts if group.size() > 1 else ():
            sender = dist.get_global_rank(group, part.reader)
            dist.broadcast(flat[p][part.start : part.stop].view(torch.uint8), sender, group=group)


def _grain(pieces: list[Piece], source: WeightSource) -> int:
    """At multiples of how many elements a local parameter may be cut; see WeightSource."""
    grains = {source.grain(piece.box) for piece in pieces}
    return grains.pop() if len(pieces) == 1 or grains == {1} else sum(piece.box.numel for piece in pieces)


def base_record(source: WeightSource, ctx: ParallelContext) -> dict[str, Any]:
    """What a checkpoint of adapters records of the weights that they belong to. Rank 0 reads what there is to read."""

    def record() -> dict[str, Any]:
        if isinstance(source, AdaptedWeights):
            return source.record
        if isinstance(source, CheckpointReader | HfFolder):
            return identify(source)
        raise AssertionError(f"{type(source).__name__} is no base of adapters")

    return ctx.from_main(record)


def _fill(views: list[tuple[Tensor, str, Fragment]], source: WeightSource) -> None:
    """Read fragments into contiguous 1-D views, on a device by way of the host; several at a time where that is safe."""

    @torch.no_grad()  # of each thread's own
    def fill(view: Tensor, kind: str, fragment: Fragment) -> None:
        out = view if view.device.type == "cpu" else torch.empty(view.shape, dtype=view.dtype)
        source.read(kind, fragment, out)
        if out is not view:
            view.copy_(out)

    with ThreadPoolExecutor(READERS if source.reads_in_threads else 1) as pool:
        try:
            for done in [pool.submit(fill, *wanted) for wanted in views]:
                done.result()
        except OSError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise CheckpointError(f"{source.folder}: cannot be read: {error.strerror}") from None
        except UserError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@torch.no_grad()
def load_optimizer(
    reader: CheckpointReader,
    owned: Iterable[OwnedShard],
    optimizer: MegatronOptimizer,
    chunks: list[MegatronModule],
    ctx: ParallelContext,
    name: str = "",
) -> None:
    """Fill the fp32 master weights and Adam's moments on this layout, the step count and the loss scale; make the weights of
    what is trained from the master weights. All ranks call it.

    Args:
        owned: what this rank owns; frozen parameters have nothing to fill.
        chunks: of the model, wrapped.
        name: of the engine; see Engine.name.

    Raises:
        CheckpointError: the checkpoint holds weights only, or a parameter was frozen when it was saved and is trained now, or
            a rank cannot read its part; on all ranks.
    """
    ensure_moments(optimizer)
    owned = [shard for shard in owned if shard.trained]
    agree(ctx, lambda: _fill_states(reader, owned))
    share_master_weights(owned, chunks)
    saved = reader.state["engines"][name] if name else reader.state
    set_adam_step(optimizer, int(saved["adam_step"]))
    set_loss_scaler_state(optimizer, saved.get("loss_scaler"))


def _fill_states(reader: CheckpointReader, owned: list[OwnedShard]) -> None:
    keys = {piece.box.key for shard in owned for piece in shard.pieces}
    if not any(reader.has(kind, [key]) for kind in MOMENTS for key in keys):
        raise CheckpointError(f"{reader.folder}: holds weights only, no optimizer state; use checkpoint.load for it")
    lacking = sorted(key for key in keys if not all(reader.has(kind, [key]) for kind in MOMENTS))
    if lacking:
        raise CheckpointError(
            f"{reader.folder}: holds no optimizer state of {lacking[0]}, which was frozen when it was saved: keep it in "
            "train.frozen, or begin a new run from these weights with checkpoint.load"
        )
    shards = [shard for one in owned for shard in one.fragments()]
    _fill([(view, kind, shard.fragment) for shard in shards for kind, view in shard.tensors.items()], reader)


def load_random_state(reader: CheckpointReader, ctx: ParallelContext) -> str:
    """Put back this rank's random state, where the layout and the kind of device are those that saved it.

    Returns:
        `the same layout` where it did; else why the random streams begin anew, for a line to the user.
    """
    if reader.state.get("layout") != layout_record(ctx):
        return "another layout"
    own = random_states(ctx.platform)
    saved = {name: reader.rank_tensor(ctx.rank, name) for name in own}
    states = {name: state for name, state in saved.items() if state is not None}
    if "rng.default" not in states:
        return "the same layout, without its random state: dropout draws anew"
    if any(state.shape != own[name].shape for name, state in states.items()):
        return f"the same layout on another kind of device than {ctx.platform.name}: dropout draws anew"
    set_random_states(ctx.platform, states)
    return "the same layout"
