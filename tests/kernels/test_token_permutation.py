from typing import Any

import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, seeded

from flagscale_kernels import collect_reference, collect_tokens, spread_reference, spread_tokens, token_order


def order(t=7, k=2, experts=4):
    """Of t tokens with k different experts each; the last expert has none."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.stack([torch.randperm(experts - 1, generator=generator)[:k] for _ in range(t)])
    return token_order(chosen), chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [123, 2048 + 5])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_ways_and_their_gradients_are_as_good_as_pytorch(backend, k, h, dtype):
    (token, inverse), _ = order(k=k)
    for function, reference, rows, out in (
        (spread_tokens, spread_reference, 7, 7 * k),
        (collect_tokens, collect_reference, 7 * k, 7),
    ):
        assert_as_good_as_pytorch(
            lambda x, f=function: f(x, token, inverse, backend=backend),
            lambda x, f=reference: f(x, token, inverse),
            [seeded(rows, h, dtype=dtype)],
            [seeded(out, h, seed=2)],
        )


def test_the_order_is_that_of_the_experts_and_of_the_tokens_within_one():
    (token, inverse), chosen = order(t=50, k=3, experts=6)
    sorted_experts = torch.full((150,), -1)
    sorted_experts[inverse] = chosen
    assert sorted_experts.tolist() == sorted(chosen.flatten().tolist())
    assert (token[inverse] == torch.arange(50)[:, None]).all()
    for expert in range(5):
        tokens = token[sorted_experts == expert].tolist()
        assert tokens == sorted(tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_and_gradients(backend):
    (token, inverse), _ = order()
    wide = seeded(14, 40)
    torch.testing.assert_close(
        collect_tokens(wide[:, 8:24], token, inverse, backend=backend),
        collect_reference(wide[:, 8:24], token, inverse),
    )
    x = seeded(7, 6).requires_grad_()
    (dx,) = torch.autograd.grad(
        spread_tokens(x, token, inverse, backend=backend), x, seeded(6, 14).t()
    )  # its rows are not dense
    torch.testing.assert_close(dx, collect_reference(seeded(6, 14).t(), token, inverse))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token(backend):
    token, inverse = token_order(torch.empty(0, 2, dtype=torch.int64))
    assert spread_tokens(torch.empty(0, 8), token, inverse, backend=backend).shape == (0, 8)
    assert collect_tokens(torch.empty(0, 8), token, inverse, backend=backend).shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_order_that_is_a_slice_of_other_tensors(backend):
    (token, inverse), _ = order()
    strided = torch.stack([token, token + 1], -1)[:, 0], torch.stack([inverse, inverse + 1], -1)[..., 0]
    x, y = seeded(7, 5), seeded(14, 5)
    assert torch.equal(spread_tokens(x, *strided, backend=backend), spread_tokens(x, token, inverse, backend=backend))
    assert torch.equal(collect_tokens(y, *strided, backend=backend), collect_tokens(y, token, inverse, backend=backend))


def test_cpu_path_passes_gradcheck():
    (token, inverse), _ = order()
    x = seeded(7, 5, dtype=torch.float64).requires_grad_()
    y = seeded(14, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spread_tokens(x, token, inverse), [x])
    assert torch.autograd.gradcheck(lambda y: collect_tokens(y, token, inverse), [y])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(6, 4)}, r"x.shape \(\(6, 4\)\) must be \(7, h\)"),
        ({"x": torch.ones(7, 4, dtype=torch.int64)}, "x.dtype"),
        ({"token": torch.zeros(13, dtype=torch.int64)}, r"token.shape \(\(13,\)\) must be \(14,\)"),
        ({"token": torch.zeros(14, dtype=torch.int32)}, "token.dtype"),
        ({"inverse": torch.zeros(14, dtype=torch.int64)}, r"inverse.dim\(\) \(1\) must be 2"),
        ({"inverse": torch.zeros(7, 2, dtype=torch.int64, device="meta")}, "inverse.device"),
    ],
)
def test_bad_input_names_the_argument(changes, message):
    (token, inverse), _ = order()
    given: dict[str, Any] = {"x": torch.ones(7, 4), "token": token, "inverse": inverse, **changes}
    with pytest.raises(ValueError, match=message):
        spread_tokens(**given)
