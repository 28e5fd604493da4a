"""ModelArch: the shape of a decoder-only transformer, and what follows from it: parameters and FLOPs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

VOCAB_MULTIPLE = 128


class Frozen(BaseModel):
    """A keyword-only, immutable config object; an unknown key, infinity or NaN is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RopeScaling(Frozen):
    """How RoPE's frequencies are scaled for contexts longer than those trained on.

    `linear` divides positions by `factor` (Chen et al. 2023); `llama3` divides only the low frequencies and blends
    between (Llama 3.1).
    """

    kind: Literal["linear", "llama3"]
    factor: float = Field(gt=1.0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class Position(Frozen):
    """How the decoder knows token order.

    Attributes:
        kind: `rope` rotates q and k (Su et al. 2021); `alibi` adds to a score the head's slope times the distance (Press et
            al. 2022); `nlpe` is RoPE up to a distance and constrained beyond it, so that a model reads longer texts than it
            was trained on without meeting a distance that it does not know (Aquila2).
        base, scaling: RoPE's theta, and its scaling for long contexts.
        threshold: of nlpe: the first distance, in tokens, that is constrained.
        far: of nlpe: how. What Aquila2 does is not published; these are the two schemes that fit its operator (Su 2023).
            `clipped` (ReRoPE): every such distance counts as `threshold`. `compressed` (Leaky ReRoPE): beyond it,
            positions advance by 1 / far_factor.
    """

    kind: Literal["rope", "alibi", "nlpe"] = "rope"
    base: float = Field(default=10000.0, gt=0)
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
        head_dim: channels a head; hidden_size / num_attention_heads where it is left out.
        num_query_groups: KV heads (Ainslie et al. 2023); equal to num_attention_heads where it is left out.
        vocab_size: the tokenizer's size; weights are padded to a multiple of 128 * tp, and the padding is never predicted.
        qkv_bias: the q, k and v projections have a bias.
        qk_norm: RMSNorm over each head's channels of q and k, before the rotation (Dehghani et al. 2023).
        norm_head: the output matrix is used with its rows scaled to length 1 (Yang et al. 2023, section 2.4).
        sliding_window: keys that a query sees, itself counted; all before it where left out (Jiang et al. 2023).
        init_std: standard deviation of every weight matrix at step 0.
        output_init_std: the same for the two matrices that write to the residual stream; init_std / sqrt(2 * num_layers)
            where it is left out (Radford et al. 2019).
        norm_init: initial value of the RMSNorm weights.
        family: the Hugging Face family that an export is written as.
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
        heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
        if isinstance(heads, int) and heads > 0:
            values = dict(values)
            if not values.get("num_query_groups"):
                values["num_query_groups"] = heads
            if not values.get("head_dim") and isinstance(hidden, int):
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
        if self.sliding_window and self.position.kind == "nlpe":
            raise ValueError(f"sliding_window ({self.sliding_window}) needs position.kind rope or alibi (it is nlpe)")
        if self.norm_head and self.tie_embeddings:
            raise ValueError("norm_head needs tie_embeddings false: the embedding of the input is not normalised")
        return self

    def padded_vocab_size(self, tp: int = 1) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128 * tp."""
        multiple = VOCAB_MULTIPLE * tp
        return -(-self.vocab_size // multiple) * multiple

    def layer_parameters(self) -> int:
        """Parameters of one layer: QKV, output projection, gate, up and down matrices, the norms, the QKV bias."""
        h, d = self.hidden_size, self.head_dim
        n, g, f = self.num_attention_heads, self.num_query_groups, self.ffn_hidden_size
        bias, qk_norm = (n + 2 * g) * d if self.qkv_bias else 0, 2 * d if self.qk_norm else 0
        return h * (n + 2 * g) * d + n * d * h + 3 * h * f + 2 * h + bias + qk_norm

    def parameter_count(self, vocab_size: int | None = None) -> int:
        """Parameters of the whole model, with `vocab_size` rows of embedding (the tokenizer's where it is None)."""
        vocab = self.vocab_size if vocab_size is None else vocab_size
        embeddings = vocab * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * self.layer_parameters() + self.hidden_size

    def flops_per_token(self, seq_length: int, *, causal: bool = False) -> float:
        """Model FLOPs of one token's forward and backward: 6 per matrix parameter, and attention's two products.

        Without recompute, the output layer counted, the embedding lookup not: equation 3 of Narayanan et al. 2021 written
        for GQA and a gated MLP. That paper counts attention in full; `causal=True` halves it. A sliding window counts
        the keys inside it alone. Biases, norms and ALiBi's slopes are left out: they are no matrix products.

        Args:
            seq_length: tokens a sequence.
        """
        h, d = self.hidden_size, self.head_dim
        n, g, f = self.num_attention_heads, self.num_query_groups, self.ffn_hidden_size
        matrices = h * (n + 2 * g) * d + n * d * h + 3 * h * f
        window = min(self.sliding_window or seq_length, seq_length)
        keys = window * (2 - window / seq_length)  # seq_length without a window
        attention = 2 * n * d * keys * (0.5 if causal else 1.0)
        return 6.0 * (self.num_layers * (matrices + attention) + h * self.padded_vocab_size())
