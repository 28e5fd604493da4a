"""Objective: what a step learns. It says what the model is given of a batch, and what the loss is; it holds no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from flagscale_like.data.batch import Batch

Cut = Literal["tokens", "rows"] | None  # see Objective.cut


@dataclass
class Loss:
    """The loss of one micro-batch, on the rank that computes it.

    Attributes:
        total: differentiable sum over the micro-batch.
        count: what the gradients of the global batch are divided by, a whole number: tokens, pairs, responses.
        sums: further numbers by name; they add up over micro-batches and ranks. The names are the objective's `sums`.
        samples: by name, [b]: a number for each row. Integers are a property of the row. Others are sums over the row's
            tokens, or whole where the objective's `cut` is `rows`.
    """

    total: Tensor
    count: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What an engine is trained on.

    Attributes:
        metric: what reports call the mean loss, total over count.
        sums: names of Loss.sums, the same on every rank.
        cut: what `loss` gets where each context-parallel rank has a part of every row (Batch.part_of). `tokens`: this rank's
            tokens. Total, count, sums and samples are sums over tokens, and the engine adds them up. `rows`: whole rows, as
            without context parallelism. All these ranks compute the same, and one of them counts. None: context parallelism
            is refused.
        packed: whether the batches are packs of documents. The model then gets them as one row, [1, b * s], and the middle
            pipeline stages read the documents' bounds as well.
    """

    metric: str
    sums: tuple[str, ...]
    cut: Cut
    packed: bool

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the model."""
        ...

    def row_counts(self, batch: Batch) -> Tensor:
        """fp32 [b]: what each of these whole rows adds to Loss.count, known before the model runs."""
        ...

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """The loss of what the model returned; called on the last pipeline stage."""
        ...


class VectorObjective(Protocol):
    """What an engine is asked for vectors by. The attributes are those of Objective; `packed` and `cut` are as there."""

    cut: Cut
    packed: bool

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the model."""
        ...

    def row_counts(self, batch: Batch) -> Tensor:
        """As Objective's."""
        ...

    def vectors(self, output: Tensor, batch: Batch) -> Tensor:
        """Vectors of a micro-batch, fp32 [d, h], differentiable, of what the model returned."""
        ...


@runtime_checkable
class BatchObjective(VectorObjective, Protocol):
    """What an engine is trained on where the loss is of the vectors of the whole global batch; see engine.gradient_cache.

    Attributes:
        metric, sums: as Objective's.
        shared: names of extras, [d, ...], that the loss reads of the documents of all data-parallel ranks, as it reads their
            vectors. None: it reads those of its own rank alone.
    """

    metric: str
    sums: tuple[str, ...]
    shared: tuple[str, ...] | None

    def check(self, documents: Sequence[int]) -> None:
        """Refuse a batch from which nothing would be learned.

        Args:
            documents: of each data-parallel rank.

        Raises:
            ConfigError: the same on every rank.
        """
        ...

    def batch_loss(
        self, batches: Sequence[Batch], vectors: Tensor, extras: Mapping[str, Tensor], first: int, *, gradient: bool
    ) -> tuple[Loss, Tensor | None]:
        """The loss of this rank's part of the global batch, and its gradient by all vectors, [D, h], if it is asked for.

        Args:
            batches: this rank's micro-batches. The samples of the loss are of their rows.
            vectors: fp32 [D, h], of the documents of all data-parallel ranks, or of this rank where `shared` is None.
            extras: those of `shared`, of the same documents.
            first: where this rank's documents begin.
        """
        ...
