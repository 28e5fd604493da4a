"""What a run learns: one class for each kind of objective."""

from __future__ import annotations

from typing import ClassVar, Literal

from flagscale_like.arch import Frozen


class NextTokenLoss(Frozen):
    """Next-token prediction: pretraining, and fine-tuning on conversations.

    Attributes:
        kind: `next_token`, the mean cross-entropy of the tokens that count.
        per: what has the same weight in the mean: each `token` that counts, or each `conversation`, whose loss is the mean of
            its own tokens. In a source of text, each row counts as a conversation.
    """

    head: ClassVar[Literal["language_model", "value", "hidden"]] = "language_model"

    kind: Literal["next_token"] = "next_token"
    per: Literal["token", "conversation"] = "token"
