"""The compiled kernels' numbers on a CUDA device: TRITON_INTERPRET=0 pytest -m gpu tests/kernels/test_gpu.py"""

import pytest
import torch
import triton
from kernel_checks import assert_as_good_as_pytorch, seeded

import flagscale_kernels as fk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: start the process with TRITON_INTERPRET=0"
    ),
]
DTYPES = [torch.float16, torch.bfloat16]


def on_gpu(*shapes, dtype):
    return [seeded(*shape, dtype=dtype, seed=i).cuda() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1000, 128), (333, 4096), (65, 8192), (7, 20000)])
def test_rms_norm(shape, dtype):
    inputs = on_gpu(shape, shape[-1:], dtype=dtype)
    dy = seeded(*shape, seed=9).cuda()
    assert_as_good_as_pytorch(fk.rms_norm, fk.rms_norm_reference, inputs, [dy])
    inputs = on_gpu(shape, shape, shape[-1:], dtype=dtype)
    assert_as_good_as_pytorch(
        fk.rms_norm_residual, lambda x, r, w: (fk.rms_norm_reference(x + r, w), x + r), inputs, [dy, dy * 2]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("r", [128, 64])
def test_rope(interleaved, r, dtype):
    cos, sin = (t.cuda() for t in fk.rope_tables(fk.rope_frequencies(r)[0], 333))
    q, k = on_gpu((333, 2, 8, 128), (333, 2, 1, 128), dtype=dtype)

    def reference(q, k):
        rows = cos[:, None, None], sin[:, None, None]
        return tuple(fk.rope_reference(t, *rows, interleaved=interleaved) for t in (q, k))

    assert_as_good_as_pytorch(
        lambda q, k: fk.rope(q, k, cos, sin, interleaved=interleaved, inplace_backward=True),
        reference,
        [q, k],
        [torch.randn_like(t, dtype=torch.float32) for t in (q, k)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    x, weight = *on_gpu((333, 2 * 5504), dtype=dtype), seeded(333, seed=1).cuda()
    dy = seeded(333, 5504, seed=2).cuda()
    assert_as_good_as_pytorch(fk.swiglu, fk.swiglu_reference, [x], [dy])
    assert_as_good_as_pytorch(
        lambda x, w: fk.swiglu(x, weight=w), lambda x, w: fk.swiglu_reference(x, weight=w), [x, weight], [dy]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_permutation(dtype):
    chosen = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:8] for i in range(333)])
    token, inverse = fk.token_order(chosen.cuda())
    (x,), (y,) = on_gpu((333, 4096), dtype=dtype), on_gpu((333 * 8, 4096), dtype=dtype)
    for function, reference, given, dy in (
        (fk.spread_tokens, fk.spread_reference, x, seeded(333 * 8, 4096, seed=2)),
        (fk.collect_tokens, fk.collect_reference, y, seeded(333, 4096, seed=3)),
    ):
        assert_as_good_as_pytorch(
            lambda t, f=function: f(t, token, inverse),
            lambda t, f=reference: f(t, token, inverse),
            [given],
            [dy.cuda()],
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    [x] = on_gpu((333, 32003), dtype=dtype)
    target = torch.randint(32003, (333,), generator=torch.Generator().manual_seed(0)).cuda()
    target[0] = -100
    options = {"label_smoothing": 0.1, "z_loss": 1e-4}
    assert_as_good_as_pytorch(
        lambda x: fk.cross_entropy(x * 1, target, reduction="none", **options),
        lambda x: fk.cross_entropy_reference(x, target, **options),
        [x],
        [seeded(333, seed=1).cuda()],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize(
    ("s", "s_k", "options"),
    [
        (1000, 1000, {}),
        (1000, 1000, {"causal": False}),
        (333, 1000, {}),
        (1000, 1000, {"window": 200}),
        (1000, 1000, {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)}),
    ],
)
def test_flash_attention(s, s_k, options, d, dtype):
    inputs = on_gpu((2, 4, s, d), (2, 2, s_k, d), (2, 2, s_k, d), dtype=dtype)
    if "alibi_slopes" in options:
        options = {"alibi_slopes": torch.tensor(options["alibi_slopes"], device="cuda")}
    assert_as_good_as_pytorch(
        lambda q, k, v: fk.flash_attention(q, k, v, return_lse=True, **{"causal": True} | options),
        lambda q, k, v: fk.attention_reference(q, k, v, **{"causal": True} | options),
        inputs,
        [seeded(2, 4, s, d, seed=8).cuda(), seeded(2, 4, s, seed=9).cuda()],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("threshold", [0, 1, 333, 500, 5000])
def test_piecewise_attention(threshold, d, dtype):
    q, k = (2, 4, 1000, d), (2, 2, 1000, d)
    assert_as_good_as_pytorch(
        lambda *t: fk.piecewise_attention(*t, threshold, causal=True),
        lambda *t: fk.piecewise_reference(*t, threshold, causal=True),
        on_gpu(q, k, q, k, k, dtype=dtype),
        [seeded(*q, seed=9).cuda()],
    )


def test_long_strided_sequences_do_not_overflow_32_bits():
    """[s, b, n, d] whose last token lies more than 2^31 elements after the first."""
    s, stride = 70000, 32 * 1024
    storage = torch.empty(s * stride, dtype=torch.bfloat16, device="cuda")
    q = storage.as_strided((s, 1, 1, 64), (stride, 64, 64, 1))
    q.copy_(torch.randn(s, 1, 1, 64, device="cuda"))
    packed = q.contiguous()
    out, expected = (fk.flash_attention(t, t, t, causal=True, layout="sbnd", window=256) for t in (q, packed))
    assert torch.equal(out, expected)
