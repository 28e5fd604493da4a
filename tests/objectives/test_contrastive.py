"""The contrastive loss and its gradient: equal to the formulas, one query at a time, and to autograd through them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flagscale_like.objectives.contrastive as module
from flagscale_like.config import Contrastive
from flagscale_like.data.batch import Batch
from flagscale_like.errors import ConfigError, required
from flagscale_like.objectives.contrastive import ContrastiveLoss, stable_distillation
from flagscale_like.objectives.embedding import Pooling, pool
from tests.objectives.contrastive import contrastive_loss

GROUPS, PASSAGES, WIDTH = 5, 3, 12


def options(**changes):
    return Contrastive.model_validate({"kind": "contrastive", "passages": PASSAGES, "temperature": 0.2, **changes})


def data(groups=GROUPS, passages=PASSAGES):
    """(vectors, texts, of which some are equal, teacher's scores, of which a group has a nan and another has ties)."""
    random = torch.Generator().manual_seed(7)
    documents = groups * (1 + passages)
    vectors = F.normalize(torch.randn(documents, WIDTH, generator=random), dim=-1)
    teacher = torch.randn(groups, passages, generator=random)
    teacher[1, -1], teacher[0] = float("nan"), 0.5
    return vectors, torch.randint(0, 25, (documents,), generator=random), teacher.flatten()


def batch_of(texts, teacher, length=8):
    """A row of each group, so that the rows' losses are the queries'."""
    passages = len(teacher) // (len(texts) - len(teacher))
    rows = len(texts) // (1 + passages)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    starts = torch.arange(rows)[:, None] * length + torch.arange(1 + passages)
    documents = torch.cat((starts.flatten(), torch.tensor([rows * length]))).int()
    extras = {"texts": texts, "teacher": teacher}
    source = torch.zeros(rows, dtype=torch.int64)
    return Batch(
        tokens=tokens, labels=tokens, loss_mask=tokens.float(), documents=documents, source=source, extras=extras
    )


LOSSES = {
    "info-nce": {},
    "one passage": {"passages": 1},
    "own negatives": {"negatives": "given"},
    "margin": {"false_negative_margin": 0.1},
    "margin below": {"false_negative_margin": -0.1},
    "symmetric": {"symmetric": True, "negatives": "batch"},
    "symmetric margin": {"symmetric": True, "false_negative_margin": 0.0},
    "kl": {"distill": 1.0, "teacher_temperature": 0.5},
    "kl alone": {"distill": 1.0, "contrast": 0.0, "negatives": "given"},
    "stable": {"distill": 1.0, "distill_kind": "stable", "contrast": 0.2},
    "stable own": {"distill": 1.0, "distill_kind": "stable", "negatives": "given"},
    "matryoshka": {"dimensions": [4, 8], "distill": 0.5},
}


@pytest.mark.parametrize("block", ["whole", "one query at a time"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_its_formula(name, block, monkeypatch):
    if block != "whole":
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 1)
    wanted = options(**LOSSES[name])
    vectors, texts, teacher = data(passages=wanted.passages)
    batches, extras = [batch_of(texts, teacher)], {"texts": texts}
    found, gradient = ContrastiveLoss(wanted).batch_loss(batches, vectors, extras, 0, gradient=True)
    leaf = vectors.clone().requires_grad_()
    expected = contrastive_loss(leaf, texts, teacher, wanted)
    expected.sum().backward()
    torch.testing.assert_close(found.samples["loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.total, expected.detach().sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-6)
    assert (found.count.item(), found.samples["tokens"].tolist()) == (GROUPS, [1.0] * GROUPS)
    assert ContrastiveLoss(wanted).batch_loss(batches, vectors, extras, 0, gradient=False)[1] is None
    assert set(found.sums) == set(ContrastiveLoss(wanted).sums)


def test_the_parts_of_a_batch_add_up_to_its_loss_and_its_gradient():
    """Two ranks of two and three groups: each has its own queries, and the gradient by the vectors of both."""
    objective, (vectors, texts, teacher) = ContrastiveLoss(options(distill=0.5, symmetric=True)), data()
    extras = {"texts": texts}
    whole, gradient = objective.batch_loss([batch_of(texts, teacher)], vectors, extras, 0, gradient=True)
    parts = []
    for first, last in ((0, 2), (2, GROUPS)):
        own = slice(first * (1 + PASSAGES), last * (1 + PASSAGES))
        rows = batch_of(texts[own], teacher[first * PASSAGES : last * PASSAGES])
        parts.append(objective.batch_loss([rows], vectors, extras, own.start, gradient=True))
    torch.testing.assert_close(sum(part.total for part, _ in parts), whole.total)
    torch.testing.assert_close(sum(required(grad, "gradient") for _, grad in parts), gradient)
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part, _ in parts), value)


def test_equal_texts_are_no_negatives_of_each_others_queries():
    texts = torch.tensor([[1, 2, 3], [4, 2, 1], [1, 5, 6]])  # query, positive, negative
    vectors = F.normalize(torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
    objective = ContrastiveLoss(options(passages=2))
    batch = batch_of(texts.flatten(), torch.zeros(6))
    found, _ = objective.batch_loss([batch], vectors, {"texts": texts.flatten()}, 0, gradient=False)
    # Of query 1 not the other 2, the passage 1, nor 5, which answers an equal query; of query 4 not the other 2; of the
    # last query not the passage 1, nor 2, which answers an equal query.
    assert found.sums["retrieval/negatives"].item() == (5 - 3) + (5 - 1) + (5 - 2)
    assert found.sums["retrieval/filtered"].item() == pytest.approx(6 / 5)


def test_a_query_whose_positive_is_not_strictly_the_nearest_is_not_accurate():
    same = torch.ones(8, WIDTH) / WIDTH**0.5
    batch = batch_of(torch.arange(8), torch.zeros(4))
    found, _ = ContrastiveLoss(options(passages=1)).batch_loss(
        [batch], same, {"texts": torch.arange(8)}, 0, gradient=False
    )
    assert (found.sums["retrieval/accuracy"].item(), found.sums["retrieval/positive"].item()) == (0, pytest.approx(4))
    orthogonal = torch.eye(8)[[0, 0, 1, 1, 2, 2, 3, 3]]
    found, _ = ContrastiveLoss(options(passages=1)).batch_loss(
        [batch], orthogonal, {"texts": torch.arange(8)}, 0, gradient=False
    )
    assert found.sums["retrieval/accuracy"].item() == 4


def test_stable_distillation_of_a_sure_teacher_is_info_nce_and_of_an_unsure_one_spares_the_group():
    logits, others = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.3, -0.2]])
    sure = stable_distillation(logits, torch.tensor([[100.0, 0.0, -5.0]]), others)
    everything = torch.cat((logits, others), 1)
    torch.testing.assert_close(sure, F.cross_entropy(everything, torch.tensor([0]), reduction="none"))
    unsure = stable_distillation(logits, torch.zeros(1, 3), others)
    torch.testing.assert_close(unsure, (everything.logsumexp(1) - logits.mean(1)))


def test_a_group_without_scores_is_not_distilled_and_the_share_is_reported():
    vectors, texts, teacher = data()
    found, gradient = ContrastiveLoss(options(distill=1.0, contrast=0.0)).batch_loss(
        [batch_of(texts, teacher)], vectors, {"texts": texts}, 0, gradient=True
    )
    assert found.sums["retrieval/distilled"].item() == GROUPS - 1
    assert found.samples["loss"][1].item() == 0
    assert gradient.isfinite().all()
    assert gradient[1 + PASSAGES : 2 * (1 + PASSAGES)].abs().max() == 0


def test_pooling_leaves_padding_out():
    hidden = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(3))
    bounds, lengths = torch.tensor([0, 2, 5, 10], dtype=torch.int32), torch.tensor([2, 3, 2])
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    batch = Batch(tokens=tokens, labels=tokens, loss_mask=tokens, documents=bounds, lengths=lengths)
    rows = hidden[0]
    expected: dict[Pooling, list[Tensor]] = {
        "last": [rows[1], rows[4], rows[6]],
        "first": [rows[0], rows[2], rows[5]],
        "mean": [rows[:2].mean(0), rows[2:5].mean(0), rows[5:7].mean(0)],
    }
    for pooling, vectors in expected.items():
        torch.testing.assert_close(pool(hidden, batch, pooling), F.normalize(torch.stack(vectors), dim=-1))
    assert batch.attended().tolist() == [0, 2, 5, 7, 10]


@pytest.mark.parametrize("negatives", ["batch", "cross"])
def test_a_batch_whose_queries_have_no_negative_is_refused(negatives):
    objective = ContrastiveLoss(options(passages=1, negatives=negatives))
    objective.check([4, 6])
    with pytest.raises(ConfigError, match="a batch of one query without hard negatives has the loss 0"):
        objective.check([2])
    if negatives == "batch":
        with pytest.raises(ConfigError, match="or objective.negatives cross"):
            objective.check([4, 2])
    else:
        objective.check([2, 2])
    ContrastiveLoss(options(passages=2)).check([3])
