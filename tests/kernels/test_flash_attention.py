from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, seeded

from flagscale_kernels import attention_reference, flash_attention, flash_attention_backward


def qkv(b=1, n=2, n_kv=1, s=123, s_k=None, d=16, dtype=torch.float32):
    s_k = s if s_k is None else s_k
    return [seeded(b, n, s, d, dtype=dtype), *(seeded(b, n_kv, s_k, d, dtype=dtype, seed=i) for i in (1, 2))]


def check(backend, inputs, *, causal=True, **options):
    """Output, LSE and every gradient, against the definition."""
    b, n, s, d = inputs[0].shape
    slopes = options.pop("alibi_slopes", None)
    assert_as_good_as_pytorch(
        lambda q, k, v: flash_attention(
            q, k, v, causal=causal, alibi_slopes=slopes, return_lse=True, backend=backend, **options
        ),
        lambda q, k, v: attention_reference(q, k, v, causal=causal, alibi_slopes=slopes, **options),
        inputs,
        [seeded(b, n, s, d, seed=3), seeded(b, n, s, seed=4)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s", [5, 123])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_lse_and_gradients_are_as_good_as_pytorch(backend, s, causal, dtype):
    check(backend, qkv(s=s, dtype=dtype), causal=causal)


@pytest.mark.parametrize(("s", "s_k"), [(5, 123), (70, 123), (64, 96)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_keys_than_queries_align_at_the_end(backend, causal, s, s_k):
    check(backend, qkv(s=s, s_k=s_k), causal=causal)


@pytest.mark.parametrize("d", [16, 40, 64, 80, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dimensions(backend, d):
    check(backend, qkv(s=69, d=d, dtype=torch.bfloat16))


@pytest.mark.soak
@pytest.mark.parametrize("d", [17, 96, 192, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_more_head_dimensions(d, causal):
    check("triton", qkv(s=123, d=d), causal=causal)


@pytest.mark.parametrize(("n", "n_kv"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_queries(backend, n, n_kv):
    check(backend, qkv(b=2, n=n, n_kv=n_kv, s=37))


@pytest.mark.parametrize(
    ("causal", "window"), [(True, 1), (True, 33), (True, 500), (False, (7, 20)), (False, (40, -1)), (False, (-1, 3))]
)
@pytest.mark.parametrize("s_k", [123, 150])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_windows(backend, s_k, causal, window):
    check(backend, qkv(s=123, s_k=s_k, n=1), causal=causal, window=window)


def test_a_window_counts_the_keys_a_query_sees_as_mistral_does():
    q, k, v = qkv(s=9, n=1)
    allowed = torch.ones(9, 9).tril() * torch.ones(9, 9).triu(-3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed.bool())
    torch.testing.assert_close(flash_attention(q, k, v, causal=True, window=4, backend="triton"), expected)


@pytest.mark.parametrize("per_entry", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi(backend, causal, per_entry):
    slopes = torch.tensor([0.5, 0.25])
    slopes = torch.stack([slopes, slopes.flip(0)]) if per_entry else slopes
    check(backend, qkv(b=2, s=69), causal=causal, alibi_slopes=slopes)
    check(backend, qkv(b=2, s=33, s_k=69), causal=causal, alibi_slopes=slopes, softmax_scale=0.3)


@pytest.mark.parametrize("layout", ["sbnd", "bsnd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_are_read_through_strides(backend, layout):
    inputs = qkv(b=2, n=4, n_kv=2, s=37)
    order = ["bnsd".index(letter) for letter in layout]
    expected = flash_attention(*inputs, causal=True, backend="torch")
    moved = [t.permute(*order).contiguous().requires_grad_() for t in inputs]
    for return_lse in (False, True):
        out = flash_attention(*moved, causal=True, layout=layout, return_lse=return_lse, backend=backend)
        out = out[0] if return_lse else out
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected.permute(*order))
    leaves = [t.clone().requires_grad_() for t in inputs]
    grad = seeded(*expected.shape, seed=5)
    wanted = torch.autograd.grad(flash_attention(*leaves, causal=True, backend="torch"), leaves, grad)
    got = torch.autograd.grad(out, moved, grad.permute(*order))
    for mine, exact in zip(got, wanted):
        torch.testing.assert_close(mine, exact.permute(*order))


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_a_packed_projection_need_no_copy(backend):
    packed = seeded(37, 2, 2, 4, 16)  # [s, b, groups, 2 q heads + k + v, d]
    q, k, v = packed[:, :, :, :2].flatten(2, 3), packed[:, :, :, 2], packed[:, :, :, 3]
    out = flash_attention(q, k, v, causal=True, layout="sbnd", backend=backend)
    expected = flash_attention(*(t.permute(1, 2, 0, 3).contiguous() for t in (q, k, v)), causal=True, backend="torch")
    torch.testing.assert_close(out, expected.permute(2, 0, 1, 3))


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 9}, {"causal": False}])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_each_alone(backend, with_lengths, options):
    q_ends, k_ends = [0, 5, 5, 74], [0, 9, 9, 78]
    q = seeded(80, 4, 16).requires_grad_()  # six tokens of padding at the end
    k, v = (seeded(80, 2, 16, seed=i).requires_grad_() for i in (1, 2))
    cu: dict[str, Any] = {"cu_seqlens_q": torch.tensor(q_ends, dtype=torch.int32), "cu_seqlens_k": torch.tensor(k_ends)}
    lengths: dict[str, Any] = {"max_seqlen_q": 69, "max_seqlen_k": 69} if with_lengths else {}
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    out, lse = flash_attention(
        q, k, v, layout="tnd", return_lse=True, alibi_slopes=slopes, backend=backend, **cu, **lengths, **options
    )
    grad, grad_lse = seeded(80, 4, 16, seed=3), seeded(4, 80, seed=4)
    got = torch.autograd.grad([out, lse], [q, k, v], [grad, grad_lse])
    assert out[74:].eq(0).all()
    assert lse[:, 74:].eq(-torch.inf).all()
    assert got[0][74:].eq(0).all()
    assert got[1][78:].eq(0).all()
    for (q0, q1), (k0, k1) in zip(pairwise(q_ends), pairwise(k_ends)):
        if q0 == q1:
            continue
        part = [t[a:b].transpose(0, 1)[None] for t, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1))]
        alone, alone_lse = attention_reference(*part, alibi_slopes=slopes, **options)
        torch.testing.assert_close(out[q0:q1], alone[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, q0:q1], alone_lse[0])
        wanted = torch.autograd.grad(
            [alone, alone_lse], [q, k, v], [grad[q0:q1].transpose(0, 1)[None], grad_lse[None, :, q0:q1]]
        )
        for mine, exact, a, b in zip(got, wanted, (q0, k0, k0), (q1, k1, k1)):
            torch.testing.assert_close(mine[a:b], exact[a:b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_any_key_give_zero_and_no_gradient(backend):
    q, k, v = (t.requires_grad_() for t in qkv(s=70, s_k=40))  # the first 30 queries stand before the first key
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert out[:, :, :30].eq(0).all()
    assert lse[:, :, :30].eq(-torch.inf).all()
    expected, _ = attention_reference(q[:, :, 30:], k, v, causal=True)
    torch.testing.assert_close(out[:, :, 30:], expected)
    grad = seeded(*out.shape, seed=5)
    got = torch.autograd.grad(out, [q, k, v], grad)
    wanted = torch.autograd.grad(expected, [q, k, v], grad[:, :, 30:])
    for mine, exact in zip(got, wanted):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flash_attention(q, k, v, causal=True, backend=backend), out)


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}])
@pytest.mark.parametrize("s", [5, 23])
def test_the_backward_without_autograd_is_that_of_autograd_and_of_the_definition(s, options):
    q, k, v = qkv(b=2, n=4, n_kv=2, s=s, s_k=23)
    options: dict[str, Any] = {"causal": True, **options}
    do = seeded(2, 4, s, 16, seed=3)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = flash_attention(*inputs, return_lse=True, **options)
    out.backward(do)
    found = flash_attention_backward(do, q, k, v, out.detach(), lse.detach(), **options)
    assert all(torch.equal(a, b.grad) for a, b in zip(found, inputs, strict=True))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    attention_reference(*wide, **options)[0].backward(do.double())
    for ours, theirs in zip(found, wide, strict=True):
        torch.testing.assert_close(ours, theirs.grad.float(), rtol=1e-5, atol=1e-5)


def test_the_backward_is_deterministic():
    inputs = [t.requires_grad_() for t in qkv(n=4, n_kv=2, s=69, dtype=torch.bfloat16)]
    grads = [
        torch.autograd.grad(flash_attention(*inputs, causal=True, backend="triton").sum(), inputs) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_nothing_of_size_seq_by_seq_is_allocated():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    Largest.numel = max(Largest.numel, t.numel())
            return out

    inputs = [t.requires_grad_() for t in qkv(n=1, s=123)]
    with Largest():
        flash_attention(*inputs, causal=True, backend="triton").sum().backward()
    assert Largest.numel == 123 * 16


@pytest.mark.parametrize(
    ("b", "n", "n_kv", "s", "s_k"),
    [
        (1, 4, 2, 900, 1300),  # chunks of 403, 403 and 94 queries
        (8, 64, 1, 3, 4200),  # one query has more scores than a chunk: chunks of one query
    ],
)
def test_cpu_path_in_several_chunks_of_queries(b, n, n_kv, s, s_k):
    check("torch", qkv(b, n, n_kv, s, s_k), window=8, alibi_slopes=seeded(n).abs())


def test_cpu_path_passes_gradcheck():
    inputs = [t.requires_grad_() for t in qkv(s=5, s_k=7, d=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_attention(q, k, v, causal=True, return_lse=True, window=4), inputs
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(1, 3, 5, 16), "v": torch.ones(1, 3, 5, 16)}, r"q's heads \(4\) must be divisible .* \(3\)"),
        ({"k": torch.ones(1, 2, 5, 8)}, r"k.shape\[-1\] \(8\) must equal q.shape\[-1\] \(16\)"),
        ({"v": torch.ones(1, 2, 6, 16)}, "v.shape"),
        ({"v": torch.ones(1, 2, 5, 16).half()}, "v.dtype"),
        ({"k": torch.ones(1, 2, 5, 16, device="meta")}, "k.device"),
        ({"k": torch.ones(2, 2, 5, 16), "v": torch.ones(2, 2, 5, 16)}, r"k's batch \(2\) must equal q's \(1\)"),
        ({"q": torch.ones(4, 5, 16)}, r"q.dim\(\) \(3\) must be 4"),
        ({"q": torch.ones(1, 4, 16, 5).transpose(2, 3)}, r"q.stride\(-1\) \(5\) must be 1"),
        ({"layout": "nbsd"}, "layout"),
        ({"softmax_scale": 0.0}, r"softmax_scale \(0.0\)"),
        ({"window": 0}, r"window \(0\)"),
        ({"window": 3, "causal": False}, r"window \(3\)"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes.shape \(\(3,\)\) must be \(4,\)"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, "cu_seqlens"),
        (dict.fromkeys("qkv", torch.ones(5, 4, 16)) | {"layout": "tnd"}, "cu_seqlens"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, message):
    arguments: dict[str, Any] = {
        "q": torch.ones(1, 4, 5, 16),
        "k": torch.ones(1, 2, 5, 16),
        "v": torch.ones(1, 2, 5, 16),
    }
    arguments |= {"causal": True}
    with pytest.raises(ValueError, match=message):
        flash_attention(**(arguments | change))


@pytest.mark.parametrize("d", [257, 264])
def test_a_head_dimension_out_of_range_is_named(d):
    x = torch.ones(1, 1, 5, d)
    with pytest.raises(ValueError, match=rf"q.shape\[-1\] \({d}\): head dimensions must be from 1 to 256"):
        flash_attention(x, x, x, causal=True, backend="triton")
