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
    return pytest.param(variant, marks=pytest.mark.timeout(30 if variant.rival else 120, method="thread"))


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


def test_the_backward_is_deterministic():
    q, k, v, do = (seeded(2, 4, 1000, 128, dtype=torch.bfloat16, seed=i).cuda() for i in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    first, second = (
        torch.autograd.grad(fk.flash_attention(*leaves, causal=True), leaves, do) for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second))


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
