"""The calls of other packages' users: one import changes, and the numbers are those of PyTorch."""

from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch
from kernel_checks import seeded

from flagscale_kernels import attention_reference, piecewise_reference, rms_norm_reference, rope_reference, rope_tables
from flagscale_kernels import rope_frequencies as frequencies
from flagscale_kernels.compat import flag_attn, flash_attn, liger, torch_functional

F = torch.nn.functional
Q1, K1, Q2, K2, V = (seeded(1, 4, 20, 16, seed=i) for i in range(5))
X, W, LABELS = seeded(3, 16), seeded(16, seed=1), torch.tensor([1, 2, 3])
WIDE = seeded(1, 2, 8, 192), seeded(1, 2, 8, 192, seed=1), seeded(1, 2, 8, 128, seed=2)
HUGE = [seeded(1, 2, 8, 512, seed=i) for i in range(3)]


def attention(q=Q1, k=K1, v=V, causal=False, **options):
    return attention_reference(q, k, v, causal=causal, **options)[0]


def piecewise(causal=False, **options):
    return piecewise_reference(Q1, K1, Q2, K2, V, 8, causal=causal, **options)


def of_flash_attn(*tensors, **options):
    """flash-attn has [b, s, n, d]."""
    return flash_attn.flash_attn_func(*(t.transpose(1, 2) for t in tensors), **options).transpose(1, 2)


def packed(**options):
    ends = torch.tensor([0, 20], dtype=torch.int32)
    q, k, v = (t[0].transpose(0, 1) for t in (Q1, K1, V))
    return flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, 20, 20, **options).transpose(0, 1)[None]


def capped(q, k, v, cap):
    s = cap * (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 / cap).tanh()
    return s.softmax(-1) @ v


CALLS = {
    "flag_attn piecewise": (
        lambda: flag_attn.piecewise_attention(Q1, K1, Q2, K2, V, 8, causal=True),
        lambda: piecewise(True),
    ),
    "flag_attn piecewise, not causal by default": (
        lambda: flag_attn.piecewise_attention(Q1, K1, Q2, K2, V, 8),
        lambda: piecewise(False),
    ),
    "flag_attn piecewise by keywords": (
        lambda: flag_attn.piecewise_attention(Q1, K1, Q2, K2, V, dist_threshold=8, causal=True, sm_scale=0.2),
        lambda: piecewise(True, softmax_scale=0.2),
    ),
    "flag_attn piecewise, a NumPy threshold": (
        lambda: flag_attn.piecewise_attention(Q1, K1, Q2, K2, V, cast(Any, numpy.int64(8))),
        lambda: piecewise(False),
    ),
    "flag_attn flash": (
        lambda: flag_attn.flash_attention(Q1, K1, V, causal=True, sm_scale=0.2),
        lambda: attention(causal=True, softmax_scale=0.2),
    ),
    "flag_attn flash by place": (lambda: flag_attn.flash_attention(Q1, K1, V, True), lambda: attention(causal=True)),
    "flag_attn log normalizer": (
        lambda: flag_attn.flash_attention(Q1, K1, V, return_log_normalizer=True)[1],
        lambda: attention_reference(Q1, K1, V, causal=False)[1],
    ),
    "flash_attn, not causal by default": (lambda: of_flash_attn(Q1, K1, V), attention),
    "flash_attn causal": (lambda: of_flash_attn(Q1, K1, V, causal=True), lambda: attention(causal=True)),
    "flash_attn window": (
        lambda: of_flash_attn(Q1, K1, V, window_size=(8, 0)),
        lambda: attention(window=(8, 0)),
    ),
    "flash_attn softcap": (lambda: of_flash_attn(Q1, K1, V, softcap=3.0), lambda: capped(Q1, K1, V, 3.0)),
    "flash_attn LSE": (
        lambda: flash_attn.flash_attn_func(Q1, K1, V, return_attn_probs=True)[1],
        lambda: attention_reference(*(t.transpose(1, 2) for t in (Q1, K1, V)), causal=False)[1],
    ),
    "flash_attn varlen": (lambda: packed(causal=True), lambda: attention(causal=True)),
    "flash_attn, values narrower than keys": (lambda: of_flash_attn(*WIDE), lambda: attention(*WIDE)),
    "flash_attn, head dimension 512": (lambda: of_flash_attn(*HUGE), lambda: attention(*HUGE)),
    "sdpa": (
        lambda: torch_functional.scaled_dot_product_attention(Q1, K1, V, is_causal=True),
        lambda: F.scaled_dot_product_attention(Q1, K1, V, is_causal=True),
    ),
    "torch cross_entropy": (
        lambda: torch_functional.cross_entropy(X, LABELS, ignore_index=1, reduction="sum", label_smoothing=0.1),
        lambda: F.cross_entropy(X, LABELS, ignore_index=1, reduction="sum", label_smoothing=0.1),
    ),
    "liger_rms_norm": (
        lambda: liger.liger_rms_norm(X, W, 1e-6, 0.0, "llama"),
        lambda: rms_norm_reference(X, W, 1e-6),
    ),
    "liger_rms_norm of Gemma": (
        lambda: liger.liger_rms_norm(X, W, 1e-6, 1.0, "gemma"),
        lambda: F.rms_norm(X, (16,), W + 1, 1e-6),
    ),
    "liger_fused_add_rms_norm": (
        lambda: torch.stack(liger.liger_fused_add_rms_norm(X, X, W, 1e-6)),
        lambda: torch.stack([F.rms_norm(2 * X, (16,), W, 1e-6), 2 * X]),
    ),
    "liger_layer_norm": (
        lambda: liger.liger_layer_norm(X, W, W, 1e-6),
        lambda: F.layer_norm(X, (16,), W, W, 1e-6),
    ),
    "liger_swiglu": (lambda: liger.liger_swiglu(X, X), lambda: F.silu(X) * X),
    "liger_geglu": (lambda: liger.liger_geglu(X, X), lambda: F.gelu(X, approximate="tanh") * X),
    "liger_rope": (
        lambda: torch.stack(liger.liger_rope(Q1, K1, *liger_tables())),
        lambda: torch.stack([rope_reference(t, *tables()) for t in (Q1, K1)]),
    ),
    "liger_cross_entropy": (
        lambda: liger.liger_cross_entropy(X, LABELS, None, None, -100),
        lambda: F.cross_entropy(X, LABELS),
    ),
    "liger_cross_entropy with a z-loss": (
        lambda: liger.liger_cross_entropy(X, LABELS, lse_square_scale=1e-2),
        lambda: F.cross_entropy(X, LABELS) + 1e-2 * X.logsumexp(-1).square().mean(),
    ),
    "liger_fused_linear_cross_entropy": (
        lambda: liger.liger_fused_linear_cross_entropy(X, X, torch.tensor([0, 1, 2])),
        lambda: F.cross_entropy(X @ X.t(), torch.tensor([0, 1, 2])),
    ),
}


def tables():
    return rope_tables(frequencies(16)[0], 20)


def liger_tables():
    cos, sin = (torch.cat((t, t), -1)[None] for t in tables())
    return cos, sin


@pytest.mark.parametrize("name", CALLS)
def test_a_foreign_call_gives_pytorchs_numbers(name):
    ours, theirs = CALLS[name]
    torch.testing.assert_close(ours(), theirs())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash_attn.flash_attn_func(Q1, K1, V, dropout_p=0.1), r"dropout_p \(0.1\) must be 0.0"),
        (lambda: flag_attn.flash_attention(Q1, K1, V, dropout_p=0.1), r"dropout_p \(0.1\) must be 0.0"),
        (lambda: flag_attn.flash_attention(Q1, K1, V, return_total_attention=True), "return_total_attention"),
        (lambda: torch_functional.scaled_dot_product_attention(Q1, K1, V, attn_mask=torch.ones(20, 20)), "attn_mask"),
        (lambda: torch_functional.scaled_dot_product_attention(Q1[:, :, 1:], K1, V, is_causal=True), "as many queries"),
        (lambda: torch_functional.cross_entropy(X, X), "class numbers"),
        (lambda: torch_functional.cross_entropy(seeded(3, 4, 5), LABELS), "class numbers"),
        (lambda: liger.liger_cross_entropy(X, LABELS, weight=W), "weight"),
        (lambda: liger.liger_cross_entropy(X, LABELS, softcap=30.0), r"softcap \(30.0\) must be None"),
        (lambda: liger.liger_fused_linear_cross_entropy(X, X, LABELS, bias=W), "bias"),
        (lambda: liger.liger_rms_norm(X, W, 1e-6, casting_mode="none"), r"casting_mode \('none'\)"),
    ],
)
def test_what_the_kernels_lack_is_refused_in_one_line(call, message):
    with pytest.raises(NotImplementedError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_every_name_of_the_package_is_called_here():
    import flagscale_kernels.compat as compat

    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in compat.__all__ if f".{name}(" not in source] == []
