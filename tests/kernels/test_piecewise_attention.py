import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, seeded

from flagscale_kernels import flash_attention, piecewise_attention, piecewise_reference


def inputs(b=1, n=2, n_kv=1, s=123, s_k=None, d=16, dtype=torch.float32):
    s_k = s if s_k is None else s_k
    shapes = [(n, s), (n_kv, s_k), (n, s), (n_kv, s_k), (n_kv, s_k)]
    return [seeded(b, heads, length, d, dtype=dtype, seed=i) for i, (heads, length) in enumerate(shapes)]


def check(backend, tensors, threshold, *, causal=True, **options):
    assert_as_good_as_pytorch(
        lambda *t: piecewise_attention(*t, threshold, causal=causal, backend=backend, **options),
        lambda *t: piecewise_reference(*t, threshold, causal=causal, **options),
        tensors,
        [seeded(*tensors[0].shape, seed=9)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("s", "threshold"), [(5, 2), (123, 61)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_as_good_as_pytorch(backend, s, threshold, causal, dtype):
    check(backend, inputs(s=s, dtype=dtype), threshold, causal=causal)


@pytest.mark.parametrize("threshold", [0, 1, 31, 32, 64, 122, 123, 1 << 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds(backend, causal, threshold):
    check(backend, inputs(n=1), threshold, causal=causal)


@pytest.mark.parametrize(("s", "s_k"), [(5, 123), (70, 123), (123, 70)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unequal_lengths_align_at_the_end(backend, causal, s, s_k):
    check(backend, inputs(n=1, s=s, s_k=s_k), 33, causal=causal)


@pytest.mark.parametrize(("n", "n_kv", "d"), [(4, 4, 16), (6, 2, 40), (3, 1, 128)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_queries_and_head_dimensions(backend, n, n_kv, d):
    check(backend, inputs(b=2, n=n, n_kv=n_kv, s=37, d=d), 11, softmax_scale=0.2)


@pytest.mark.soak
@pytest.mark.parametrize("threshold", range(0, 140, 7))
@pytest.mark.parametrize("s", [64, 100])
@pytest.mark.parametrize("s_k", [64, 130])
def test_more_thresholds_and_lengths(threshold, s, s_k):
    for causal in (True, False):
        check("triton", inputs(s=s, s_k=s_k), threshold, causal=causal)


@pytest.mark.parametrize("layout", ["sbnd", "bsnd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_are_read_through_strides(backend, layout):
    tensors = inputs(b=2, n=4, n_kv=2, s=37)
    order = ["bnsd".index(letter) for letter in layout]
    leaves = [t.clone().requires_grad_() for t in tensors]
    moved = [t.permute(*order).contiguous().requires_grad_() for t in tensors]
    expected = piecewise_attention(*leaves, 11, causal=True, backend="torch")
    out = piecewise_attention(*moved, 11, causal=True, layout=layout, backend=backend)
    torch.testing.assert_close(out, expected.permute(*order))
    grad = seeded(*expected.shape, seed=9)
    wanted = torch.autograd.grad(expected, leaves, grad)
    got = torch.autograd.grad(out, moved, grad.permute(*order))
    for mine, exact in zip(got, wanted):
        torch.testing.assert_close(mine, exact.permute(*order))


@pytest.mark.parametrize("threshold", [0, 17, 400])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_equal_pairs_it_is_flash_attention(backend, threshold):
    q, k, _, _, v = inputs(s=70)
    got = piecewise_attention(q, k, q, k, v, threshold, causal=True, backend=backend)
    torch.testing.assert_close(got, flash_attention(q, k, v, causal=True, backend=backend))


def test_the_backward_is_deterministic():
    tensors = [t.requires_grad_() for t in inputs(n=4, n_kv=2, s=69, dtype=torch.bfloat16)]

    def gradients():
        return torch.autograd.grad(piecewise_attention(*tensors, 33, causal=True, backend="triton").sum(), tensors)

    grads = [gradients() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_cpu_path_passes_gradcheck():
    tensors = [t.requires_grad_() for t in inputs(s=5, s_k=7, d=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: piecewise_attention(*t, 3, causal=True), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": -1}, r"threshold \(-1\) must be an integer of at least 0"),
        ({"threshold": 1.5}, r"threshold \(1.5\)"),
        ({"layout": "tnd"}, "layout"),
        ({"q2": torch.ones(1, 4, 6, 16)}, "q2.shape"),
        ({"k2": torch.ones(1, 2, 6, 16)}, r"v.shape \(\(1, 2, 5, 16\)\) must equal k2.shape \(\(1, 2, 6, 16\)\)"),
        ({"k1": torch.ones(1, 3, 5, 16), "v": torch.ones(1, 3, 5, 16)}, r"q1's heads \(4\) must be divisible by k1's"),
        ({"q2": torch.ones(1, 4, 5, 16).half()}, "dtype"),
        ({"q1": torch.ones(1, 4, 5, 8)}, r"k1.shape\[-1\] \(16\) must equal q1.shape\[-1\] \(8\)"),
        ({"softmax_scale": -1.0}, "softmax_scale"),
        ({"k2": torch.ones(1, 2, 16, 5).transpose(2, 3)}, r"k2.stride\(-1\)"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    q, k = torch.ones(1, 4, 5, 16), torch.ones(1, 2, 5, 16)
    with pytest.raises(ValueError, match=message):
        piecewise_attention(**({"q1": q, "k1": k, "q2": q, "k2": k, "v": k, "threshold": 2, "causal": True} | change))
