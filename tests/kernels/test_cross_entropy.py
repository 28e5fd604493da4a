import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, relative_rms, seeded

from flagscale_kernels import (
    cross_entropy,
    cross_entropy_reference,
    fused_linear_cross_entropy,
    linear_cross_entropy_reference,
)
from flagscale_kernels._checks import say_once
from flagscale_kernels.cross_entropy import CPU_CHUNK

OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.2, "z_loss": 1e-3}]


def targets(*shape, vocab, ignored=1):
    target = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(7))
    target.view(-1)[:ignored] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 123), (3, 2, 5000)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient_are_as_good_as_pytorch(backend, shape, options, dtype):
    target = targets(*shape[:-1], vocab=shape[-1])
    assert_as_good_as_pytorch(
        lambda x: cross_entropy(x * 1, target, reduction="none", inplace_backward=True, backend=backend, **options),
        lambda x: cross_entropy_reference(x, target, **options),
        [seeded(*shape, dtype=dtype, scale=3.0)],
        [seeded(*shape[:-1], seed=1)],
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_and_smoothing_mean_what_they_mean_in_pytorch(backend, label_smoothing, reduction):
    x, target = seeded(7, 123).requires_grad_(), targets(7, vocab=123, ignored=2)
    loss = cross_entropy(x, target, label_smoothing=label_smoothing, reduction=reduction, backend=backend)
    expected = torch.nn.functional.cross_entropy(x, target, label_smoothing=label_smoothing, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(t.sum(), x)[0] for t in (loss, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_written_over_the_logits_where_the_caller_says_so(backend):
    leaf, target = seeded(5, 123).requires_grad_(), targets(5, vocab=123)
    logits = leaf * 1
    address, copy = logits.data_ptr(), logits.detach().clone()
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss.backward()
    assert seen == [address]
    assert not torch.equal(logits, copy)
    torch.testing.assert_close(logits, leaf.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_over_written_logits_raises_and_without_inplace_works(backend):
    leaf, target = seeded(5, 123).requires_grad_(), targets(5, vocab=123)
    loss = cross_entropy(leaf * 1, target, inplace_backward=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = cross_entropy(leaf * 1, target, backend=backend)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "logits_of",
    [
        lambda leaf: leaf,
        lambda leaf: leaf.view(-1, 123),
        lambda leaf: (leaf * 1)[1:],  # another part of the tensor may be read afterwards
        lambda leaf: (leaf * 1).expand(4, -1, -1),  # a row's gradient would be written several times
        lambda leaf: (leaf * 1).transpose(0, 1),
    ],
)
def test_logits_whose_memory_is_not_their_own_keep_their_values_which_is_said(backend, logits_of):
    leaf = seeded(1, 5, 123).requires_grad_()
    logits = logits_of(leaf)
    target, before = targets(*logits.shape[:-1], vocab=123), leaf.detach().clone()
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="inplace_backward needs logits that are dense, no leaf and no view"):
        loss = cross_entropy(logits, target, reduction="sum", inplace_backward=True, backend=backend)
    (got,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(leaf, before)
    expected = cross_entropy_reference(logits_of(leaf), target).sum()
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_that_are_a_slice_and_losses_whose_gradient_is_one(backend):
    """The kernels read element i of a token's numbers, whatever the stride."""
    target = torch.stack([targets(6, vocab=123), targets(6, vocab=123).flip(0)], -1)[:, 0]
    assert target.stride() == (2,)
    hidden, weight = seeded(6, 16), seeded(123, 16, seed=1)

    def gradients(loss, *leaves):
        other = torch.zeros_like(loss)
        (torch.stack([loss, other], -1) * seeded(6, 2, seed=2)).sum().backward()  # a gradient of stride 2
        return [loss, *(leaf.grad for leaf in leaves)]

    x, y = ((hidden @ weight.t()).requires_grad_() for _ in range(2))
    got = gradients(cross_entropy(x, target, reduction="none", backend=backend), x)
    torch.testing.assert_close(got, gradients(cross_entropy_reference(y, target), y))
    ours, theirs = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    loss = fused_linear_cross_entropy(*ours, target, chunk_tokens=4, reduction="none", backend=backend)
    torch.testing.assert_close(
        gradients(loss, *ours), gradients(linear_cross_entropy_reference(*theirs, target), *theirs)
    )


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_the_product_is_that_of_torchs_linear_and_the_weights_gradient_is_fp32(
    hidden_dtype, chunk_tokens
):
    x, w = seeded(6, 16, dtype=hidden_dtype).requires_grad_(), seeded(20, 16, seed=1).requires_grad_()
    target = targets(6, vocab=20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_cross_entropy(x, w, target, chunk_tokens=chunk_tokens)
        expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), target)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, [x, w])
    for mine, exact in zip(got, torch.autograd.grad(expected, [x, w]), strict=True):
        assert mine.dtype == exact.dtype
        torch.testing.assert_close(mine, exact, rtol=0.02, atol=2e-3)
    with torch.autocast("cpu", torch.bfloat16):  # with a main_grad, as megatron-core keeps one
        weight: Any = torch.nn.Parameter(w.detach().clone())
        weight.main_grad = torch.zeros(20, 16)
        fused_linear_cross_entropy(x, weight, target, chunk_tokens=chunk_tokens, accumulate_main_grad=True).backward()
    torch.testing.assert_close(weight.main_grad, got[1])


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_have_zero_gradient_even_where_their_logits_are_not_finite(backend):
    x = seeded(3, 16)
    x[0], x[1, :8] = torch.nan, -torch.inf
    x.requires_grad_()
    loss = cross_entropy(x, torch.tensor([-100, 9, 3]), reduction="none", backend=backend)
    loss.sum().backward()
    assert x.grad[0].eq(0).all()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(loss[1:], cross_entropy_reference(x[1:], torch.tensor([9, 3])))


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_as_large_as_bfloat16_goes_do_not_overflow(backend):
    x = torch.tensor([[3e38, 1.0, 0.0], [-3e38, -3e38, -3e38], [500.0, 501.0, 400.0]])
    loss = cross_entropy(x, torch.tensor([0, 1, 2]), reduction="none", backend=backend)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, torch.tensor([0, 1, 2]), reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits_and_int32_targets(backend):
    padded = seeded(5, 2, 130)
    x, target = padded[..., :123], targets(5, 2, vocab=123)
    loss = cross_entropy(x, target.int(), backend=backend)
    torch.testing.assert_close(loss, cross_entropy(x.contiguous(), target))


def test_cpu_path_in_several_chunks_of_rows():
    vocab = CPU_CHUNK // 3  # chunks of 3, 3 and 1 rows
    target = targets(7, vocab=vocab)
    assert_as_good_as_pytorch(
        lambda x: cross_entropy(x * 1, target, label_smoothing=0.1, reduction="none"),
        lambda x: cross_entropy_reference(x, target, label_smoothing=0.1),
        [seeded(7, vocab)],
        [seeded(7, seed=1)],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    x = torch.empty(0, 16, requires_grad=True)
    loss = cross_entropy(x, torch.empty(0, dtype=torch.int64), reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0, 16)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_linear_is_as_good_as_pytorch(backend, dtype, chunk_tokens):
    target = targets(5, 2, vocab=123)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}
    assert_as_good_as_pytorch(
        lambda x, w: fused_linear_cross_entropy(
            x, w, target, chunk_tokens=chunk_tokens, reduction="none", backend=backend, **options
        ),
        lambda x, w: linear_cross_entropy_reference(x, w, target, **options),
        [seeded(5, 2, 16, dtype=dtype), seeded(123, 16, dtype=dtype, seed=1)],
        [seeded(5, 2, seed=2)],
    )


def test_fused_linear_never_holds_the_full_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    Largest.numel = max(Largest.numel, t.numel())
            return out

    x, w = seeded(64, 8).requires_grad_(), seeded(100, 8, seed=1).requires_grad_()
    with Largest():
        fused_linear_cross_entropy(x, w, targets(64, vocab=100), chunk_tokens=16).backward()
    assert Largest.numel == 16 * 100


def test_fused_linear_adds_to_main_grad_as_megatron_core_does():
    x, target = seeded(6, 8), targets(6, vocab=20)
    plain = seeded(20, 8, seed=1).requires_grad_()
    fused_linear_cross_entropy(x, plain, target).backward()
    weight: Any = torch.nn.Parameter(plain.detach().clone())
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.ones(20, 8), False, True
    fused_linear_cross_entropy(x, weight, target, chunk_tokens=4, accumulate_main_grad=True).backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad.eq(0).all()
    torch.testing.assert_close(weight.main_grad, 1 + plain.grad)


def test_a_long_sum_of_weight_gradients_is_kept_in_float32():
    x, w = seeded(512, 8, dtype=torch.bfloat16), seeded(20, 8, dtype=torch.bfloat16, seed=1)
    target = targets(512, vocab=20)
    leaf, exact = w.clone().requires_grad_(), w.double().requires_grad_()
    fused_linear_cross_entropy(x, leaf, target, chunk_tokens=4).backward()
    linear_cross_entropy_reference(x.double(), exact, target).sum().div(511).backward()
    assert relative_rms(leaf.grad, exact.grad) < 0.01


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_of_the_weight_have_no_part(backend, dtype, chunk_tokens):
    x, weight = seeded(5, 2, 16, dtype=dtype), seeded(256, 16, dtype=dtype, seed=1)
    weight[250:] = torch.nan  # shows if anything reads them
    target = targets(5, 2, vocab=250)
    options: dict[str, Any] = {"vocab_size": 250, "label_smoothing": 0.1, "z_loss": 1e-3}
    target[1, 0] = 249
    gradients = []

    def ours(x, w):
        w.register_hook(gradients.append)
        return fused_linear_cross_entropy(
            x, w, target, chunk_tokens=chunk_tokens, reduction="none", backend=backend, **options
        )

    assert_as_good_as_pytorch(
        ours, lambda x, w: linear_cross_entropy_reference(x, w, target, **options), [x, weight], [seeded(5, 2, seed=2)]
    )
    [gradient] = gradients
    assert torch.equal(gradient[250:], torch.zeros_like(gradient[250:]))


@pytest.mark.parametrize("accumulate_main_grad", [False, True])
def test_a_padded_weight_that_is_also_the_embedding_gets_both_gradients(accumulate_main_grad):
    tokens, target = torch.tensor([3, 19, 3, 0, 17, 5]), targets(6, vocab=20)
    expected = seeded(24, 8, seed=1).requires_grad_()
    linear_cross_entropy_reference(expected[tokens], expected, target, vocab_size=20).sum().div(5).backward()
    weight: Any = torch.nn.Parameter(expected.detach().clone())
    # As megatron-core's shared embedding: its hook adds .grad to main_grad although the output layer has added its own.
    weight.main_grad, weight.zero_out_wgrad = torch.ones(24, 8), True
    fused_linear_cross_entropy(
        weight[tokens], weight, target, vocab_size=20, chunk_tokens=4, accumulate_main_grad=accumulate_main_grad
    ).backward()
    torch.testing.assert_close(weight.main_grad + weight.grad, 1 + expected.grad)
    assert torch.equal(weight.main_grad[20:], torch.ones(4, 8))
    assert weight.grad[20:].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_linear_of_no_tokens(backend):
    x, weight = torch.empty(0, 8, requires_grad=True), seeded(20, 8).requires_grad_()
    target = torch.empty(0, dtype=torch.int64)
    loss = fused_linear_cross_entropy(x, weight, target, vocab_size=18, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0
    assert weight.grad.eq(0).all()


def test_vocabulary_and_sequence_parallel_equal_one_process(tmp_path):
    worker = Path(__file__).with_name("tensor_parallel_worker.py")
    kernels = Path(__file__).parents[2] / "kernels"
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(kernels)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), f"file://{tmp_path}/rendezvous"],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n".join(errors)


def test_cpu_path_passes_gradcheck():
    x, w = seeded(3, 5, dtype=torch.float64).requires_grad_(), seeded(7, 5, dtype=torch.float64, seed=1)
    target = torch.tensor([2, -100, 6])
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1}
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, target % 5, **options), [x])
    assert torch.autograd.gradcheck(
        lambda x, w: fused_linear_cross_entropy(x, w, target, chunk_tokens=2, **options), [x, w.requires_grad_()]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target.shape \(\(4,\)\).* \(5,\)"),
        ({"target": torch.zeros(5)}, "target.dtype"),
        ({"target": torch.full((5,), 16)}, "target holds 16 .. 16, outside the vocabulary 0 .. 15"),
        ({"target": torch.zeros(5, dtype=torch.int64, device="meta")}, "target.device"),
        ({"logits": torch.zeros(5, 16, dtype=torch.int64)}, "logits.dtype"),
        ({"label_smoothing": 1.0}, r"label_smoothing \(1.0\)"),
        ({"z_loss": -1.0}, r"z_loss \(-1.0\)"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    arguments = {"logits": torch.zeros(5, 16), "target": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(16, 7)}, r"weight.shape\[1\] \(7\) must equal hidden.shape\[-1\] \(8\)"),
        ({"weight": torch.zeros(16, 8).half()}, "weight.dtype"),
        ({"chunk_tokens": 0}, r"chunk_tokens \(0\)"),
        ({"vocab_size": 0}, r"vocab_size \(0\) must be from 1 to the weight's 16 rows"),
        ({"vocab_size": 17}, r"vocab_size \(17\) must be from 1 to the weight's 16 rows"),
        ({"vocab_size": 14, "target": torch.full((5,), 14)}, "target holds 14 .. 14, outside the vocabulary 0 .. 13"),
        ({"sequence_parallel": True}, "sequence_parallel"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "target.shape"),
    ],
)
def test_bad_input_to_fused_linear_names_the_argument(change, message):
    arguments = {"hidden": torch.zeros(5, 8), "weight": torch.zeros(16, 8), "target": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**(arguments | change))
