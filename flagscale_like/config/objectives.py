"""What a run learns: one class for each kind of objective, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flagscale_like.arch import Frozen


class NextTokenLoss(Frozen):
    """Next-token prediction: pretraining, and fine-tuning on conversations.

    Attributes:
        kind: `next_token`, the mean cross-entropy of the tokens that count.
        per: what has the same weight in the mean: each `token` that counts, or each `conversation`, whose loss is the mean of
            its own tokens. In a source of text, each row counts as a conversation.
    """

    head: ClassVar[Literal["language_model", "value", "hidden"]] = "language_model"
    metric: ClassVar[str] = "lm loss"
    reads_pairs: ClassVar[bool] = False

    kind: Literal["next_token"] = "next_token"
    per: Literal["token", "conversation"] = "token"


class DirectPreference(Frozen):
    """Direct preference optimisation on pairs of answers (DPO, Rafailov et al. 2023), and its relatives.

    Attributes:
        kind: `dpo`.
        loss: what a pair's loss is, of h = beta * (log-ratio of the chosen answer - log-ratio of the rejected one):
            `sigmoid` is -log sigmoid(h), DPO's; `hinge` is max(0, 1 - h) (SLiC, Zhao et al. 2023); `ipo` is
            (h / beta - 1 / (2 beta))^2 (Azar et al. 2023).
        beta: factor on the log-ratios; a larger one keeps the model closer to the reference.
        reference: where the log-probabilities of the reference come from, which are subtracted to make a log-ratio. `stored`:
            the starting weights compute them once, before the first step, and RUN_DIR/reference.safetensors keeps them.
            `none`: a log-ratio is the model's own log-probability.
        by_length: divide each answer's log-probability by its number of counted tokens. With reference none and a margin,
            this is SimPO (Meng et al. 2024); with loss ipo, it is what trl computes.
        margin: a number that is subtracted from h, with losses sigmoid and hinge: SimPO's gamma.
        pair_margin: factor on each pair's own margin, which is subtracted from h, too (ODPO, Amini et al. 2024).
        label_smoothing: share of the pairs whose answers are assumed to be swapped (cDPO, Mitchell 2023), with loss sigmoid.
        sft: factor on the chosen answer's mean cross-entropy, which is added to the loss (Pang et al. 2024, RPO's alpha).
    """

    head: ClassVar[Literal["language_model", "value", "hidden"]] = "language_model"
    metric: ClassVar[str] = "dpo loss"
    reads_pairs: ClassVar[bool] = True

    kind: Literal["dpo"]
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    reference: Literal["stored", "none"] = "stored"
    by_length: bool = False
    margin: float = 0.0
    pair_margin: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    sft: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> DirectPreference:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing ({self.label_smoothing}) needs loss sigmoid (it is {self.loss})")
        if (self.margin or self.pair_margin) and self.loss == "ipo":
            raise ValueError("margin and pair_margin need loss sigmoid or hinge: the target of ipo is 1 / (2 beta)")
        return self


class RewardModel(Frozen):
    """A reward model on pairs of answers (Bradley and Terry 1952; Ouyang et al. 2022).

    The model has a value head instead of the output layer. An answer's reward is the head's output at the answer's last
    counted token. The loss of a pair is -log sigmoid(reward of the chosen answer - reward of the rejected one - margin).

    Attributes:
        kind: `reward`.
        heads: rewards that the head computes. Each has a loss of its own; the reported reward is their mean, and
            `rewards/disagreement` their standard deviation.
        margin: factor on each pair's own margin (Llama 2, Touvron et al. 2023); 0 ignores the margins.
        center: factor on the squared sum of a pair's two rewards, which is added to the loss and keeps the rewards around 0
            (Eisenstein et al. 2023).
    """

    head: ClassVar[Literal["language_model", "value", "hidden"]] = "value"
    metric: ClassVar[str] = "reward loss"
    reads_pairs: ClassVar[bool] = True

    kind: Literal["reward"]
    heads: int = Field(default=1, gt=0)
    margin: float = Field(default=1.0, ge=0)
    center: float = Field(default=0.0, ge=0)


AnyObjective = Annotated[NextTokenLoss | DirectPreference | RewardModel, Field(discriminator="kind")]
