"""Contrastive learning on groups of a query and its passages; config.Contrastive has the options and the papers.

A micro-batch is packs of whole groups. Of the 1 + P documents of a group, the first is the query, the second its positive
passage, the others its hard negatives. `Batch.extras` has

    texts    int64 [d], a number for each document that is equal where the texts are
    teacher  float [g * P], the teacher's scores of the passages, nan where it has none; only where the objective distills

A score is the cosine of a query's and a passage's vector. Of a query, the candidates are the passages that it is compared
with: its positive, and what may be its negatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like.config import Contrastive
from flagscale_like.data.batch import Batch
from flagscale_like.engine.objective import Loss
from flagscale_like.errors import ConfigError
from flagscale_like.objectives.embedding import TextVectors

SCORES_AT_ONCE = 1 << 24  # of a block of queries: the memory of a step does not grow with the square of the batch
REPORTED = ("retrieval/accuracy", "retrieval/positive", "retrieval/negatives", "retrieval/filtered")
DISTILLED = "retrieval/distilled"


class ContrastiveLoss(TextVectors):
    """The loss of a batch of groups; its count is the number of queries.

    With q a query, p its positive, n its negatives, cos the score, and t the temperature,

        InfoNCE = -log( exp(cos(q, p) / t) / (exp(cos(q, p) / t) + sum_n exp(cos(q, n) / t)) )
        loss    = mean over the sizes of a vector of  contrast * InfoNCE + distill * distance(cos(q, .) / t, teacher)

    Reported are the share of the queries whose positive has the highest score, the mean score of the positives, the
    negatives that a query is compared with, the share of the candidates that are left out as false negatives, and the share
    of the queries that have a teacher's scores.
    """

    metric = Contrastive.metric

    def __init__(self, options: Contrastive) -> None:
        super().__init__(options.pooling)
        self.options, self.documents_in_one = options, 1 + options.passages
        self.shared: tuple[str, ...] | None = ("texts",) if options.negatives == "cross" else None
        self.sums: tuple[str, ...] = REPORTED + ((DISTILLED,) if options.distill else ())

    def check(self, documents: Sequence[int]) -> None:
        """Refuse a batch whose queries have no negative: its loss is 0, and so is its gradient."""
        options, size = self.options, self.documents_in_one
        assert not any(count % size for count in documents), f"{documents} documents are no groups of {size}"
        compared = sum(documents) if options.negatives == "cross" else min(documents)  # with each other
        if compared == size and options.passages == 1:
            raise ConfigError(
                "a batch of one query without hard negatives has the loss 0, and nothing is learned: raise "
                "train.global_batch_size, or give objective.passages 2 or more"
                + (", or objective.negatives cross" if options.negatives == "batch" and len(documents) > 1 else "")
            )

    def batch_loss(
        self, batches: Sequence[Batch], vectors: Tensor, extras: Mapping[str, Tensor], first: int, *, gradient: bool
    ) -> tuple[Loss, Tensor | None]:
        """See BatchObjective. Scores of a block of queries exist at a time."""
        options, size = self.options, self.documents_in_one
        own = sum(len(batch.bounds()) - 1 for batch in batches) // size
        texts = extras["texts"] if "texts" in extras else torch.cat([batch.extras["texts"] for batch in batches])
        teacher = None
        if options.distill:
            teacher = torch.cat([batch.extras["teacher"] for batch in batches]).float().view(own, options.passages)

        def of_block(part: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
            scored = Scored.of(part, texts, block + first // size, options)
            return scored.losses(options, None if teacher is None else teacher[block]), scored.reported()

        candidates = options.passages if options.negatives == "given" else len(vectors) // size * options.passages
        blocks = torch.arange(own, device=vectors.device).split(max(1, SCORES_AT_ONCE // candidates))
        widths = sorted({*options.dimensions, vectors.shape[1]})
        found = [learn_width(vectors, width, blocks, of_block, gradient=gradient) for width in widths]
        losses = functools.reduce(torch.add, [each for each, _, _ in found]) / len(widths)
        sums = dict(zip(REPORTED, found[-1][2], strict=True))
        if teacher is not None:
            sums[DISTILLED] = teacher.isfinite().all(1).float().sum()
        loss = Loss(losses.sum(), losses.new_tensor(own), sums=sums, samples=self._samples(losses, batches))
        grads = [grad for _, grad, _ in found if grad is not None]
        return loss, functools.reduce(torch.add, grads) / len(widths) if gradient else None

    def _samples(self, losses: Tensor, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Loss and queries of each row, [micro-batches * b], and the row's source."""
        rows, begun = [], 0
        for batch in batches:  # the row of each query
            rows.append(batch.bounds()[: -1 : self.documents_in_one].long() // batch.tokens.shape[1] + begun)
            begun += len(batch.tokens)
        places = torch.cat(rows).to(losses.device, non_blocking=True)
        samples = {
            "loss": losses.new_zeros(begun).index_add_(0, places, losses),
            "tokens": torch.cat([self.row_counts(batch) for batch in batches]),
        }
        sources = [batch.source for batch in batches if batch.source is not None]
        if len(sources) == len(batches):
            samples["source"] = torch.cat(sources)
        return samples


def learn_width(
    vectors: Tensor,
    width: int,
    blocks: Sequence[Tensor],
    of_block: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The losses of vectors that are cut to their first `width` numbers and scaled to length 1 again.

    Args:
        vectors: [D, h].
        blocks: numbers of this rank's queries.
        of_block: (the cut vectors, a block) -> the losses of its queries, and REPORTED.

    Returns:
        The losses [n], the gradient of their sum by `vectors` if it is asked for, and REPORTED.
    """
    with torch.set_grad_enabled(gradient):
        leaf = vectors.detach().requires_grad_(gradient)
        cut = leaf if width == vectors.shape[1] else F.normalize(leaf[:, :width], dim=-1)
        part = cut.detach().requires_grad_(gradient)  # here the blocks' gradients add up
        losses, reported = [], []
        for block in blocks:
            each, numbers = of_block(part, block)
            if gradient:
                each.sum().backward()
            losses.append(each.detach())
            reported.append(numbers)
    if gradient:
        cut.backward(part.grad)
    return torch.cat(losses), leaf.grad, torch.stack(reported).sum(0)


@dataclass(frozen=True)
class Scored:
    """The scores of n queries.

    Attributes:
        scores: [n, c], of each query and its candidates.
        positive: int64 [n], the column of each query's positive.
        excluded: bool [n, c], the candidates that are left out as false negatives.
        own: [n, P], the scores of the passages of the query's group.
        back: of `symmetric`: scores [n, Q] of each positive and all queries, the column of its own query, and what is left
            out.
    """

    scores: Tensor
    positive: Tensor
    excluded: Tensor
    own: Tensor
    back: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(cls, vectors: Tensor, texts: Tensor, groups: Tensor, options: Contrastive) -> Scored:
        """The scores of the queries of some groups.

        Args:
            vectors: fp32 [D, h], of length 1, of the documents of all groups.
            texts: int64 [D].
            groups: int64 [n], numbers of the groups.
        """
        size = 1 + options.passages
        vectors, texts = vectors.unflatten(0, (-1, size)), texts.unflatten(0, (-1, size))  # [g, 1 + P, ...]
        queries, passages = vectors[groups, 0], vectors[:, 1:]  # [n, h], [g, P, h]
        own = torch.einsum("nh,nph->np", queries, passages[groups])
        wanted, answers = texts[groups, 0, None], texts[groups, 1, None]  # of the query and its positive, [n, 1]
        if options.negatives == "given":
            scores, positive, candidates = own, torch.zeros_like(groups), texts[groups, 1:]
        else:
            scores, positive = queries @ passages.flatten(0, 1).t(), groups * options.passages
            candidates = texts[:, 1:].flatten()[None]
        excluded = (candidates == wanted) | (candidates == answers)
        if options.negatives != "given":  # the positive of an equal query
            excluded[:, :: options.passages] |= texts[None, :, 0] == wanted
        excluded = false_negatives(scores, positive, excluded, options.false_negative_margin)
        back = None
        if options.symmetric:
            asked = vectors[groups, 1] @ vectors[:, 0].t()  # [n, g]
            equal = (texts[None, :, 0] == wanted) | (texts[None, :, 0] == answers) | (texts[None, :, 1] == answers)
            back = asked, groups, false_negatives(asked, groups, equal, options.false_negative_margin)
        return cls(scores, positive, excluded, own, back)

    def losses(self, options: Contrastive, teacher: Tensor | None) -> Tensor:
        """The loss of each query, [n].

        Args:
            teacher: [n, P]; a query with a nan among its scores is not distilled.
        """
        t, loss = options.temperature, self.scores.new_zeros(len(self.scores))
        if options.contrast:
            loss = info_nce(self.scores / t, self.positive, self.excluded)
            if self.back is not None:
                loss = (loss + info_nce(self.back[0] / t, *self.back[1:])) / 2
            loss = options.contrast * loss
        if teacher is not None:
            is_scored = teacher.isfinite().all(1)
            wanted = (teacher / options.teacher_temperature).masked_fill(~is_scored[:, None], 0.0)
            if options.distill_kind == "kl":
                distance = kl_divergence(self.own / t, wanted)
            else:
                distance = stable_distillation(self.own / t, wanted, self._others(options) / t)
            loss = loss + options.distill * distance * is_scored
        return loss

    def _others(self, options: Contrastive) -> Tensor:
        """The scores of the negatives of other groups, [n, c]: -inf for candidates that are left out or of the own group."""
        if options.negatives == "given":
            return self.scores.new_full((len(self.scores), 1), float("-inf"))
        columns = torch.arange(self.scores.shape[1], device=self.scores.device)
        is_own = columns // options.passages == (self.positive // options.passages)[:, None]
        return self.scores.masked_fill(self.excluded | is_own, float("-inf"))

    @torch.no_grad()
    def reported(self) -> Tensor:
        """REPORTED, summed over the queries, [4]."""
        best = self.scores.gather(1, self.positive[:, None])  # [n, 1]
        left_out = self.excluded.sum(1)
        rivals = self.scores.masked_fill(self.excluded, float("-inf")).scatter(1, self.positive[:, None], float("-inf"))
        candidates = self.scores.shape[1] - 1
        accurate = best[:, 0] > rivals.max(1).values
        each = (accurate, best[:, 0], candidates - left_out, left_out / max(1, candidates))
        return torch.stack([value.float().sum() for value in each])


def false_negatives(scores: Tensor, positive: Tensor, equal: Tensor, margin: float | None) -> Tensor:
    """The candidates that are left out, bool [n, c]: equal texts, and those above the positive's score plus the margin.

    Args:
        scores: [n, c].
        positive: int64 [n], the column of the positive, which stays.
        equal: bool [n, c].
    """
    if margin is not None:
        equal = equal | (scores.detach() > scores.detach().gather(1, positive[:, None]) + margin)
    return equal.scatter(1, positive[:, None], False)


def info_nce(logits: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
    """-log softmax(logits) of the positive, over the candidates that are not left out (van den Oord et al. 2018), [n].

    Args:
        logits: scores / temperature, [n, c].
        positive: int64 [n], the column of the positive.
        excluded: bool [n, c].
    """
    return F.cross_entropy(logits.masked_fill(excluded, float("-inf")), positive, reduction="none")


def kl_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(logits)) over the passages of a group (Hinton et al. 2015), [n].

    Args:
        logits, teacher: scores / temperature, [n, P].
    """
    return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def stable_distillation(logits: Tensor, teacher: Tensor, others: Tensor) -> Tensor:
    """LLM-Embedder's distillation (Zhang et al. 2023, section 3.2.2), [n].

    With w = softmax(teacher), of each passage i of a group, weighted contrastive losses against the worse passages of the
    group and the negatives of the batch:

        -sum_i w_i log( exp(logit_i) / (sum_{j: teacher_j <= teacher_i} exp(logit_j) + sum_others exp(logit)) )

    A teacher that prefers one passage gives InfoNCE; one that likes all alike trains them all against the batch.

    Args:
        logits, teacher: scores / temperature, [n, P].
        others: logits of the negatives of other groups, [n, c]; -inf counts nowhere.
    """
    is_better = teacher[:, None, :] > teacher[:, :, None]  # [n, i, j]
    worse = logits[:, None, :].expand_as(is_better).masked_fill(is_better, float("-inf"))
    total = torch.logaddexp(worse.logsumexp(-1), others.logsumexp(-1, keepdim=True))  # [n, P]
    return (teacher.softmax(-1) * (total - logits)).sum(-1)
