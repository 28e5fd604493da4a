"""What this rank holds of the model and the optimizer, as fragments of global tensors.

Names, global shapes and offsets come from megatron-core's sharded state dicts; the flat ranges come from its distributed
optimizer. Nothing is gathered: a fragment is what lies in this rank's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.model.build import LanguageModel
from flagscale_like.runtime.parallel import ParallelContext

MOMENTS = ("exp_avg", "exp_avg_sq")


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


def parameter_pieces(chunk: LanguageModel, ctx: ParallelContext) -> dict[nn.Parameter, list[Piece]]:
    """Every parameter of a chunk as pieces: one, or two for a gated MLP's [gate; up] matrix."""
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": ctx.groups.dp_cp}
    pieces: dict[nn.Parameter, list[Piece]] = {}
    for entry in chunk.sharded_state_dict(metadata=metadata).values():
        if isinstance(entry, ShardedTensorFactory):
            parts, start = [], 0
            for sharded in entry.build():
                parts.append(_piece(sharded, start))
                start += sharded.data.numel()
            pieces[entry.data] = parts
        elif isinstance(entry, ShardedTensor):
            pieces[entry.data] = [_piece(entry, 0)]
    return pieces


def _piece(sharded: ShardedTensor, start: int) -> Piece:
    shape, replica = tuple(sharded.local_shape), sharded.replica_id
    box = Fragment(sharded.key, tuple(sharded.global_shape), tuple(sharded.global_offset), shape, 0, prod(shape))
    # replica_id is (pipeline copy, tensor-parallel copy, data-parallel copy); the optimizer divides the last itself.
    return Piece(box, start, primary=replica[0] == 0 and replica[1] == 0)


@dataclass(frozen=True)
class OptimizerShard:
    """A fragment of a parameter whose update this rank computes.

    Attributes:
        tensors: 1-D views of the fp32 master weight `param` and of Adam's moments, each of the fragment's elements.
    """

    fragment: Fragment
    primary: bool
    tensors: dict[str, Tensor]


def optimizer_shards(
    chunks: list[LanguageModel], optimizer: MegatronOptimizer, ctx: ParallelContext
) -> Iterator[OptimizerShard]:
    """What the distributed optimizer of this rank owns, piece by piece. The moments must exist: see `ensure_moments`."""
    for chunk in chunks:
        for parameter, pieces in parameter_pieces(chunk, ctx).items():
            for part in optimizer.chained_optimizers:
                if parameter not in part.model_param_group_index_map:
                    continue  # all of it belongs to other data-parallel ranks
                group, order = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][order]
                state = part.optimizer.state[main]
                owned = part._get_model_param_range_map(parameter)["param"]
                for piece in pieces:
                    fragment = piece.cut(owned.start, owned.end)
                    if fragment is None:
                        continue
                    at = piece.start + fragment.start - owned.start
                    flat = {"param": main, **{name: state[name] for name in MOMENTS}}
                    views = {name: t.detach().view(-1)[at : at + fragment.numel] for name, t in flat.items()}
                    yield OptimizerShard(fragment, piece.primary, views)


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
