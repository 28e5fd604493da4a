"""Every variant and listed config of the compiled kernels on a CUDA device, against PyTorch in the same precision.

    TRITON_INTERPRET=0 python -m pytest -m gpu tests/kernels/test_gpu.py -n 8 -q --tb=no

Eight processes share one GPU: most of the time goes to compiling. A kernel that breaks its process (an illegal access)
fails its own test; a fresh process takes the others.
"""

import os

import pytest
import torch
import triton
from kernel_checks import seeded
from variant import one_config
from variants import variants

import flagscale_kernels as fk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: start the process with TRITON_INTERPRET=0"
    ),
]
BROKEN = 70  # exit status of a process whose CUDA context is lost


@pytest.fixture(autouse=True)
def fresh_process_after_a_lost_context():
    """End a worker of pytest-xdist whose CUDA context is lost, so that the tests after this one run in a new worker."""
    yield
    if not torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(BROKEN)
        pytest.exit(f"the CUDA context is lost: {error}", returncode=BROKEN)


def limited(variant):
    """The variant with the time after which its process is ended: a kernel may never return. The other tests go on."""
    return pytest.param(variant, marks=pytest.mark.timeout(45 if variant.may_hang else 120, method="thread"))


@pytest.mark.parametrize(
    "variant", [limited(variant) for variant in variants()], ids=lambda variant: variant.name.replace(" ", "-")
)
def test_variant(variant):
    variant.check("cuda")


def test_the_autotuned_choice_is_as_good_as_the_default(monkeypatch, tmp_path):
    """The tuner measures on the caller's own tensors: the result after it equals the chosen config's on its own."""
    monkeypatch.setenv("FLAGSCALE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("FLAGSCALE_KERNELS_AUTOTUNE", raising=False)
    q, k, v = (seeded(1, 8, 2048, 128, dtype=torch.bfloat16, seed=i).cuda() for i in range(3))
    tuned = fk.flash_attention(q, k, v, causal=True)
    assert torch.equal(tuned, fk.flash_attention(q, k, v, causal=True))
    with one_config(None):
        default = fk.flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(tuned, default, atol=2e-2, rtol=2e-2)


@pytest.mark.timeout(60, method="thread")
def test_a_rival_is_chosen_only_where_it_is_right_and_faster(monkeypatch):
    """Whatever is chosen: the call after the comparison gives what the plain kernels give."""
    monkeypatch.setenv("FLAGSCALE_KERNELS_RIVALS", "1")
    q, k, v = (seeded(1, 8, 2048, 128, dtype=torch.bfloat16, seed=i).cuda() for i in range(3))
    chosen = fk.flash_attention(q, k, v, causal=True)
    monkeypatch.setenv("FLAGSCALE_KERNELS_RIVALS", "0")
    plain = fk.flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(chosen, plain, atol=2e-2, rtol=2e-2)


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("ordered", ["0", "1"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_backward_is_deterministic(monkeypatch, ordered, causal):
    monkeypatch.setenv("FLAGSCALE_KERNELS_ORDERED_DQ", ordered)
    q, k, v, do = (seeded(2, 16, 4000, 128, dtype=torch.bfloat16, seed=i).cuda() for i in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    first, *others = (
        torch.autograd.grad(fk.flash_attention(*leaves, causal=causal), leaves, do) for _ in range(4)
    )  # fmt: skip
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("variable", ["FLAGSCALE_KERNELS_RIVALS=always", "FLAGSCALE_KERNELS_ORDERED_DQ=1"])
def test_keys_beyond_the_last_do_not_count_where_their_exponentials_overflow(monkeypatch, variable):
    monkeypatch.setenv(*variable.split("="))
    q, k = torch.full((1, 1, 100, 64), 20.0), torch.full((1, 1, 100, 64), -20.0)  # scores of -3200
    leaves = [t.bfloat16().cuda().requires_grad_() for t in (q, k, seeded(1, 1, 100, 64))]
    out = fk.flash_attention(*leaves, causal=False)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, torch.ones_like(out)))


@pytest.mark.two_gpus
@pytest.mark.parametrize("others_first", [False, True])
def test_kernels_run_on_the_device_of_their_tensors(others_first):
    """Triton launches on the current device. Both are asked for all operators, with the other one current."""
    found = {}
    for device in ("cuda:1", "cuda:0") if others_first else ("cuda:0", "cuda:1"):
        q, k, v = (seeded(1, 4, 300, 64, dtype=torch.bfloat16, seed=i).to(device).requires_grad_() for i in range(3))
        x, weight = (seeded(*shape, seed=5).to(device).requires_grad_() for shape in ((64, 256), (256,)))
        target = torch.arange(64, device=device)
        with torch.cuda.device(1 - q.device.index):
            outs = [
                fk.flash_attention(q, k, v, causal=True),
                fk.flash_attention(q, k, v, causal=True, deterministic=False),
                fk.piecewise_attention(q, k, q, k, v, 100, causal=True),
                fk.rms_norm(x, weight), fk.swiglu(x), fk.cross_entropy(x, target),
            ]  # fmt: skip
            leaves = [q, k, v, x, weight]
            grads = torch.autograd.grad(torch.stack([o.float().sum() for o in outs]).sum(), leaves)
        assert {t.device for t in (*outs, *grads)} == {torch.device(device)}
        found[device] = [t.float().cpu() for t in (*outs, *grads)]
    for one, other in zip(*found.values()):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


def test_a_captured_graph_repeats_the_result():
    """Capturing must not measure, wait for the device or allocate outside of the graph's pool."""
    q, k, v = (seeded(1, 4, 512, 64, dtype=torch.bfloat16, seed=i).cuda() for i in range(3))
    eager = fk.flash_attention(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fk.flash_attention(q, k, v, causal=True)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, eager, atol=1e-2, rtol=1e-2)


def test_long_strided_sequences_do_not_overflow_32_bits():
    """[s, b, n, d] whose last token lies more than 2^31 elements after the first."""
    s, stride = 70000, 32 * 1024
    storage = torch.empty(s * stride, dtype=torch.bfloat16, device="cuda")
    q = storage.as_strided((s, 1, 1, 64), (stride, 64, 64, 1))
    q.copy_(torch.randn(s, 1, 1, 64, device="cuda"))
    packed = q.contiguous()
    out, expected = (fk.flash_attention(t, t, t, causal=True, layout="sbnd", window=256) for t in (q, packed))
    assert torch.equal(out, expected)
