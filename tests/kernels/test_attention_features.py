"""Attention's options against its definition: capped scores, sinks, widths, packs of both operators, kinds of backward."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import BACKENDS, assert_as_good_as_pytorch, seeded

from flagscale_kernels import (
    _attention_kernels,
    attention_reference,
    flash_attention,
    flash_attention_backward,
    piecewise_attention,
    piecewise_attention_backward,
    piecewise_reference,
)
from flagscale_kernels import _attention_launch as launch
from flagscale_kernels.flash_attention import KERNELS as FLASH
from flagscale_kernels.piecewise_attention import KERNELS as PIECEWISE

FEATURES = [
    {"softcap": 1.5},
    {"sinks": True},
    {"v": 48},
    {"d": 24, "v": 16, "softcap": 2.0, "sinks": True},
]


def qkv(s=69, s_k=None, d=16, v=None, n=4, n_kv=2, dtype=torch.float32):
    s_k = s if s_k is None else s_k
    shapes = [(1, n, s, d), (1, n_kv, s_k, d), (1, n_kv, s_k, v or d)]
    return [seeded(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def check(backend, tensors, operator, reference, *, sinks=False, **options):
    """Output, LSE and all gradients, the sinks' among them."""
    q, v = tensors[0], tensors[-1]
    inputs = [*tensors, seeded(q.shape[1], seed=8)] if sinks else list(tensors)
    count = len(tensors)

    def call(function, **more):
        def run(*t):
            return function(*t[:count], sinks=t[count] if sinks else None, return_lse=True, **options, **more)

        return run

    grads = [seeded(*q.shape[:-1], v.shape[-1], seed=3), seeded(*q.shape[:-1], seed=4)]
    assert_as_good_as_pytorch(call(operator, backend=backend), call(reference), inputs, grads)


def reference(*args, return_lse, **options):
    return attention_reference(*args, **options)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("more", [{"causal": True}, {"causal": False, "window": (20, 7)}, {"causal": True, "s_k": 40}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flash_attention(backend, features, more):
    given = features | more
    shape = {name: given.pop(name) for name in ("d", "v", "s_k") if name in given}
    check(backend, qkv(**shape), flash_attention, reference, **given)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_piecewise_attention(backend, features, causal):
    given = dict(features)
    shape = {name: given.pop(name) for name in ("d", "v") if name in given}
    q, k, v = qkv(**shape)
    q2, k2, _ = (t.flip(2) for t in qkv(**shape))
    check(backend, [q, k, q2, k2, v], piecewise_attention, piecewise_reference, threshold=33, causal=causal, **given)


@pytest.mark.parametrize(("d", "v"), [(8, 8), (80, 80), (96, 96), (192, 128), (96, 160)])
def test_head_dimensions_of_two_tiles(d, v):
    assert launch.split(96) == (64, 32)
    assert launch.split(192) == (128, 64)
    assert launch.split(120) == (128, 0)
    q, k, values = qkv(s=37, d=d, v=v, n=2, n_kv=1)
    check("triton", [q, k, values], flash_attention, reference, causal=True)
    check("triton", [q, k, q.flip(2), k, values], piecewise_attention, piecewise_reference, threshold=9, causal=True)


def packs(widths, ends, heads):
    return [seeded(ends[-1] + 3, n, d, seed=i).requires_grad_() for i, (n, d) in enumerate(zip(heads, widths))]


# Of the backward: whether it is deterministic. "apart" is what wide heads get on sm_90: a pass for dK and one for dV.
WAYS = {"seven products": True, "apart": True, "added": False, "ordered": True}


def way_of(monkeypatch, way):
    """The options of a call whose backward goes this way."""
    monkeypatch.setenv(launch.ORDERED_VARIABLE, str(int(way == "ordered")))
    for kernels in (FLASH, PIECEWISE):
        monkeypatch.setattr(kernels.dkdv, "offers", lambda *_, together=way != "apart": together)
    return {"deterministic": WAYS[way], "backend": "triton"}


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("way", [*WAYS, "torch"])
def test_packs_of_piecewise_attention_equal_each_sequence_alone(monkeypatch, way, with_lengths):
    ends = [0, 5, 5, 74]
    q1, k1, q2, k2, v = packs([16, 16, 16, 16, 24], ends, [4, 2, 4, 2, 2])
    sinks = seeded(4, seed=8).requires_grad_()
    cu = torch.tensor(ends, dtype=torch.int32)
    lengths: dict[str, Any] = {"max_seqlen_q": 69, "max_seqlen_k": 69} if with_lengths else {}
    options: dict[str, Any] = {"causal": True, "softcap": 2.0, "sinks": sinks}
    chosen: dict[str, Any] = {"backend": "torch"} if way == "torch" else way_of(monkeypatch, way)
    leaves = [q1, k1, q2, k2, v, sinks]
    out, lse = piecewise_attention(
        q1, k1, q2, k2, v, 33, layout="tnd", cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True,
        **chosen, **lengths, **options,
    )  # fmt: skip
    assert out[74:].eq(0).all()
    assert lse[:, 74:].eq(-torch.inf).all()
    grad, grad_lse = seeded(*out.shape, seed=3), seeded(*lse.shape, seed=4)
    got = torch.autograd.grad([out, lse], leaves, [grad, grad_lse])
    wanted = [torch.zeros_like(t) for t in leaves]
    for a, b in pairwise(ends):
        if a == b:
            continue
        parts = [t[a:b].transpose(0, 1)[None] for t in (q1, k1, q2, k2, v)]
        alone, alone_lse = piecewise_reference(*parts, 33, return_lse=True, **options)
        torch.testing.assert_close(out[a:b], alone[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, a:b], alone_lse[0])
        grads = [grad[a:b].transpose(0, 1)[None], grad_lse[None, :, a:b]]
        for total, part in zip(wanted, torch.autograd.grad([alone, alone_lse], leaves, grads)):
            total += part
    for mine, exact in zip(got, wanted):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"window": 33}, {"softcap": 1.0, "sinks": torch.tensor([0.5, 1.0, -2.0, 0.0])}]
)
@pytest.mark.parametrize("s_k", [69, 40, 100])
def test_every_way_gives_the_gradients_of_seven_products(monkeypatch, options, s_k):
    q, k, v = qkv(s_k=s_k, dtype=torch.bfloat16)
    found = {}
    for way in WAYS:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = flash_attention(*leaves, causal=True, **way_of(monkeypatch, way), **options)
        found[way] = torch.autograd.grad(out, leaves, seeded(*out.shape, seed=3).bfloat16())
    for way in ("apart", "added", "ordered"):
        for five, seven in zip(found[way], found["seven products"]):
            torch.testing.assert_close(five, seven, rtol=2e-2, atol=2e-2)
        assert torch.equal(found[way][1], found["seven products"][1])
    assert all(map(torch.equal, found["apart"], found["seven products"]))


@pytest.mark.parametrize("way", ["added", "ordered"])
def test_where_no_tiles_have_five_products_there_are_seven(monkeypatch, way):
    tensors, found = qkv(s=40, dtype=torch.bfloat16), []
    for given in (way, "seven products"):
        options = way_of(monkeypatch, given)
        monkeypatch.setattr(getattr(FLASH, way), "offers", lambda *_: False)
        leaves = [t.clone().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(flash_attention(*leaves, causal=True, **options).sum(), leaves))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("s_k", [69, 40, 100, 150])
@pytest.mark.parametrize("window", [(33, 0), (20, 30), (-1, 10), (-1, -1)])
def test_dq_is_added_up_from_the_last_key_to_the_first(monkeypatch, window, s_k):
    """A program that comes out of its turn would make nan here, and on a GPU wait."""
    q, k, v = qkv(s_k=s_k, n=4, n_kv=2, dtype=torch.bfloat16)
    found = []
    for way in ("ordered", "seven products"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = flash_attention(*leaves, causal=False, window=window, **way_of(monkeypatch, way))
        found.append(torch.autograd.grad(out, leaves, seeded(*out.shape, seed=3).bfloat16()))
    for five, seven in zip(*found):
        assert five.isfinite().all()
        torch.testing.assert_close(five, seven, rtol=2e-2, atol=2e-2)


@triton.jit
def place_in_the_grid(ORDER, tiles, SUM: tl.constexpr):
    return tl.program_id(0)


def test_a_program_out_of_its_turn_shows(monkeypatch):
    monkeypatch.setattr(_attention_kernels, "place", place_in_the_grid)
    leaves = [t.requires_grad_() for t in qkv(s_k=150, dtype=torch.bfloat16)]
    out = flash_attention(*leaves, causal=False, **way_of(monkeypatch, "ordered"))
    assert torch.autograd.grad(out.sum(), leaves)[0].isnan().any()


def test_keys_beyond_the_last_do_not_count_where_their_exponentials_overflow(monkeypatch):
    # The scores are -1600, so exp(0 - LSE) of a key of zeros behind the last one is infinite.
    q, k, v = torch.full((1, 1, 5, 16), 20.0), torch.full((1, 1, 5, 16), -20.0), seeded(1, 1, 5, 16)
    found = []
    for way in WAYS:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = flash_attention(*leaves, causal=False, **way_of(monkeypatch, way))
        found.append(torch.autograd.grad(out, leaves, seeded(*out.shape, seed=3)))
    for seven, *five in zip(*found):
        for one in five:
            assert one.isfinite().all()
            torch.testing.assert_close(one, seven)


@pytest.mark.parametrize("kernels", [FLASH, PIECEWISE], ids=["flash", "piecewise"])
@pytest.mark.parametrize("layout", ["bnsd", "sbnd"])
@pytest.mark.parametrize("s_k", [69, 100])
def test_tiles_by_descriptors_are_the_same(monkeypatch, kernels, layout, s_k):
    """Config.descriptors in every kernel, on a view with heads side by side, as a packed projection has them."""
    order = ["bnsd".index(letter) for letter in layout]
    given = qkv(s_k=s_k, d=16, dtype=torch.bfloat16)
    q, k, v = (t.permute(*order).contiguous() for t in given)
    used = []
    monkeypatch.setattr(launch, "descriptor", lambda *a, made=launch.descriptor: used.append(a) or made(*a))

    def run(way):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        options: dict[str, Any] = {"causal": True, "layout": layout, **way_of(monkeypatch, way)}
        if kernels is FLASH:
            out = flash_attention(*leaves, **options)
        else:
            out = piecewise_attention(*leaves[:2], leaves[0] * 0.5, leaves[1], leaves[2], 33, **options)
        return [out, *torch.autograd.grad(out, leaves, seeded(*out.shape, seed=3).bfloat16())]

    expected = [run(way) for way in WAYS]
    assert not used
    for kernel in kernels:
        [config] = kernel.configs(0, 16, 2)
        monkeypatch.setattr(kernel, "configs", lambda *_, c=config: [replace(c, descriptors=True)])
    for mine, theirs in zip([run(way) for way in WAYS], expected):
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert used


def test_tensors_that_descriptors_cannot_address_are_read_by_pointers():
    form = launch.Form(16, 16, 0, 16, 16, 0, *(False,) * 7, "tf32")
    t = torch.zeros(2, 3, 5, 16, dtype=torch.bfloat16)
    assert launch.descriptors_fit([t], form)
    assert launch.descriptors_fit([t.transpose(1, 2)], form)
    assert launch.descriptors_fit([t[:1, :1, 1:]], form)
    assert not launch.descriptors_fit(
        [t, torch.zeros(2, 3, 5, 18, dtype=torch.bfloat16)[..., :16]], form
    )  # 36-byte rows
    assert not launch.descriptors_fit(
        [torch.zeros(481, dtype=torch.bfloat16)[1:].view(2, 3, 5, 16)], form
    )  # 2 bytes on
    assert not launch.descriptors_fit([t[:1].expand(2, 3, 5, 16)], form)
    assert not launch.descriptors_fit([t], form._replace(packed=True))
    assert not launch.descriptors_fit([t], form._replace(d_b=16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backwards_without_autograd_return_the_gradient_of_the_sinks(backend):
    q, k, v = qkv(s=23)
    sinks = seeded(4, seed=8)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
    options: dict[str, Any] = {"causal": True, "softcap": 3.0, "backend": backend}
    out, lse = flash_attention(*leaves[:3], sinks=leaves[3], return_lse=True, **options)
    do = seeded(*out.shape, seed=3)
    out.backward(do)
    found = flash_attention_backward(do, q, k, v, out.detach(), lse.detach(), sinks=sinks, **options)
    assert all(torch.equal(a, b.grad) for a, b in zip(found, leaves, strict=True))
    with torch.no_grad():
        out, lse = piecewise_attention(q, k, q, k, v, 9, sinks=sinks, return_lse=True, **options)
        pair = piecewise_attention_backward(do, (q, k, q, k, v), out, lse, 9, sinks=sinks, **options)
    for both, one in zip((pair[0] + pair[2], pair[1] + pair[3], pair[4], pair[5]), found):
        torch.testing.assert_close(both, one)


def test_cpu_path_passes_gradcheck_with_all_features():
    q, k, v = (t.double().requires_grad_() for t in qkv(s=4, s_k=5, d=3, v=2))
    sinks = seeded(4, seed=8).double().requires_grad_()
    options: dict[str, Any] = {"causal": True, "softcap": 1.5, "return_lse": True}
    assert torch.autograd.gradcheck(lambda q, k, v, x: flash_attention(q, k, v, sinks=x, **options), [q, k, v, sinks])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": -1.0}, r"softcap \(-1.0\) must be positive"),
        ({"sinks": torch.ones(2)}, r"sinks.shape \(\(2,\)\) must be \(4,\)"),
        ({"sinks": torch.ones(4, dtype=torch.int64)}, "sinks.dtype"),
        (
            {"v": torch.ones(1, 2, 6, 32)},
            r"v.shape \(\(1, 2, 6, 32\)\) must equal k.shape .* but for the last dimension",
        ),
        (
            {"v": torch.ones(1, 2, 5, 300), "backend": "triton"},
            r"v.shape\[-1\] \(300\): head dimensions must be from 1",
        ),
    ],
)
def test_bad_options_name_the_argument(change, message):
    q, k = torch.ones(1, 4, 5, 16), torch.ones(1, 2, 5, 16)
    with pytest.raises(ValueError, match=message):
        flash_attention(**({"q": q, "k": k, "v": k, "causal": True} | change))
