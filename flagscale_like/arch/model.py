"""ModelArch: the shape of a decoder-only transformer, and what follows from it: layers, parameters and FLOPs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from flagscale_like.arch.base import Frozen, whole_number
from flagscale_like.arch.blocks import AttentionBlock, GatedFeedForward, GroupedQueryAttention, Layer
from flagscale_like.arch.experts import Experts, MixtureOfExperts, active
from flagscale_like.arch.latent_attention import LatentAttention, MultiLatentAttention
from flagscale_like.arch.position import Position
from flagscale_like.arch.table import EMBEDDING_NAME, OUTPUT_NAME, Parameter, Role, padded_rows
from flagscale_like.errors import required


class ModelArch(Frozen):
    """A pre-norm decoder with RMSNorm, SwiGLU and grouped-query or latent attention.

    Attributes:
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads of each layer.
        ffn_hidden_size: width of the SwiGLU FFN, after the gate.
        max_position_embeddings: longest sequence, in tokens, that training accepts; 0 sets no limit. Scaled positions accept
            more: linear its factor times as many, yarn its factor times original_max_position_embeddings, dynamic any
            number.
        position: how attention receives the order of the tokens.
        attention: whether a token attends to the tokens up to its own (`causal`), or to all of its document
            (`bidirectional`), which embedding models may.
        norm_eps: epsilon of the RMSNorms.
        tie_embeddings: the output layer uses the weights of the embedding.
        head_dim: channels of a head; 0 sets hidden_size / num_attention_heads.
        num_query_groups: KV heads (grouped-query attention, Ainslie et al. 2023); 0 sets num_attention_heads.
        vocab_size: the tokenizer's size; weights are padded to a multiple of 128 * tp, and the padding is never predicted.
        qkv_bias: the q, k and v projections have a bias.
        qk_norm: RMSNorm of q and k, before the rotation (Dehghani et al. 2023).
        qk_norm_over: what that norm takes the mean over: each head's channels (`head`), or those of all heads together
            (`projection`, as in OLMoE).
        norm_head: the output matrix is used with its rows scaled to length 1 (Yang et al. 2023, section 2.4).
        sliding_window: number of keys that a query attends to, with its own key (Jiang et al. 2023). Without it, a query
            attends to all keys up to its own.
        init_std: standard deviation of the initial weight matrices.
        output_init_std: standard deviation of the two matrices of a layer that write to the residual stream; without it,
            init.scheme sets it.
        norm_init: initial value of the RMSNorm weights.
        experts: mixture of experts in the place of the FFNs.
        latent_attention: multi-head latent attention in the place of grouped-query attention. head_dim then follows from it:
            qk_nope_head_dim + qk_rope_head_dim.
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
    attention: Literal["causal", "bidirectional"] = "causal"
    norm_eps: float = Field(default=1e-5, gt=0)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: Literal["head", "projection"] = "head"
    norm_head: bool = False
    sliding_window: int | None = Field(default=None, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    output_init_std: float | None = Field(default=None, gt=0)
    norm_init: float = 1.0
    experts: Experts | None = None
    latent_attention: LatentAttention | None = None
    family: str = "llama"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        heads, hidden = whole_number(values.get("num_attention_heads")), whole_number(values.get("hidden_size"))
        latent = values.get("latent_attention")
        if latent and not values.get("head_dim"):
            parts = latent if isinstance(latent, dict) else latent.model_dump()
            sizes = [whole_number(parts.get(name)) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
            known = [size for size in sizes if size is not None]
            if len(known) == len(sizes):
                values = {**values, "head_dim": sum(known)}
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
        if self.attention == "bidirectional" and (self.sliding_window or self.position.kind == "nlpe"):
            given = f"sliding_window ({self.sliding_window})" if self.sliding_window else "position.kind nlpe"
            raise ValueError(f"{given} is defined for attention causal (it is bidirectional): leave it out")
        if self.experts and max(self.experts.dense_layers, default=0) >= self.num_layers:
            raise ValueError(
                f"experts.dense_layers names layer {max(self.experts.dense_layers)}, and the last of num_layers "
                f"({self.num_layers}) is {self.num_layers - 1}"
            )
        if self.norm_head and self.tie_embeddings:
            raise ValueError("norm_head needs tie_embeddings false: the embedding of the input is not normalised")
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise ValueError(f"qk_norm_over {self.qk_norm_over} needs qk_norm true")
        if self.latent_attention:
            self._check_latent_attention(self.latent_attention)
        return self

    def _check_latent_attention(self, latent: LatentAttention) -> None:
        on = [name for name in ("qkv_bias", "qk_norm", "sliding_window") if getattr(self, name)]
        if self.num_query_groups != self.num_attention_heads:
            on.append(f"num_query_groups ({self.num_query_groups}) below num_attention_heads")
        if self.position.kind != "rope":
            on.append(f"position.kind {self.position.kind}")
        if on:
            raise ValueError(f"latent_attention has no {', '.join(on)}: leave it out")
        if self.head_dim != latent.head_dim:
            raise ValueError(
                f"head_dim ({self.head_dim}) follows from latent_attention: qk_nope_head_dim + qk_rope_head_dim is "
                f"{latent.head_dim}; leave head_dim out"
            )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The decoder's layers, the first one first."""
        return _layers(self)

    @property
    def required_experts(self) -> Experts:
        """The group experts, of an architecture that has it."""
        return required(self.experts, "model.experts")

    @property
    def required_latent_attention(self) -> LatentAttention:
        """The group latent_attention, of an architecture that has it."""
        return required(self.latent_attention, "model.latent_attention")

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
        return padded_rows(self.vocab_size, tp)

    def parameter_count(self, vocab_size: int | None = None) -> int:
        """Parameters of the whole model, with `vocab_size` rows of embedding (the tokenizer's where it is None)."""
        rows = self.vocab_size if vocab_size is None else vocab_size
        return sum(rows * p.shape[1] if p.role.is_vocabulary else p.numel for p in parameters(self))

    def active_parameter_count(self) -> int:
        """Parameters that one token meets: of a layer's experts, its top_k."""
        top_k = self.experts.top_k if self.experts else 1
        return active(parameters(self), top_k)

    def flops_per_token(
        self, seq_length: int, *, causal: bool = False, adapters: Sequence[Parameter] = (), output_layer: bool = True
    ) -> float:
        """Model FLOPs of one token's forward and backward: 6 per matrix parameter, and attention's two products.

        Without recompute, the output layer counted, the embedding lookup not: equation 3 of Narayanan et al. 2021 written
        for GQA and a gated MLP. That paper counts attention in full; `causal=True` halves it where it is causal. A sliding
        window counts the keys inside it alone. Biases, norms and ALiBi's slopes are left out: they are no matrix products.

        Args:
            seq_length: tokens a sequence.
            adapters: LoRA's parameters. With them no gradient of the model's matrices is computed: 4 per parameter of these,
                6 per parameter of the adapters' A and B.
            output_layer: whether the model has one, as a language model does.
        """
        layers = sum(layer.flops_per_token(seq_length, causal=causal) for layer in self.layers)
        output = self.hidden_size * self.padded_vocab_size() if output_layer else 0
        total = 3.0 * (layers + 2 * output)
        if adapters:
            top_k = self.experts.top_k if self.experts else 1
            own = active([p for p in adapters if p.role is not Role.ADAPTER_MAGNITUDE], top_k)
            matrices = active([p for p in parameters(self) if p.role.is_layer_matrix], top_k)
            total += 6.0 * own - 2.0 * (matrices + output)
        return total


def _attention(arch: ModelArch) -> AttentionBlock:
    if arch.latent_attention is not None:
        return MultiLatentAttention(
            hidden_size=arch.hidden_size,
            heads=arch.num_attention_heads,
            latent=arch.latent_attention,
            position=arch.position,
        )
    return GroupedQueryAttention(
        hidden_size=arch.hidden_size,
        heads=arch.num_attention_heads,
        groups=arch.num_query_groups,
        head_dim=arch.head_dim,
        qkv_bias=arch.qkv_bias,
        qk_norm=arch.qk_norm,
        qk_norm_over=arch.qk_norm_over,
        sliding_window=arch.sliding_window,
        position=arch.position,
        causal=arch.attention == "causal",
    )


@functools.lru_cache(maxsize=256)
def _layers(arch: ModelArch) -> tuple[Layer, ...]:
    attention = _attention(arch)
    layer = functools.partial(Layer, hidden_size=arch.hidden_size, attention=attention)
    dense = layer(feed_forward=GatedFeedForward(hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size))
    if arch.experts is None:
        return (dense,) * arch.num_layers
    sparse = layer(feed_forward=MixtureOfExperts(hidden_size=arch.hidden_size, experts=arch.experts))
    return tuple(dense if i in arch.experts.dense_layers else sparse for i in range(arch.num_layers))


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
    cut is cut as the matrix is: B's rows where its rows are cut, else A's columns. Of matrices that are stacked over experts,
    each expert's has its own.
    """
    found = []
    for matrix in parameters(arch):
        if not matrix.role.is_layer_matrix or matrix.module not in targets:
            continue
        *stacked, out, inner = matrix.shape
        by_rows, by_columns = matrix.cut == 0, matrix.cut == 1
        place = functools.partial(Parameter, layer=matrix.layer, experts=matrix.experts)
        rows = functools.partial(place, cut=0 if by_rows else None, blocks=matrix.blocks if by_rows else 1)
        at = matrix.name.removesuffix("weight") + "lora."
        found.append(place(at + "a", (*stacked, rank, inner), Role.ADAPTER_A, 1 if by_columns else None))
        found.append(rows(at + "b", (*stacked, out, rank), Role.ADAPTER_B))
        if magnitude:
            found.append(rows(at + "magnitude", (*stacked, out), Role.ADAPTER_MAGNITUDE))
    return tuple(found)
