"""How attention receives the order of the tokens: RoPE and its scalings, ALiBi, NLPE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from flagscale_like.arch.base import Frozen
from flagscale_like.errors import required

# The numbers that a kind of scaling uses; those of another kind must have their default values.
SCALING_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


class RopeScaling(Frozen):
    """How RoPE's frequencies are scaled for contexts longer than those trained on. The numbers have transformers' names.

    `linear` divides positions by `factor` (position interpolation, Chen et al. 2023). `dynamic` (dynamic NTK) raises the base
    with the length of the sequence, and changes nothing up to original_max_position_embeddings. `yarn` divides the low
    frequencies and scales q and k (Peng et al. 2023). `llama3` divides the low frequencies (Llama 3.1).

    Attributes:
        kind: `linear`, `dynamic`, `yarn` or `llama3`.
        factor: factor by which the context grows. 1.0 changes nothing, but with dynamic: there the base grows with the length
            over original_max_position_embeddings whatever the factor is.
        low_freq_factor: frequencies whose wavelength is above original_max_position_embeddings / low_freq_factor are divided
            by `factor` (llama3 only).
        high_freq_factor: frequencies whose wavelength is below original_max_position_embeddings / high_freq_factor are not
            changed (llama3 only). Frequencies in between are interpolated.
        original_max_position_embeddings: tokens of the context before scaling (not with linear). dynamic and yarn need it.
        beta_fast: frequencies that turn more often than this over the original context are not changed (yarn only).
        beta_slow: frequencies that turn less often than this over the original context are divided by `factor` (yarn only).
            Frequencies in between are interpolated.
        mscale: with mscale_all_dim, q and k are scaled by (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)
            (yarn only).
        mscale_all_dim: see mscale. Where one of the two is missing or 0, the other has no effect (yarn only).
        attention_factor: number by which q and k are scaled; without it and mscale, 0.1 ln(factor) + 1 (yarn only).
        truncate: the first and the last frequency that are interpolated are rounded to whole ones (yarn only).
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float = Field(ge=1.0)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_max_position_embeddings: int = Field(default=8192, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float | None = Field(default=None, ge=0)
    mscale_all_dim: float | None = Field(default=None, ge=0)
    attention_factor: float | None = Field(default=None, gt=0)
    truncate: bool = True

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        for name, field in type(self).model_fields.items():
            if name not in ("kind", *SCALING_FIELDS[self.kind]) and getattr(self, name) != field.default:
                users = " or ".join(kind for kind, names in SCALING_FIELDS.items() if name in names)
                raise ValueError(
                    f"{name} ({getattr(self, name)}) belongs to scaling of kind {users} (it is {self.kind})"
                )
        if self.kind in ("dynamic", "yarn") and "original_max_position_embeddings" not in self.model_fields_set:
            raise ValueError(
                f"scaling of kind {self.kind} needs original_max_position_embeddings: the tokens of the context before it"
            )
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) must be less than high_freq_factor ({self.high_freq_factor})"
            )
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast}) must be at least beta_slow ({self.beta_slow})")
        return self

    @property
    def numbers(self) -> dict[str, float | None]:
        """The numbers that this kind uses, by name."""
        return {name: getattr(self, name) for name in SCALING_FIELDS[self.kind]}


class Position(Frozen):
    """How the decoder knows token order.

    Attributes:
        kind: `rope` rotates q and k (Su et al. 2021); `alibi` adds to a score the head's slope times the distance (Press et
            al. 2022); `nlpe` is RoPE up to a distance and constrained beyond it, so that a text longer than those of training
            has no distance that training had not (Aquila2).
        base: RoPE's theta, above 1.
        scaling: how RoPE is scaled for contexts longer than those of training.
        threshold: the first distance, in tokens, that nlpe constrains.
        far: how nlpe constrains it. Aquila2's scheme is not published; these two fit its operator (Su 2023). `clipped`
            (ReRoPE): a distance of `threshold` or more counts as `threshold`. `compressed` (Leaky ReRoPE): from `threshold`
            on, positions advance by 1 / far_factor.
        far_factor: the factor of `compressed`.
    """

    kind: Literal["rope", "alibi", "nlpe"] = "rope"
    base: float = Field(default=10000.0, gt=1)
    scaling: RopeScaling | None = None
    threshold: int | None = Field(default=None, gt=0)
    far: Literal["clipped", "compressed"] = "clipped"
    far_factor: float = Field(default=8.0, gt=1.0)

    @property
    def required_threshold(self) -> int:
        """The threshold, of a position of kind nlpe."""
        return required(self.threshold, "position.threshold")

    @model_validator(mode="after")
    def _check(self) -> Position:
        if self.kind == "alibi" and self.scaling is not None:
            raise ValueError("position.scaling needs position.kind rope or nlpe (it is alibi)")
        if (self.kind == "nlpe") != (self.threshold is not None):
            raise ValueError(
                f"position.threshold belongs to position.kind nlpe (kind {self.kind}, threshold {self.threshold})"
            )
        return self
