"""What a run learns: one class for each kind of objective, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flagscale_like.arch import Frozen

Head = Literal["language_model", "value", "hidden"]
"""What the last pipeline stage computes; see model.heads."""

Reads = Literal["text", "pairs", "groups"]
"""What the data holds: text or conversations; pairs of answers; or groups of a query and its passages."""


class NextTokenLoss(Frozen):
    """Next-token prediction: pretraining, and fine-tuning on conversations.

    Attributes:
        kind: `next_token`, the mean cross-entropy of the tokens that count.
        per: what has the same weight in the mean: each `token` that counts, or each `conversation`, whose loss is the mean of
            its own tokens. In a source of text, each row counts as a conversation.
    """

    head: ClassVar[Head] = "language_model"
    metric: ClassVar[str] = "lm loss"
    reads: ClassVar[Reads] = "text"

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

    head: ClassVar[Head] = "language_model"
    metric: ClassVar[str] = "dpo loss"
    reads: ClassVar[Reads] = "pairs"

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

    head: ClassVar[Head] = "value"
    metric: ClassVar[str] = "reward loss"
    reads: ClassVar[Reads] = "pairs"

    kind: Literal["reward"]
    heads: int = Field(default=1, gt=0)
    margin: float = Field(default=1.0, ge=0)
    center: float = Field(default=0.0, ge=0)


class Contrastive(Frozen):
    """An embedding model, by contrastive learning on groups of a query and its passages (InfoNCE, van den Oord et al. 2018).

    A text's vector is its pooled hidden states, scaled to length 1; the score of a query and a passage is the cosine of their
    vectors. The first passage of a group is the positive, the others are its hard negatives. The loss of a query is
    -log softmax(scores / temperature) of its positive, over its positive and its negatives.

    Attributes:
        kind: `contrastive`.
        pooling: which hidden states make a text's vector: those of its `last` token, of its `first`, or the `mean` of all.
        temperature: divides the scores.
        passages: passages of a group, the positive among them.
        negatives: which passages are a query's negatives: those of its group alone (`given`), those of all groups of its
            data-parallel rank (`batch`), or of all ranks (`cross`).
        false_negative_margin: a negative whose score is above the positive's plus this number is left out: 0.1 as in Qwen3
            Embedding (Zhang et al. 2025), or below 0 as in NV-Retriever (Moreira et al. 2024). Without it, only passages that
            are texts of the query's own, or a positive of an equal query, are left out.
        symmetric: add the loss of each positive, whose negatives are the other queries, and take half of both.
        contrast: factor on the contrastive loss.
        distill: factor on the distance to a teacher's scores of the group's passages, which is added to the loss; groups
            without scores have none.
        distill_kind: `kl` is the divergence of the group's softmax from the teacher's. `stable` contrasts each passage with
            the worse ones and the batch's negatives, weighted with the teacher's softmax (LLM-Embedder, Zhang et al. 2023).
        teacher_temperature: divides the teacher's scores.
        dimensions: sizes of the first parts of a vector that are trained as vectors of their own (Matryoshka representation
            learning, Kusupati et al. 2022); the loss is the mean over them and the whole vector.
        same_source: each global batch is of one source, so that a query's negatives are of its own kind; the sources take
            turns by their weights.
    """

    head: ClassVar[Head] = "hidden"
    metric: ClassVar[str] = "contrastive loss"
    reads: ClassVar[Reads] = "groups"

    kind: Literal["contrastive"]
    pooling: Literal["last", "mean", "first"] = "last"
    temperature: float = Field(default=0.02, gt=0)
    passages: int = Field(default=8, gt=0)
    negatives: Literal["batch", "cross", "given"] = "cross"
    false_negative_margin: float | None = Field(default=None, ge=-2, le=2)
    symmetric: bool = False
    contrast: float = Field(default=1.0, ge=0)
    distill: float = Field(default=0.0, ge=0)
    distill_kind: Literal["kl", "stable"] = "kl"
    teacher_temperature: float = Field(default=1.0, gt=0)
    dimensions: tuple[int, ...] = ()
    same_source: bool = True

    @model_validator(mode="after")
    def _check(self) -> Contrastive:
        if self.passages == 1 and self.negatives == "given":
            raise ValueError(
                "passages (1) are the positive alone: with negatives given no query has a negative, and the loss is 0: "
                "give passages 2 or more, or negatives batch or cross"
            )
        if self.symmetric and self.negatives == "given":
            raise ValueError("symmetric compares a positive with the other queries: it needs negatives batch or cross")
        if not (self.contrast or self.distill):
            raise ValueError("contrast and distill are both 0: nothing would be learned")
        if self.passages == 1 and self.distill:
            raise ValueError(f"distill ({self.distill}) compares the passages of a group: it needs passages 2 or more")
        if list(self.dimensions) != sorted({size for size in self.dimensions if size > 0}):
            raise ValueError(f"dimensions ({list(self.dimensions)}) must be above 0 and rise, none twice")
        return self


AnyObjective = Annotated[NextTokenLoss | DirectPreference | RewardModel | Contrastive, Field(discriminator="kind")]
