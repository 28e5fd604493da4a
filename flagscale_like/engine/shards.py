"""The one walk over what megatron-core holds of this rank's parameters, weights, gradients and optimizer states.

Checkpoints, monitors, calibration and the benchmark look at parameters here and nowhere else. Names, global shapes and
offsets come from megatron-core's sharded state dicts; the flat ranges come from its distributed optimizer. Nothing is
gathered: a shard is what lies in this rank's memory, and each element is owned by one of its replicas, so that sums over
the counting shards of all ranks are sums over the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from torch import Tensor, nn

from flagscale_like.arch import Parameter, Role
from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.checkpoint.shard import MOMENTS, Shard
from flagscale_like.model.build import LanguageModel, named_shards
from flagscale_like.model.experts import is_expert
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.storage import memory_of


@dataclass(frozen=True)
class Piece:
    """A part of a local parameter that is one box of a global tensor.

    Attributes:
        box: the whole piece as a fragment.
        start: where it begins in the local parameter, flat.
        primary: whether this rank's copy is the one to save (not a tensor-parallel or tied replica).
    """

    box: Fragment
    start: int
    primary: bool

    def cut(self, start: int, stop: int) -> Fragment | None:
        """The elements of `[start, stop)` of the flat local parameter that lie in this piece."""
        low, high = max(start - self.start, 0), min(stop - self.start, self.box.stop)
        if low >= high:
            return None
        return Fragment(self.box.key, self.box.global_shape, self.box.offset, self.box.shape, low, high)


def parameter_pieces(chunk: LanguageModel, ctx: ParallelContext, prefix: str = "") -> dict[nn.Parameter, list[Piece]]:
    """Every parameter of a chunk as pieces: one, or two for a gated MLP's [gate; up] matrix.

    megatron-core's state dicts take adapters, stacked experts and norms of q and k for whole on every rank; their pieces come
    from the table of parameters.

    Args:
        prefix: of the pieces' keys; see Engine.name.
    """
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": ctx.groups.dp_cp}
    pieces: dict[nn.Parameter, list[Piece]] = {}
    for entry in chunk.sharded_state_dict(metadata=metadata).values():
        if isinstance(entry, ShardedTensorFactory):
            parts, start = [], 0
            for sharded in entry.build():
                parts.append(_piece(sharded, start, prefix))
                start += sharded.data.numel()
            pieces[entry.data] = parts
        elif isinstance(entry, ShardedTensor):
            pieces[entry.data] = [_piece(entry, 0, prefix)]
    table = chunk.spec.table
    for name, parameter in named_shards(chunk).items():
        entry = table.get(name)
        if entry is not None and (entry.role.is_adapter or entry.experts or entry.role is Role.HEAD_NORM):
            place = {"tp": ctx.layout.tp, "tp_rank": ctx.tp_rank, "ep": ctx.layout.ep, "ep_rank": ctx.ep_rank}
            pieces[parameter] = pieces_of(entry, **place, prefix=prefix)
    return pieces


def pieces_of(  # many parameters: the degrees, and this rank's place in each
    parameter: Parameter, *, tp: int, tp_rank: int, ep: int, ep_rank: int, prefix: str = ""
) -> list[Piece]:
    """The pieces of one rank's part of a parameter, from the table's entry."""
    shape, cut, key = parameter.padded_shape(tp), parameter.cut, prefix + parameter.name
    if parameter.experts:
        own = parameter.shard_shape(tp, ep)
        offset = (ep_rank * own[0], *(0 for _ in own[1:]))
        return [Piece(Fragment(key, shape, offset, own, 0, prod(own)), 0, primary=True)]
    if cut is None:
        box = Fragment(key, shape, (0,) * len(shape), shape, 0, prod(shape))
        return [Piece(box, 0, primary=tp_rank == 0)]
    block = shape[cut] // parameter.blocks
    own = tuple(block // tp if dim == cut else size for dim, size in enumerate(shape))
    pieces = []
    for index in range(parameter.blocks):
        offset = tuple(index * block + tp_rank * own[cut] if dim == cut else 0 for dim in range(len(shape)))
        box = Fragment(key, shape, offset, own, 0, prod(own))
        pieces.append(Piece(box, index * box.numel, primary=True))
    return pieces


def _piece(sharded: ShardedTensor, start: int, prefix: str) -> Piece:
    shape, replica = tuple(sharded.local_shape), sharded.replica_id
    key = prefix + sharded.key
    box = Fragment(key, tuple(sharded.global_shape), tuple(sharded.global_offset), shape, 0, prod(shape))
    # replica_id is (pipeline copy, tensor-parallel copy, replica); the walk divides the last itself.
    return Piece(box, start, primary=replica[0] == 0 and replica[1] == 0)


@dataclass(frozen=True)
class OwnedShard:
    """The flat range of a parameter that this rank owns among its replicas: it computes its update, and saves it.

    Attributes:
        name: of the parameter, the same on every layout.
        parameter: this tensor-parallel rank's part.
        main: 1-D. Of a trained parameter the fp32 master weight, whose `.grad` is the reduced gradient between
            forward_backward() and the next step; of a frozen one a view of the parameter, in its own dtype.
        start: where the range begins in the flat parameter.
        counts: false for copies that another rank counts (norms over tensor-parallel ranks, a tied embedding's second).
        pieces: of the whole parameter.
        state, group: the optimizer's, of `main`; empty where the parameter is frozen.
    """

    name: str
    parameter: nn.Parameter
    main: Tensor
    start: int
    counts: bool
    pieces: tuple[Piece, ...]
    state: dict[str, Any]
    group: dict[str, Any]

    @property
    def trained(self) -> bool:
        return bool(self.group)

    def fragments(self) -> Iterator[Shard]:
        """What is saved of the range, piece by piece. The moments must exist: see `ensure_moments`."""
        flat = {"param": self.main} | ({name: self.state[name] for name in MOMENTS} if self.trained else {})
        for piece in self.pieces:
            fragment = piece.cut(self.start, self.start + self.main.numel())
            if fragment is not None:
                at = piece.start + fragment.start - self.start
                views = {name: t.detach().view(-1)[at : at + fragment.numel] for name, t in flat.items()}
                yield Shard(fragment, piece.primary, views)


def owned_shards(
    models: list[LanguageModel], optimizer: MegatronOptimizer | None, ctx: ParallelContext, prefix: str = ""
) -> Iterator[OwnedShard]:
    """What this rank owns, parameter by parameter.

    Of a trained parameter the distributed optimizer says which range that is. A frozen parameter is the same on all
    replicas (ParallelContext.replicas_of), and is dealt out to them in equal parts.
    """
    parts = optimizer.chained_optimizers if optimizer is not None else []
    for model in models:
        pieces = parameter_pieces(model, ctx, prefix)
        for name, parameter in named_shards(model).items():
            own = tuple(pieces[parameter])
            counts = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
                parameter, tp_group=ctx.groups.tp
            )
            if not parameter.requires_grad or not parts:
                replicas, rank = ctx.replicas_of(expert=is_expert(parameter))
                low, high = (parameter.numel() * part // replicas for part in (rank, rank + 1))
                if low < high:
                    main = parameter.detach().view(-1)[low:high]
                    yield OwnedShard(name, parameter, main, low, counts, own, {}, {})
                continue
            for part in parts:
                if parameter in part.model_param_group_index_map:  # else all of it belongs to other replicas
                    index, order = part.model_param_group_index_map[parameter]
                    group = part.optimizer.param_groups[index]
                    main = group["params"][order]
                    start = part._get_model_param_range_map(parameter)["param"].start
                    yield OwnedShard(name, parameter, main, start, counts, own, part.optimizer.state[main], group)


def adam_update(shard: OwnedShard) -> Tensor:
    """The change that the last AdamW step made to a master weight, from what the step left behind: no copy is kept.

    w' = (1 - lr * wd) w - lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), solved for w' - w.
    """
    group, state = shard.group, shard.state
    (b1, b2), lr, decay = group["betas"], group["lr"], group["lr"] * group["weight_decay"]
    step = float(state["step"] if "step" in state else group["step"])
    direction = state["exp_avg"] / (1 - b1**step) / ((state["exp_avg_sq"] / (1 - b2**step)).sqrt() + group["eps"])
    before = (shard.main.detach() + lr * direction) / (1 - decay)
    return shard.main.detach() - before


@torch.no_grad()
def share_master_weights(owned: Iterable[OwnedShard], chunks: list[MegatronModule]) -> None:
    """Make the weights of what is trained from the fp32 master weights, as a step does: each rank rounds what it owns, and
    megatron-core's all-gather brings the ranges of the other replicas. All ranks call it.

    Args:
        owned: the trained shards of this rank.
        chunks: of the model, wrapped.
    """
    for chunk in chunks:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if group.param_gather_handle is not None:  # of the step before
                group.start_param_sync(force_sync=True)
    for shard in owned:
        if memory_of(shard.main) != memory_of(shard.parameter):  # an fp32 model's weights are its master weights
            shard.parameter.view(-1)[shard.start : shard.start + shard.main.numel()].copy_(shard.main)
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def ensure_moments(optimizer: MegatronOptimizer) -> None:
    """Create Adam's state where no step has been made yet."""
    created = False
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                state = part.optimizer.state[main]
                for name in MOMENTS:
                    if name not in state:
                        state[name] = torch.zeros_like(main)
                        created = True
    if created:
        set_adam_step(optimizer, 0)


def adam_step(optimizer: MegatronOptimizer) -> int:
    """Updates made so far: torch keeps the count with each parameter, apex and Transformer Engine with each group."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
            for main in group["params"]:
                if "step" in part.optimizer.state[main]:
                    return int(part.optimizer.state[main]["step"])
    return 0


def set_adam_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the count. Each parameter gets a tensor of its own: with a shared one it would advance once a parameter."""
    for part in optimizer.chained_optimizers:
        per_parameter = isinstance(part.optimizer, torch.optim.AdamW | torch.optim.Adam)
        for group in part.optimizer.param_groups:
            if not per_parameter:
                group["step"] = step
                continue
            for main in group["params"]:
                device = main.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                part.optimizer.state[main]["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)


def loss_scaler_state(optimizer: MegatronOptimizer) -> dict[str, Any] | None:
    """The fp16 loss scaler's numbers; None for other precisions."""
    scaler = optimizer.chained_optimizers[0].grad_scaler
    if scaler is None:
        return None
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in scaler.state_dict().items()}


def set_loss_scaler_state(optimizer: MegatronOptimizer, state: dict[str, Any] | None) -> None:
    """Put back what loss_scaler_state() returned."""
    scaler = optimizer.chained_optimizers[0].grad_scaler
    if scaler is None or not state:
        return
    tensors = {k: torch.tensor([v], dtype=torch.float) if k == "scale" else v for k, v in state.items()}
    for part in optimizer.chained_optimizers:
        part.grad_scaler.load_state_dict(tensors)
