"""A model's weights by their Hugging Face names, whole, from the layout that they are trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.fragments import Fragment, copy_overlap
from flagscale_like.checkpoint.hf_folder import fragment_of
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError, ConfigError
from flagscale_like.families import find_family
from flagscale_like.families.weight_map import Exact, Rule


@dataclass(frozen=True)
class WeightSpec:
    """A tensor of a Hugging Face model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def weight_specs(arch: ModelArch, dtype: torch.dtype) -> list[WeightSpec]:
    """The tensors of a language model of this family, in the order of hf_weights()."""
    return [
        WeightSpec(name, tuple(shape), torch.float32 if isinstance(rule, Exact) else dtype)
        for rule in find_family(arch.family).rules(arch)
        for name, shape in zip(rule.hf, rule.hf_shapes(arch), strict=True)
    ]


def hf_weights(engine: Engine, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its Hugging Face name, whole, on every rank. All ranks iterate alike: each tensor is a collective.

    The ranks add up what each holds alone, one megatron-core tensor at a time, so that no rank holds a second model.

    Args:
        dtype: of the tensors, but for those that keep fp32.

    Raises:
        ConfigError: the model has LoRA adapters, which these names have no place for.
        CheckpointError: the ranks do not hold a whole tensor together.
    """
    spec, device = engine.spec, engine.ctx.platform.device
    if spec.lora is not None:
        raise ConfigError("the model has LoRA adapters, which are not merged: generate with the engine own or refit")
    held = _held(engine)
    rules = find_family(spec.arch.family).rules(spec.arch)
    for rule in rules:
        whole = _whole(rule, held, device, torch.float32 if isinstance(rule, Exact) else dtype)
        yield from zip(rule.hf, rule.to_hf(whole.view(rule.shape), spec.arch), strict=True)


def _held(engine: Engine) -> dict[str, list[tuple[Fragment, Tensor]]]:
    """What this rank alone holds of each tensor: fragments, and their elements."""
    held: dict[str, list[tuple[Fragment, Tensor]]] = defaultdict(list)
    for shard in engine.owned:
        for piece in shard.pieces:
            fragment = piece.cut(shard.start, shard.start + shard.main.numel()) if piece.primary else None
            if fragment is not None:
                at = piece.start + fragment.start
                flat = shard.parameter.detach().view(-1)  # not the master weights, which may wait in host memory
                held[fragment.key].append((fragment, flat[at : at + fragment.numel]))
    return held


def _whole(
    rule: Rule, held: dict[str, list[tuple[Fragment, Tensor]]], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One tensor, 1-D, on every rank."""
    out, copied = torch.zeros(rule.numel, dtype=dtype, device=device), 0
    for fragment, flat in held.get(rule.core, []):
        copied += copy_overlap(fragment, flat, fragment_of(rule, fragment.global_shape), out)
    count = torch.tensor([copied], dtype=torch.int64, device=device)
    dist.all_reduce(count)
    if int(count) != rule.numel:
        raise CheckpointError(f"{rule.core}: the ranks hold {int(count)} of its {rule.numel} elements together")
    dist.all_reduce(out)
    return out
