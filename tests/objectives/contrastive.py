"""The contrastive loss as its page and the papers write it: one query and one passage at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like.config import Contrastive


def contrastive_loss(vectors: Tensor, texts: Tensor, teacher: Tensor, options: Contrastive) -> Tensor:
    """The losses of all queries of a batch, [g], of length-1 vectors [g (1 + P), h], texts [g (1 + P)] and scores [g P]."""
    groups = len(vectors) // (1 + options.passages)
    each = []
    for width in [*options.dimensions, vectors.shape[1]]:
        v = vectors if width == vectors.shape[1] else F.normalize(vectors[:, :width], dim=-1)
        v = v.view(groups, 1 + options.passages, width)
        t = texts.view(groups, -1).tolist()
        each.append(torch.stack([of_query(i, v, t, teacher.view(groups, -1)[i], options) for i in range(groups)]))
    return torch.stack(each).sum(0) / len(each)


def of_query(i: int, v: Tensor, texts: list[list[int]], teacher: Tensor, o: Contrastive) -> Tensor:
    query, passages = v[i, 0], range(o.passages)
    own = [v[i, 1 + j] @ query / o.temperature for j in passages]

    def is_true_negative(score: Tensor, text: int) -> bool:
        near = o.false_negative_margin is not None
        too_near = near and score * o.temperature > own[0] * o.temperature + o.false_negative_margin
        return text not in texts[i][:2] and not too_near

    def is_candidate(g: int, j: int) -> bool:
        answers_the_same = j == 0 and texts[g][0] == texts[i][0]
        return (g, j) != (i, 0) and not answers_the_same and (g == i or o.negatives != "given")

    scores = {
        (g, j): v[g, 1 + j] @ query / o.temperature for g in range(len(v)) for j in passages if is_candidate(g, j)
    }
    kept = {(g, j): s for (g, j), s in scores.items() if is_true_negative(s, texts[g][1 + j])}
    loss = -torch.log(own[0].exp() / (own[0].exp() + sum(s.exp() for s in kept.values())))
    if o.symmetric:
        asked = {g: v[g, 0] @ v[i, 1] / o.temperature for g in range(len(v)) if g != i and texts[g][1] != texts[i][1]}
        rest = sum(s.exp() for g, s in asked.items() if is_true_negative(s, texts[g][0]))
        loss = (loss - torch.log(own[0].exp() / (own[0].exp() + rest))) / 2
    if o.distill and not teacher.isnan().any():
        outside = [s for (g, _), s in kept.items() if g != i]
        return o.contrast * loss + o.distill * distillation(own, (teacher / o.teacher_temperature).tolist(), outside, o)
    return o.contrast * loss


def distillation(own: list[Tensor], teacher: list[float], outside: list[Tensor], o: Contrastive) -> Tensor:
    weights, distance = torch.tensor(teacher).exp() / torch.tensor(teacher).exp().sum(), torch.zeros(())
    for w, score, reward in zip(weights, own, teacher, strict=True):
        if o.distill_kind == "kl":
            distance = distance + w * torch.log(w / (score.exp() / sum(s.exp() for s in own)))
        else:
            worse = [s for s, r in zip(own, teacher, strict=True) if r <= reward]
            distance = distance - w * torch.log(score.exp() / sum(s.exp() for s in worse + outside))
    return distance
