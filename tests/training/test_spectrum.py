"""Effective rank: the exact one is the singular values', the sketched one is near it, and shards need not be gathered."""

import math

import pytest
import torch

from flagscale_like.config import Parallel
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.spectrum import SplitMatrix, effective_rank
from tests.harness import run_ranks

ALL, NONE = 10**9, 1


def by_definition(matrix):
    """exp of the entropy of the normalised singular values, in float64."""
    p = torch.linalg.svdvals(matrix.double())
    p = p / p.sum()
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


def matrix(name):
    torch.manual_seed(3)
    m, n = 330, 270
    noise = torch.randn(m, n)
    return {
        "flat": noise,
        "wide": noise.t(),
        "power law": noise @ torch.diag(1 / torch.arange(1, n + 1.0)),
        "geometric": noise @ torch.diag(0.97 ** torch.arange(n)),
        "one direction and noise": 10 * torch.randn(m, 1) @ torch.randn(1, n) + 0.01 * noise,
        "rank 3": torch.randn(m, 3) @ torch.randn(3, n),
    }[name]


NAMES = ["flat", "wide", "power law", "geometric", "one direction and noise", "rank 3"]


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_rank_is_that_of_the_singular_values(name):
    w = matrix(name)
    assert effective_rank(SplitMatrix(w), exact_up_to=ALL) == pytest.approx(by_definition(w), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_sketch_is_within_two_percent_and_within_six_where_values_fall_geometrically(name):
    w = matrix(name)
    near = 0.06 if name == "geometric" else 0.02
    assert effective_rank(SplitMatrix(w), exact_up_to=NONE) == pytest.approx(by_definition(w), rel=near)


def test_equal_values_count_each_and_zeros_none():
    eye = torch.eye(300)
    assert effective_rank(SplitMatrix(eye), exact_up_to=ALL) == pytest.approx(300)
    eye[100:] = 0
    assert effective_rank(SplitMatrix(eye), exact_up_to=ALL) == pytest.approx(100)
    assert effective_rank(SplitMatrix(eye), exact_up_to=NONE) == pytest.approx(100, rel=0.03)
    assert effective_rank(SplitMatrix(eye * 0), exact_up_to=ALL) == 0.0
    assert effective_rank(SplitMatrix(eye * 0), exact_up_to=NONE) == 0.0


def ranks_of_shards(tp):
    """(exact, sketched) of every matrix, this rank holding a part of the rows."""
    with parallel_context(Parallel(tp=tp)) as ctx:
        found = []
        for name in NAMES:
            split = SplitMatrix(matrix(name).chunk(tp)[ctx.tp_rank], [ctx.groups.tp])
            found.append([effective_rank(split, exact_up_to=limit) for limit in (ALL, NONE)])
        return found


def test_shards_on_two_ranks_have_the_rank_of_the_whole_on_both():
    first, second = run_ranks(2, ranks_of_shards, 2)
    assert first == second
    for name, (exact, sketched) in zip(NAMES, first, strict=True):
        true = by_definition(matrix(name))
        assert exact == pytest.approx(true, rel=1e-4)
        assert sketched == pytest.approx(true, rel=0.06 if name == "geometric" else 0.03)
