"""Parameter: an entry of the table of a model's parameters, and what it does in the model."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

VOCAB_MULTIPLE = 128
EMBEDDING_NAME = "embedding.word_embeddings.weight"
OUTPUT_NAME = "output_layer.weight"


class Role(enum.Enum):
    """What a parameter does in the model."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    VALUE = "value"  # a value head, in the place of the output layer
    ATTENTION_IN = "attention_in"  # makes q, k and v
    ATTENTION_OUT = "attention_out"
    FFN_IN = "ffn_in"
    FFN_OUT = "ffn_out"
    NORM = "norm"
    HEAD_NORM = "head_norm"  # of q or k, or of the vectors that they are projections of
    BIAS = "bias"
    ROUTER = "router"  # a token's scores of the experts, and the gate of a shared FFN
    ROUTER_BIAS = "router_bias"  # added to the scores; each step counts tokens and sets it, and no gradient does
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
        return self.is_layer_matrix or self.outputs_stay

    @property
    def outputs_stay(self) -> bool:
        """A matrix whose inputs alone grow in number with the hidden size."""
        return self in (Role.OUTPUT, Role.ROUTER)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model.

    Attributes:
        name: layers counted over the whole model, so that it is the same in every layout.
        shape: whole; the rows of the vocabulary are not padded.
        cut: the dimension that tensor parallelism cuts; None where every rank holds the whole parameter.
        blocks: matrices that are stacked along `cut` and cut one by one: 2 for gate and up.
        layer: counted from 0; None outside the layers.
        experts: how many experts' matrices lie along dimension 0, which expert parallelism cuts; 0 outside experts.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    cut: int | None
    blocks: int = 1
    layer: int | None = None
    experts: int = 0

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
        return (padded_rows(self.shape[0], tp), *self.shape[1:]) if self.role.is_vocabulary else self.shape

    def shard_shape(self, tp: int, ep: int = 1) -> tuple[int, ...]:
        """The shape on one of `tp` tensor-parallel and `ep` expert-parallel ranks."""
        shape = tuple(size // tp if dim == self.cut else size for dim, size in enumerate(self.padded_shape(tp)))
        return (shape[0] // ep, *shape[1:]) if self.experts else shape


def is_adapter(name: str) -> bool:
    """Whether the name of a parameter is that of a LoRA adapter's."""
    return ".lora." in name


def padded_rows(vocab_size: int, tp: int) -> int:
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
