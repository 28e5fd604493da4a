"""Attention on inputs at the edges of what is allowed: strides, windows, empty tensors, wide strides, many sequences."""

from typing import Any

import pytest
import torch
from kernel_checks import BACKENDS, seeded

from flagscale_kernels import flash_attention, piecewise_attention
from flagscale_kernels._attention_checks import NO_BOUND, reachable
from flagscale_kernels._tuning import Config


def gradients(call, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, seeded(*out.shape, seed=7).to(out.dtype))]


def assert_equal(found, expected, **tolerance):
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(mine, theirs, msg=lambda text, i=i: f"tensor {i}: {text}", **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_may_be_a_column_of_a_table(backend):
    q = seeded(60, 2, 16)
    table = torch.tensor([[0, 0], [20, 7], [60, 9]], dtype=torch.int32)

    def call(ends):
        options: dict[str, Any] = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "layout": "tnd", "causal": True}
        return gradients(lambda q: flash_attention(q, q, q, backend=backend, **options), q)

    assert_equal(call(table[:, 0]), call(table[:, 0].contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window": 2**31 - 1},
        {"causal": True, "window": 2**40},
        {"causal": False, "window": (2**31 - 1, 2**31 - 1)},
        {"causal": False, "window": (-1, 2**31 - 1)},
        {"causal": False, "window": (3, 2**62)},
    ],
)
def test_a_huge_window_is_no_window(options):
    q, k, v = (seeded(1, 2, s, 16, seed=s) for s in (33, 37, 37))
    windows = options["window"]
    small = tuple(w if w <= 3 else -1 for w in windows) if isinstance(windows, tuple) else None
    expected = gradients(lambda *t: flash_attention(*t, backend="torch", **options | {"window": small}), q, k, v)
    for backend in BACKENDS:
        assert_equal(gradients(lambda *t, b=backend: flash_attention(*t, backend=b, **options), q, k, v), expected)


def test_bounds_that_no_distance_reaches_are_dropped():
    # The largest distances between 5 queries and 8 keys: 7 back (the last query, the first key), 4 ahead.
    assert reachable((6, 3), 5, 8) == (6, 3)
    assert reachable((7, 4), 5, 8) == (NO_BOUND, NO_BOUND)
    assert reachable((0, 0), 1, 1) == (NO_BOUND, 0)  # a causal mask stays: without it other code would be compiled


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((0, 2, 5, 16), (0, 1, 5, 16)),
        ((1, 2, 0, 16), (1, 1, 5, 16)),
        ((1, 2, 5, 16), (1, 1, 0, 16)),
        ((1, 0, 5, 16),) * 2,
    ],
)
def test_empty_tensors_give_zeros(backend, q_shape, k_shape):
    if q_shape[1] == 0:
        k_shape = (1, 1, 5, 16)
    q, k, v = seeded(*q_shape), seeded(*k_shape), seeded(*k_shape)
    for found in (
        gradients(lambda *t: flash_attention(*t, causal=True, backend=backend), q, k, v),
        gradients(lambda q, k, v: piecewise_attention(q, k, q, k, v, 2, causal=True, backend=backend), q, k, v),
    ):
        assert all(not t.any() for t in found)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert out.shape == q.shape
    assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", [[0], [0, 0], [0, 0, 0]])
def test_a_pack_without_tokens(backend, ends):
    q, k = seeded(0, 2, 16), seeded(0, 1, 16)
    ends = torch.tensor(ends, dtype=torch.int32)
    options: dict[str, Any] = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "layout": "tnd", "causal": True}
    found = gradients(lambda q, k, v: flash_attention(q, k, v, backend=backend, **options), q, k, k)
    assert [t.shape for t in found] == [q.shape, q.shape, k.shape, k.shape]


def test_a_tile_may_span_more_than_2_to_the_31_elements():
    s = 64
    stride = (1 << 31) // 63 + 4096  # the interpreter's tiles have 64 queries
    memory = torch.empty(s * stride, dtype=torch.bfloat16)  # 4.3 GB of addresses, of which 64 pages are used
    q = memory.as_strided((s, 1, 1, 16), (stride, 16, 16, 1))
    q.copy_(seeded(s, 1, 1, 16))
    k = seeded(s, 1, 1, 16, seed=1).bfloat16()
    for call in (
        lambda q, k: flash_attention(q, k, k, causal=True, layout="sbnd", backend="triton"),
        lambda q, k: piecewise_attention(q, k, q, k, k, 9, causal=True, layout="sbnd", backend="triton"),
    ):
        leaves = [q.detach().requires_grad_(), k.clone().requires_grad_()]
        out = call(*leaves)
        grad = seeded(*out.shape, seed=7).bfloat16()
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert_equal(found, gradients(call, q.contiguous(), k), rtol=0, atol=0)


def test_more_than_65535_sequences(monkeypatch):
    # A launch grid has at most 65,535 blocks in its second and third dimension. One tile a sequence is the least work.
    from flagscale_kernels import flash_attention as module  # noqa: F401

    n = 65_536 + 3
    q = torch.zeros(n, 1, 16)
    launched = grids_of(monkeypatch, lambda: flash_attention(
        *(q,) * 3, causal=True, layout="tnd", cu_seqlens_q=torch.arange(n + 1), cu_seqlens_k=torch.arange(n + 1),
        max_seqlen_q=1, max_seqlen_k=1, backend="triton",
    ))  # fmt: skip
    launched += grids_of(monkeypatch, lambda: flash_attention(*(q[:, None],) * 3, causal=True, backend="triton"))
    launched += grids_of(monkeypatch, lambda: piecewise_attention(*(q[:, None],) * 5, 1, causal=True, backend="triton"))
    for grid in launched:
        assert all(size <= 65_535 for size in grid[1:]), grid


def grids_of(monkeypatch, call):
    """The grid of each launch of a tuned kernel within call(), which runs nothing."""
    from flagscale_kernels._tuning import TunedKernel

    grids = []
    monkeypatch.setattr(TunedKernel, "launch", lambda self, grid, *a, **k: grids.append(grid(Config(bm=64, bn=64))))
    call()
    assert grids
    return grids
