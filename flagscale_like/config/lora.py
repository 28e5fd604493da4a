"""The group `lora`: low-rank adapters beside the weights of a model that is loaded and does not change."""

from __future__ import annotations

import difflib
import math
from typing import Literal

from pydantic import Field, model_validator

from flagscale_like.arch import Frozen, ModelArch, Parameter, adapter_parameters, parameters

NO_BASE = "lora trains adapters beside weights: give them with checkpoint.load or checkpoint.init_from_hf"
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
# Hugging Face's names of parts of these matrices.
ELSEWHERE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "W_pack"), "linear_qkv"),
    "o_proj": "linear_proj",
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "linear_fc1"),
    "down_proj": "linear_fc2",
}


class Lora(Frozen):
    """Low-rank adapters (LoRA, Hu et al. 2022): y = W x + scale B A x, with A and B trained and W left as it is.

    The weights W come from checkpoint.load or checkpoint.init_from_hf. Checkpoints hold the adapters alone.

    Attributes:
        rank: rows of A and columns of B.
        alpha: numerator of the scale, which is alpha / rank.
        targets: the matrices of every layer that get an adapter: `linear_qkv` (q, k and v share one A), `linear_proj`,
            `linear_fc1` (gate and up share one A), `linear_fc2`.
        dropout: share of an adapter's inputs that are set to 0 in training.
        rslora: scale alpha / sqrt(rank) instead of alpha / rank (rsLoRA, Kalajdzievski 2023).
        dora: train the length of every row of W + scale B A as well (DoRA, Liu et al. 2024).
        plus_ratio: learning rate of B, relative to that of A (LoRA+, Hayou et al. 2024).
        init: distribution that A is drawn from; B begins at 0. `kaiming` is uniform within 1 / sqrt(columns), as peft draws
            it. `gaussian` is normal with standard deviation 1 / rank.
        base: where the weights W are now, a checkpoint or a Hugging Face folder, if adapters are loaded whose checkpoint
            names a folder that has moved. It has to hold the same weights.
    """

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, ge=0)
    targets: tuple[str, ...] = Field(default=TARGETS, min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dora: bool = False
    plus_ratio: float = Field(default=1.0, gt=0)
    init: Literal["kaiming", "gaussian"] = "kaiming"
    base: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Lora:
        if not self.alpha:
            raise ValueError(
                "alpha (0) must be above 0: with 0 the adapters change nothing, and no gradient reaches them"
            )
        twice = next((name for name in self.targets if self.targets.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"targets lists {twice} twice")
        return self

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def parameters(self, arch: ModelArch) -> tuple[Parameter, ...]:
        """The adapters' parameters, in the built model's order."""
        return adapter_parameters(arch, self.targets, self.rank, magnitude=self.dora)

    def check(self, arch: ModelArch) -> None:
        """Whether a model can have these adapters.

        Raises:
            ValueError: it has no such matrix (the message names the nearest), or one that is smaller than the rank.
        """
        matrices: dict[str, tuple[int, ...]] = {}
        whole = set()
        for parameter in parameters(arch):
            if parameter.role.is_layer_matrix and parameter.cut is None and not parameter.experts:
                whole.add(parameter.module)
            elif parameter.role.is_layer_matrix:
                matrices[parameter.module] = min(
                    matrices.get(parameter.module, parameter.shape), parameter.shape, key=lambda shape: min(shape[-2:])
                )
        for target in self.targets:
            if target in whole:
                raise ValueError(
                    f"lora.targets: {target} has no adapters, because tensor parallelism does not cut it; the matrices with "
                    f"adapters are {', '.join(matrices)}"
                )
            if target not in matrices:
                close = difflib.get_close_matches(target, matrices, n=1, cutoff=0.4)
                near = ELSEWHERE.get(target) or next(iter(close), None)
                hint = f"did you mean {near!r}?" if near in matrices else f"the matrices are {', '.join(matrices)}"
                raise ValueError(f"lora.targets: the model has no matrix {target!r}, {hint}")
            out, inner = matrices[target][-2:]
            if self.rank > min(out, inner):
                raise ValueError(
                    f"lora.rank ({self.rank}) exceeds the smaller side of {target} ({out} x {inner}): rank "
                    f"{min(out, inner)} or less would do"
                )
