"""ModelSpec: everything that building a model and running it forward needs, and nothing of a training run."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Literal

from flagscale_like.arch import OUTPUT_NAME, ModelArch, Parameter, is_adapter, parameters_by_name
from flagscale_like.config import Init, Kernels, Lora, Parallel, RunConfig, check_layout
from flagscale_like.errors import ConfigError

DEFAULT_SEQ_LENGTH = 2048

Head = Literal["language_model", "value", "hidden"]
Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model, how it is cut over ranks, and how its operators are computed.

    Attributes:
        arch: the decoder.
        head: what the last stage computes from the hidden states; see model.heads.
        value_heads: numbers that the head `value` computes for each token.
        temperature: divides the logits in the cross-entropy, so that it is of texts that were drawn at this temperature. The
            logits themselves, without labels, are not divided.
        parallel: the layout; data parallelism is what is left of the world size.
        kernels: which implementation computes each operator.
        precision: of the weights and activations.
        recompute: activations that the backward pass computes again; see config.Train.
        seq_length: tokens of a micro-batch's rows; the model's max_position_embeddings, or 2048, where it is 0.
        micro_batch_size: rows of a micro-batch. Pipeline stages exchange [seq_length, micro_batch_size, hidden].
        init, seed: how weights are drawn that no checkpoint gives.
        frozen: shell patterns of parameter names that training leaves as they are.
        lora: adapters beside the model's matrices. They alone are trained, and a head that the model did not come with.

    Raises:
        ConfigError: the layout does not divide the model, the sequence is longer than the model's positions, the adapters do
            not fit the model, or the head does not fit its attention.
    """

    arch: ModelArch
    head: Head = "language_model"
    value_heads: int = 1
    temperature: float = 1.0
    parallel: Parallel = field(default_factory=Parallel)
    kernels: Kernels = field(default_factory=Kernels)
    precision: Precision = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    seq_length: int = 0
    micro_batch_size: int = 1
    init: Init = field(default_factory=Init)
    seed: int = 1234
    frozen: tuple[str, ...] = ()
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if not self.seq_length:
            object.__setattr__(self, "seq_length", self.arch.max_position_embeddings or DEFAULT_SEQ_LENGTH)
        try:
            check_layout(self.arch, self.parallel, self.seq_length)
            if self.lora is not None:
                self.lora.check(self.arch)
            if self.arch.attention == "bidirectional" and self.head != "hidden":
                raise ValueError(
                    "model.attention is bidirectional: the model makes vectors of texts, and predicts no token and no reward"
                )
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def of(cls, config: RunConfig) -> ModelSpec:
        """The model that a run trains."""
        train = config.train
        return cls(
            arch=config.model,
            head=config.objective.head,
            value_heads=getattr(config.objective, "heads", 1),
            temperature=config.rl.rollout.temperature if config.rl is not None else 1.0,
            parallel=config.parallel,
            kernels=config.kernels,
            precision=train.precision,
            recompute=train.recompute,
            seq_length=train.seq_length,
            micro_batch_size=train.micro_batch_size,
            init=config.init,
            seed=train.seed,
            frozen=tuple(train.frozen),
            lora=config.lora,
        )

    def is_frozen(self, name: str) -> bool:
        """Whether training leaves the parameter of this name as it is."""
        if self.lora is not None:
            own_head = name == OUTPUT_NAME and self.head != "language_model"
            return not (is_adapter(name) or own_head)
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.frozen)

    @property
    def table(self) -> dict[str, Parameter]:
        """Every parameter by the names of a built model (model.build.named_shards), the adapters among them."""
        adapters = self.lora.parameters(self.arch) if self.lora is not None else ()
        return parameters_by_name(self.arch) | {parameter.name: parameter for parameter in adapters}

    @property
    def tied(self) -> bool:
        """Whether the output layer's weight is the embedding's. A head without a vocabulary has a weight of its own."""
        return self.arch.tie_embeddings and self.head == "language_model"


def layout_beside(arch: ModelArch, layout: Parallel) -> Parallel:
    """The layout of a model on the ranks of another one: as the other's, but a dense model has no experts to spread."""
    return layout if arch.experts is not None else layout.model_copy(update={"ep": 1})
