"""What a run learns: one class for each kind of objective."""

from __future__ import annotations

from typing import ClassVar, Literal

from flagscale_like.arch import Frozen


class NextTokenLoss(Frozen):
    """Next-token prediction: pretraining, and fine-tuning on conversations.

    Attributes:
        kind: `next_token`, the mean cross-entropy of the tokens that the loss mask counts.
    """

    head: ClassVar[Literal["language_model", "value", "hidden"]] = "language_model"

    kind: Literal["next_token"] = "next_token"
