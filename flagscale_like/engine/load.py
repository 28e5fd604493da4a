"""Fill an engine's weights and optimizer states from a checkpoint or a Hugging Face folder, on any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from flagscale_like.checkpoint.adapters import AdaptedWeights, identify
from flagscale_like.checkpoint.format import CheckpointReader, is_vocabulary, keys_of
from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.checkpoint.shard import MOMENTS
from flagscale_like.checkpoint.store import WeightSource, layout_record
from flagscale_like.engine.shards import (
    OwnedShard,
    Piece,
    ensure_moments,
    parameter_pieces,
    set_adam_step,
    set_loss_scaler_state,
)
from flagscale_like.errors import CheckpointError, ConversionError
from flagscale_like.model.build import LanguageModel
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.random_state import random_states, set_random_states
from flagscale_like.runtime.storage import memory_of

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
) -> Left:
    """Fill the models' parameters on this layout, in the models' dtype. All ranks call it.

    Args:
        strict: every tensor of the model and of the source has its counterpart; otherwise what does not fit is left.
        prefix: of the model's keys in the source; see Engine.name.
        wanted: whether a parameter, by its name, is to come from the source; the others are left.
        unused: names of parameters that the source may have and the model has not.

    Raises:
        CheckpointError: strict, and tensors are missing, of another shape, or too many; before any is written.
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
    gathered = ctx.gather((misfits, sorted({piece.box.key for _, piece in everything})))
    known = {key for _, keys in gathered for key in keys}
    problems = sorted({text for found, _ in gathered for text in found.values()})
    extra = set(keys_of(source, prefix)) - known - {prefix + name for name in unused}
    problems += [f"{source.folder}: the model has no {key}" for key in sorted(extra)]
    if problems and strict:
        raise CheckpointError("; ".join(problems))
    fills = [
        (p.data.view(-1)[piece.start : piece.start + piece.box.numel], "param", piece.box)
        for p, piece in pieces
        if piece.box.key not in misfits
    ]
    _fill(fills, source)
    return Left(problems, {p for p, piece in everything if piece.box.key in misfits or not is_wanted(piece)})


def base_record(source: WeightSource, ctx: ParallelContext) -> dict[str, Any]:
    """What a checkpoint of adapters records of the weights that they belong to. Rank 0 reads what there is to read."""
    return ctx.from_main(lambda: source.record if isinstance(source, AdaptedWeights) else identify(source))


def _fill(views: list[tuple[Tensor, str, Fragment]], source: WeightSource) -> None:
    """Read fragments into contiguous 1-D views, on a device by way of the host; several at a time where that is safe."""

    @torch.no_grad()  # of each thread's own
    def fill(view: Tensor, kind: str, fragment: Fragment) -> None:
        out = view if view.device.type == "cpu" else torch.empty(view.shape, dtype=view.dtype)
        source.read(kind, fragment, out)
        if out is not view:
            view.copy_(out)

    with ThreadPoolExecutor(READERS if source.reads_in_threads else 1) as pool:
        for done in [pool.submit(fill, *wanted) for wanted in views]:
            done.result()


@torch.no_grad()
def load_optimizer(
    reader: CheckpointReader, owned: Iterable[OwnedShard], optimizer: MegatronOptimizer, name: str = ""
) -> None:
    """Fill the fp32 master weights and Adam's moments on this layout, the step count and the loss scale.

    Args:
        owned: what this rank owns; frozen parameters have nothing to fill.
        name: of the engine; see Engine.name.

    Raises:
        CheckpointError: the checkpoint holds weights only, or a parameter was frozen when it was saved and is trained now.
    """
    ensure_moments(optimizer)
    owned = [shard for shard in owned if shard.trained]
    keys = {piece.box.key for shard in owned for piece in shard.pieces}
    if not any(reader.has(kind, [key]) for kind in MOMENTS for key in keys):
        raise CheckpointError(f"{reader.folder}: holds weights only, no optimizer state; use checkpoint.load for it")
    lacking = sorted(key for key in keys if not all(reader.has(kind, [key]) for kind in MOMENTS))
    if lacking:
        raise CheckpointError(
            f"{reader.folder}: holds no optimizer state of {lacking[0]}, which was frozen when it was saved: keep it in "
            "train.frozen, or begin a new run from these weights with checkpoint.load"
        )
    # An fp32 model's weights are its master weights; load_weights has filled them.
    filled = {memory_of(shard.parameter) for shard in owned}
    _fill(
        [
            (view, kind, shard.fragment)
            for one in owned
            for shard in one.fragments()
            for kind, view in shard.tensors.items()
            if memory_of(view) not in filled
        ],
        reader,
    )
    saved = reader.state["engines"][name] if name else reader.state
    set_adam_step(optimizer, int(saved["adam_step"]))
    set_loss_scaler_state(optimizer, saved.get("loss_scaler"))


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
