"""ModelArch: the shape of a decoder-only transformer, and what follows from it: layers, parameters and FLOPs.

`parameters(arch)` lists a model's parameters. Initialisation, muP, monitors, the planner, checkpoints and the Hugging Face
families read this table, and ask for a parameter's `role` instead of matching its name.
"""

from __future__ import annotations

import enum
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

VOCAB_MULTIPLE = 128
EMBEDDING_NAME = "embedding.word_embeddings.weight"
OUTPUT_NAME = "output_layer.weight"


class Frozen(BaseModel):
    """A keyword-only, immutable config object; an unknown key, infinity or NaN is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def whole_number(value: object) -> int | None:
    """The value as the integer that a field of a configuration reads it as (32, 32.0, "32"); None for others."""
    try:
        return TypeAdapter(int).validate_python(value)
    except ValidationError:
        return None


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

    @model_validator(mode="after")
    def _check(self) -> Position:
        if self.kind == "alibi" and self.scaling is not None:
            raise ValueError("position.scaling needs position.kind rope or nlpe (it is alibi)")
        if (self.kind == "nlpe") != (self.threshold is not None):
            raise ValueError(
                f"position.threshold belongs to position.kind nlpe (kind {self.kind}, threshold {self.threshold})"
            )
        return self


class ModelArch(Frozen):
    """A pre-norm decoder with RMSNorm, SwiGLU and grouped-query attention.

    Attributes:
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads of each layer.
        ffn_hidden_size: width of the SwiGLU FFN, after the gate.
        max_position_embeddings: longest sequence, in tokens, that training accepts; 0 sets no limit. Scaled positions accept
            more: linear its factor times as many, yarn its factor times original_max_position_embeddings, dynamic any
            number.
        position: how attention receives the order of the tokens.
        norm_eps: epsilon of the RMSNorms.
        tie_embeddings: the output layer uses the weights of the embedding.
        head_dim: channels of a head; 0 sets hidden_size / num_attention_heads.
        num_query_groups: KV heads (grouped-query attention, Ainslie et al. 2023); 0 sets num_attention_heads.
        vocab_size: the tokenizer's size; weights are padded to a multiple of 128 * tp, and the padding is never predicted.
        qkv_bias: the q, k and v projections have a bias.
        qk_norm: RMSNorm over each head's channels of q and k, before the rotation (Dehghani et al. 2023).
        norm_head: the output matrix is used with its rows scaled to length 1 (Yang et al. 2023, section 2.4).
        sliding_window: number of keys that a query attends to, with its own key (Jiang et al. 2023). Without it, a query
            attends to all keys up to its own.
        init_std: standard deviation of the initial weight matrices.
        output_init_std: standard deviation of the two matrices of a layer that write to the residual stream; without it,
            init.scheme sets it.
        norm_init: initial value of the RMSNorm weights.
        family: Hugging Face family that the model is exported as.
    """

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    num_query_groups: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    max_position_embeddings: int = Field(default=0, ge=0)
    position: Position = Position()
    norm_eps: float = Field(default=1e-5, gt=0)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_head: bool = False
    sliding_window: int | None = Field(default=None, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    output_init_std: float | None = Field(default=None, gt=0)
    norm_init: float = 1.0
    family: str = "llama"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        heads, hidden = whole_number(values.get("num_attention_heads")), whole_number(values.get("hidden_size"))
        if heads is not None and heads > 0:
            values = dict(values)
            if not values.get("num_query_groups"):
                values["num_query_groups"] = heads
            if not values.get("head_dim") and hidden is not None:
                if hidden % heads:
                    raise ValueError(
                        f"hidden_size ({hidden}) must be divisible by num_attention_heads ({heads}), or head_dim given"
                    )
                values["head_dim"] = hidden // heads
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelArch:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by "
                f"num_query_groups ({self.num_query_groups})"
            )
        if self.head_dim % 2 and self.position.kind != "alibi":
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary positions")
        scaling = self.position.scaling
        if scaling is not None and scaling.kind == "dynamic" and self.head_dim < 4:
            raise ValueError(f"head_dim ({self.head_dim}) must be at least 4 for dynamic scaling")
        if self.sliding_window and self.position.kind == "nlpe":
            raise ValueError(f"sliding_window ({self.sliding_window}) needs position.kind rope or alibi (it is nlpe)")
        if self.norm_head and self.tie_embeddings:
            raise ValueError("norm_head needs tie_embeddings false: the embedding of the input is not normalised")
        return self

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The decoder's layers, the first one first."""
        return _layers(self)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the positions are made for; 0 sets no limit.

        max_position_embeddings, or what linear or yarn scaling makes of the context before it, where that is more: published
        models with these state max_position_embeddings before or after the scaling. (With llama3 it is after.) Dynamic
        scaling is made for any length.
        """
        limit, scaling = self.max_position_embeddings, self.position.scaling
        if not limit or scaling is None or scaling.kind == "llama3":
            return limit
        if scaling.kind == "dynamic":
            return 0
        before = limit if scaling.kind == "linear" else scaling.original_max_position_embeddings
        return max(limit, round(before * scaling.factor))

    def padded_vocab_size(self, tp: int = 1) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128 * tp."""
        return _padded(self.vocab_size, tp)

    def parameter_count(self, vocab_size: int | None = None) -> int:
        """Parameters of the whole model, with `vocab_size` rows of embedding (the tokenizer's where it is None)."""
        rows = self.vocab_size if vocab_size is None else vocab_size
        return sum(rows * p.shape[1] if p.role.is_vocabulary else p.numel for p in parameters(self))

    def flops_per_token(self, seq_length: int, *, causal: bool = False, adapters: Sequence[Parameter] = ()) -> float:
        """Model FLOPs of one token's forward and backward: 6 per matrix parameter, and attention's two products.

        Without recompute, the output layer counted, the embedding lookup not: equation 3 of Narayanan et al. 2021 written
        for GQA and a gated MLP. That paper counts attention in full; `causal=True` halves it. A sliding window counts
        the keys inside it alone. Biases, norms and ALiBi's slopes are left out: they are no matrix products.

        Args:
            seq_length: tokens a sequence.
            adapters: LoRA's parameters. With them no gradient of the model's matrices is computed: 4 per parameter of these,
                6 per parameter of the adapters' A and B.
        """
        layers = sum(layer.flops_per_token(seq_length, causal=causal) for layer in self.layers)
        output = self.hidden_size * self.padded_vocab_size()
        total = 3.0 * (layers + 2 * output)
        if adapters:
            matrices = sum(p.numel for p in parameters(self) if p.role.is_layer_matrix)
            total += 6.0 * sum(p.numel for p in adapters if len(p.shape) == 2) - 2.0 * (matrices + output)
        return total


class Role(enum.Enum):
    """What a parameter does in the model."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    ATTENTION_IN = "attention_in"  # makes q, k and v
    ATTENTION_OUT = "attention_out"
    FFN_IN = "ffn_in"
    FFN_OUT = "ffn_out"
    NORM = "norm"
    HEAD_NORM = "head_norm"  # of each head's q or k
    BIAS = "bias"
    # Of a LoRA adapter beside a matrix; see adapter_parameters().
    ADAPTER_A = "adapter_a"
    ADAPTER_B = "adapter_b"
    ADAPTER_MAGNITUDE = "adapter_magnitude"

    @property
    def is_vocabulary(self) -> bool:
        """The rows are the vocabulary's."""
        return self in (Role.EMBEDDING, Role.OUTPUT)

    @property
    def is_layer_matrix(self) -> bool:
        """A weight matrix of a layer."""
        return self in (Role.ATTENTION_IN, Role.FFN_IN) or self.writes_to_residual

    @property
    def writes_to_residual(self) -> bool:
        """The last matrix of a residual branch."""
        return self in (Role.ATTENTION_OUT, Role.FFN_OUT)

    @property
    def is_adapter(self) -> bool:
        """Part of a LoRA adapter."""
        return self in (Role.ADAPTER_A, Role.ADAPTER_B, Role.ADAPTER_MAGNITUDE)

    @property
    def grows_with_width(self) -> bool:
        """A matrix whose inputs grow in number with the hidden size: what muP scales."""
        return self.is_layer_matrix or self is Role.OUTPUT


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model.

    Attributes:
        name: layers counted over the whole model, so that it is the same in every layout.
        shape: whole; the rows of the vocabulary are not padded.
        cut: the dimension that tensor parallelism cuts; None where every rank holds the whole parameter.
        blocks: matrices that are stacked along `cut` and cut one by one: 2 for gate and up.
        layer: counted from 0; None outside the layers.
        expert: counted from 0; None outside experts.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    cut: int | None
    blocks: int = 1
    layer: int | None = None
    expert: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def unit(self) -> str:
        """The layer, or the part outside the layers, that it belongs to: `layers.3`, `embedding`, `final_layernorm`, ..."""
        return (
            f"layers.{self.layer}" if self.layer is not None else self.name.removeprefix("decoder.").partition(".")[0]
        )

    @property
    def place_in_layer(self) -> str:
        """The module that holds it, seen from its layer: `self_attention.linear_qkv`."""
        return self.name.removeprefix(f"decoder.layers.{self.layer}.").rpartition(".")[0]

    @property
    def module(self) -> str:
        """Name of the module that holds it, without the modules around that: `linear_qkv`."""
        return self.name.rsplit(".", 2)[-2]

    def padded_shape(self, tp: int = 1) -> tuple[int, ...]:
        """The shape in the built model, all tensor-parallel ranks together: the rows of the vocabulary are padded."""
        return (_padded(self.shape[0], tp), *self.shape[1:]) if self.role.is_vocabulary else self.shape

    def shard_shape(self, tp: int) -> tuple[int, ...]:
        """The shape on one of `tp` tensor-parallel ranks."""
        return tuple(size // tp if dim == self.cut else size for dim, size in enumerate(self.padded_shape(tp)))


class Block(ABC):
    """One half of a layer: an attention or a feed-forward part. Subclasses are frozen dataclasses.

    What else depends on the kind of a block looks its class up: module specs (model.layer_spec), Hugging Face names
    (families.family), saved activations (planner.saved).
    """

    @abstractmethod
    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        """Those of the block in layer `layer`, in megatron-core's order."""

    @property
    def matrix_parameters(self) -> int:
        """Elements of the weight matrices that a token is multiplied with."""
        return sum(p.numel for p in self.parameters(0) if p.role.is_layer_matrix)

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """FLOPs of the matrix products of one token's forward pass: 2 per matrix parameter.

        Args:
            causal: count the keys that a token sees; otherwise attention is counted in full.
        """
        return 2.0 * self.matrix_parameters


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention(Block):
    """Grouped-query attention (Ainslie et al. 2023). The fields are ModelArch's."""

    hidden_size: int
    heads: int
    groups: int
    head_dim: int
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None
    position: Position

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        at, h, d = f"decoder.layers.{layer}.self_attention.", self.hidden_size, self.head_dim
        rows = (self.heads + 2 * self.groups) * d
        found = [
            Parameter(at + "linear_proj.weight", (h, self.heads * d), Role.ATTENTION_OUT, 1, layer=layer),
            Parameter(at + "linear_qkv.weight", (rows, h), Role.ATTENTION_IN, 0, layer=layer),
        ]
        if self.qkv_bias:
            found.append(Parameter(at + "linear_qkv.bias", (rows,), Role.BIAS, 0, layer=layer))
        if self.qk_norm:
            norms = ("q_layernorm.weight", "k_layernorm.weight")
            found += [Parameter(at + norm, (d,), Role.HEAD_NORM, None, layer=layer) for norm in norms]
        return tuple(found)

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        keys = counted_keys(seq_length, self.sliding_window) * (0.5 if causal else 1.0)
        return super().flops_per_token(seq_length, causal=causal) + 4.0 * self.heads * self.head_dim * keys


@dataclass(frozen=True, kw_only=True)
class GatedFeedForward(Block):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)). Gate and up are one matrix, [gate; up]."""

    hidden_size: int
    ffn_hidden_size: int

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        at, h, f = f"decoder.layers.{layer}.mlp.", self.hidden_size, self.ffn_hidden_size
        return (
            Parameter(at + "linear_fc1.weight", (2 * f, h), Role.FFN_IN, 0, blocks=2, layer=layer),
            Parameter(at + "linear_fc2.weight", (h, f), Role.FFN_OUT, 1, layer=layer),
        )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer: two residual branches, each a norm and a block."""

    hidden_size: int
    attention: Block
    feed_forward: Block

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        """Those of layer `layer`, in megatron-core's order."""
        at = f"decoder.layers.{layer}."
        return (
            Parameter(at + "input_layernorm.weight", (self.hidden_size,), Role.NORM, None, layer=layer),
            *self.attention.parameters(layer),
            Parameter(at + "pre_mlp_layernorm.weight", (self.hidden_size,), Role.NORM, None, layer=layer),
            *self.feed_forward.parameters(layer),
        )

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """See Block.flops_per_token()."""
        blocks = (self.attention, self.feed_forward)
        return sum(block.flops_per_token(seq_length, causal=causal) for block in blocks)


def counted_keys(seq_length: int, window: int | None) -> float:
    """Keys a query is counted with where attention is counted in full: seq_length, or twice the mean that a window leaves.

    With causal attention a query sees half as many on average, and kernels that skip masked tiles compute half as many.
    """
    window = min(window or seq_length, seq_length)
    return window * (2 - window / seq_length)


@functools.lru_cache(maxsize=256)
def _layers(arch: ModelArch) -> tuple[Layer, ...]:
    attention = GroupedQueryAttention(
        hidden_size=arch.hidden_size,
        heads=arch.num_attention_heads,
        groups=arch.num_query_groups,
        head_dim=arch.head_dim,
        qkv_bias=arch.qkv_bias,
        qk_norm=arch.qk_norm,
        sliding_window=arch.sliding_window,
        position=arch.position,
    )
    feed_forward = GatedFeedForward(hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size)
    return (Layer(hidden_size=arch.hidden_size, attention=attention, feed_forward=feed_forward),) * arch.num_layers


@functools.lru_cache(maxsize=256)
def parameters(arch: ModelArch) -> tuple[Parameter, ...]:
    """Every parameter of the model, in the order of megatron-core's names. A tied output layer is the embedding."""
    h, vocab = arch.hidden_size, arch.vocab_size
    found = [Parameter(EMBEDDING_NAME, (vocab, h), Role.EMBEDDING, 0)]
    for i, layer in enumerate(arch.layers):
        found += layer.parameters(i)
    found.append(Parameter("decoder.final_layernorm.weight", (h,), Role.NORM, None))
    if not arch.tie_embeddings:
        found.append(Parameter(OUTPUT_NAME, (vocab, h), Role.OUTPUT, 0))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def parameters_by_name(arch: ModelArch) -> dict[str, Parameter]:
    """The table by the names of a built model (model.build.named_shards).

    The last pipeline stage's copy of a tied embedding has the output layer's name, and the embedding's entry.
    """
    found = {parameter.name: parameter for parameter in parameters(arch)}
    return found if OUTPUT_NAME in found else found | {OUTPUT_NAME: found[EMBEDDING_NAME]}


@functools.lru_cache(maxsize=256)
def adapter_parameters(
    arch: ModelArch, targets: tuple[str, ...], rank: int, *, magnitude: bool
) -> tuple[Parameter, ...]:
    """The LoRA adapters of the layer matrices whose module is in `targets`, in the built model's order.

    A matrix [out, in] has A [rank, in] and B [out, rank]; with `magnitude` (DoRA) also the lengths of its rows [out]. What is
    cut is cut as the matrix is: B's rows where its rows are cut, else A's columns.
    """
    found = []
    for matrix in parameters(arch):
        if not matrix.role.is_layer_matrix or matrix.module not in targets:
            continue
        out, inner = matrix.shape
        by_rows = matrix.cut == 0
        place = functools.partial(Parameter, layer=matrix.layer, expert=matrix.expert)
        rows = functools.partial(place, cut=0 if by_rows else None, blocks=matrix.blocks if by_rows else 1)
        at = matrix.name.removesuffix("weight") + "lora."
        found.append(place(at + "a", (rank, inner), Role.ADAPTER_A, None if by_rows else 1))
        found.append(rows(at + "b", (out, rank), Role.ADAPTER_B))
        if magnitude:
            found.append(rows(at + "magnitude", (out,), Role.ADAPTER_MAGNITUDE))
    return tuple(found)


def is_adapter(name: str) -> bool:
    """Whether the name of a parameter is that of a LoRA adapter's."""
    return ".lora." in name


def _padded(vocab_size: int, tp: int) -> int:
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
