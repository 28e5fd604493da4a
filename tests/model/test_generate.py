"""Which tokens sampling may take."""

import torch

from flagscale_like.model.generate import _pick


def test_only_the_likeliest_tokens_are_sampled():
    logits, generator = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0]), torch.Generator().manual_seed(0)

    def taken(temperature, top_p, top_k):
        return {_pick(logits, temperature, top_p, top_k, generator) for _ in range(300)}

    assert taken(0.0, 1.0, 0) == {1}
    assert taken(5.0, 1.0, 0) == {0, 1, 2, 3, 4}
    assert taken(5.0, 1.0, 2) == {1, 2}
    assert taken(1.0, 0.7, 0) == {1, 2}  # 0.64 and 0.23
    assert taken(1.0, 0.7, 2) == {1}  # of two, the first has 0.73
