"""What this rank's distributed optimizer owns of the parameters: master weights, reduced gradients, the last update.

Everything that looks at gradients (monitors, salience, the alignment with a target) looks here: each element is owned by one
data-parallel rank, so that sums over the shards of all ranks are sums over the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from flagscale_like.model.build import LanguageModel, named_shards
from flagscale_like.runtime.parallel import ParallelContext


@dataclass(frozen=True)
class OwnedShard:
    """The flat range of a parameter whose update this rank computes, on its fp32 master weight.

    Attributes:
        name: of the parameter, the same on every layout.
        parameter: this tensor-parallel rank's part.
        main: 1-D master weight; its `.grad` is the reduced gradient between prepare_grads() and the next step.
        start: where the range begins in the flat parameter.
        counts: false for copies that another rank counts (norms over tensor-parallel ranks, a tied embedding's second).
    """

    name: str
    parameter: nn.Parameter
    main: Tensor
    start: int
    counts: bool
    state: dict[str, Any]
    group: dict[str, Any]


def owned_shards(
    chunks: list[LanguageModel], optimizer: MegatronOptimizer, ctx: ParallelContext
) -> Iterator[OwnedShard]:
    """What this rank's distributed optimizer owns, parameter by parameter."""
    for chunk in chunks:
        for name, parameter in named_shards(chunk).items():
            for part in optimizer.chained_optimizers:
                if parameter not in part.model_param_group_index_map:
                    continue
                index, order = part.model_param_group_index_map[parameter]
                group = part.optimizer.param_groups[index]
                main = group["params"][order]
                owned = part._get_model_param_range_map(parameter)["param"]
                counts = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
                    parameter, tp_group=ctx.groups.tp
                )
                yield OwnedShard(name, parameter, main, owned.start, counts, part.optimizer.state[main], group)


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
