"""Which tokens are drawn, how often, and with which log-probabilities."""

import numpy as np
import pytest
import torch

from flagscale_like.errors import ConfigError
from flagscale_like.generation.rollout import Sampling
from flagscale_like.generation.sampling import Draws, check_sampling, draw, text_key, uniforms

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])


def drawn(count=4000, logits=LOGITS, **options):
    """[3, count] draws from the same logits at as many positions of a text."""
    sampling = Sampling(1, **options)
    random = uniforms([text_key(7, 1, 2)] * count, range(count))
    return draw(logits.repeat(count, 1), Draws([sampling] * count, random))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, 5),
        ({"temperature": 5.0}, 5),
        ({"temperature": 5.0, "top_k": 2}, 2),
        ({"temperature": 1.0, "top_p": 0.7}, 2),  # 0.64 and 0.23
        ({"temperature": 1.0, "top_p": 0.7, "top_k": 2}, 1),  # of two, the first has 0.73
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(options, kept):
    tokens, logprobs, raw = drawn(**options)
    plain = (LOGITS / options["temperature"]).softmax(-1)
    order = plain.argsort(descending=True)[:kept]
    expected = torch.zeros(5).index_copy(0, order, plain[order] / plain[order].sum())
    found = torch.bincount(tokens.long(), minlength=5) / len(tokens)
    assert (found > 0).tolist() == (expected > 0).tolist()
    assert (found - expected).abs().max() < 4 * (0.25 / len(tokens)) ** 0.5
    torch.testing.assert_close(logprobs.exp().float(), expected[tokens.long()])
    torch.testing.assert_close(raw.exp().float(), plain[tokens.long()])


def test_at_temperature_0_the_likeliest_is_taken_and_has_the_model_s_own_log_probability():
    tokens, logprobs, raw = drawn(3, temperature=0, top_p=0.1)
    assert tokens.tolist() == [1, 1, 1]
    assert logprobs.tolist() == raw.tolist() == [LOGITS.log_softmax(-1)[1].item()] * 3


def test_a_row_draws_the_same_alone_and_among_rows_of_other_kinds():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3000, generator=generator)  # more than are looked at before all are sorted
    samplings = [
        Sampling(1, temperature=0),
        Sampling(1),
        Sampling(1, temperature=3.0, top_p=0.95),
        Sampling(1, top_k=5),
        Sampling(1, top_p=0.2, top_k=1500),
        Sampling(1, temperature=0.5),
    ]
    random = uniforms([text_key(0, i, 0) for i in range(6)], [4] * 6)
    together = draw(logits.clone(), Draws(samplings, random))
    alone = [draw(logits[i : i + 1].clone(), Draws([samplings[i]], random[i : i + 1])) for i in range(6)]
    assert torch.equal(together, torch.cat(alone, -1))


def test_random_numbers_are_even_and_each_text_and_position_has_its_own():
    found = np.concatenate(
        [uniforms([text_key(s, p, i)] * 50, range(50)) for s in (0, 1) for p in range(9) for i in range(9)]
    )
    assert len(set(found.tolist())) == len(found)
    assert abs(found.mean() - 0.5) < 4 * (1 / 12 / len(found)) ** 0.5
    assert 0 <= found.min() < 0.001
    assert 0.999 < found.max() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-30}, "temperature is 1e-30; give 0, or a number of at least 0.0001"),
        ({"top_p": 0.0}, "top_p is 0.0; give above 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": (50,)}, "stop is .*tokens below 50"),
        ({"stop_strings": ("",)}, "stop_strings"),
        ({"stop_strings": ("\ud83d",)}, "stop_strings is .*of whole characters"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_sampling(Sampling(**{"max_new_tokens": 1} | options), 50)
