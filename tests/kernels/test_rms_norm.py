from typing import Any

import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, seeded

from flagscale_kernels import rms_norm, rms_norm_reference, rms_norm_residual

SHAPES = [(5, 123), (3, 7, 128), (2, 3, 5, 16), (123, 5)]


def residual_reference(x, residual, weight, eps, rounding):
    z = x + residual
    return rms_norm_reference(z, weight, eps, rounding), z


@pytest.mark.parametrize("rounding", ["hf", "megatron"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_as_good_as_pytorch(backend, shape, dtype, rounding):
    x, dy = seeded(*shape, dtype=dtype), seeded(*shape, seed=1)
    weight = 1 + 0.1 * seeded(shape[-1], dtype=dtype, seed=2)
    assert_as_good_as_pytorch(
        lambda x, w: rms_norm(x, w, 1e-5, rounding=rounding, backend=backend),
        lambda x, w: rms_norm_reference(x, w, 1e-5, rounding),
        [x, weight],
        [dy],
    )


@pytest.mark.parametrize("rounding", ["hf", "megatron"])
@pytest.mark.parametrize("h", [8193, 33000])  # the backward's rows do not fit in one tile, nor do the forward's
def test_rows_that_are_read_in_parts(h, rounding):
    inputs = [seeded(5, h, dtype=torch.bfloat16, seed=i) for i in range(2)] + [1 + 0.1 * seeded(h, seed=2).bfloat16()]
    assert_as_good_as_pytorch(
        lambda x, r, w: rms_norm_residual(x, r, w, 1e-6, rounding=rounding, backend="triton"),
        lambda x, r, w: residual_reference(x, r, w, 1e-6, rounding),
        inputs,
        [seeded(5, h, seed=3), seeded(5, h, seed=4)],
    )


@pytest.mark.parametrize("rounding", ["hf", "megatron"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_the_distance_from_one(backend, dtype, rounding):
    x, weight, dy = seeded(5, 123, dtype=dtype), 0.01 * seeded(123, dtype=dtype, seed=2), seeded(5, 123, seed=1)
    options: dict[str, Any] = {"rounding": rounding, "weight_offset": 1.0}
    assert_as_good_as_pytorch(
        lambda x, w: rms_norm(x, w, backend=backend, **options),
        lambda x, w: rms_norm_reference(x, w, **options),
        [x, weight],
        [dy],
    )
    y, z = rms_norm_residual(x, x * 2, weight, backend=backend, **options)
    torch.testing.assert_close(y, rms_norm_reference(z, weight, **options))


def test_it_is_the_norm_of_gemma():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    theirs = GemmaRMSNorm(123).bfloat16()
    torch.nn.init.normal_(theirs.weight, std=0.1)
    x = seeded(5, 123, dtype=torch.bfloat16)
    ours = rms_norm(x, theirs.weight, theirs.eps, rounding="megatron", weight_offset=1.0)
    torch.testing.assert_close(ours, theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_residual_output_and_gradients_are_as_good_as_pytorch(backend, dtype):
    x, residual = seeded(5, 3, 123, dtype=dtype), seeded(5, 3, 123, dtype=dtype, seed=1)
    grads = [seeded(5, 3, 123, seed=2), seeded(5, 3, 123, seed=3)]
    assert_as_good_as_pytorch(
        lambda x, r, w: rms_norm_residual(x, r, w, backend=backend),
        lambda x, r, w: residual_reference(x, r, w, 1e-6, "hf"),
        [x, residual, seeded(123, dtype=dtype, seed=4)],
        grads,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weight_with_bfloat16_input(backend):
    x, weight = seeded(5, 123, dtype=torch.bfloat16), seeded(123, seed=1)
    y = rms_norm(x, weight, rounding="megatron", backend=backend)
    assert y.dtype == torch.bfloat16
    expected = rms_norm_reference(x, weight, rounding="megatron")
    torch.testing.assert_close(y, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_slice_of_a_packed_projection_need_no_copy(backend):
    packed = seeded(5, 2, 3, 4 * 16)  # [s, b, groups, (heads + 2) * d]
    x = packed[..., 16:32]
    weight = seeded(16, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, backend=backend), rms_norm_reference(x, weight))


def test_the_two_roundings_differ_in_bfloat16():
    x, weight = seeded(5, 123, dtype=torch.bfloat16), seeded(123, dtype=torch.bfloat16, seed=1)
    hf, megatron = (rms_norm(x, weight, rounding=r, backend="triton") for r in ("hf", "megatron"))
    assert not torch.equal(hf, megatron)
    assert torch.equal(hf, rms_norm_reference(x, weight, rounding="hf"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unread_residual_stream_or_norm_has_a_zero_gradient(backend):
    x, residual, weight = (t.requires_grad_() for t in (seeded(5, 16), seeded(5, 16, seed=1), seeded(16, seed=2)))
    y, z = rms_norm_residual(x, residual, weight, backend=backend)
    (dx,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    torch.testing.assert_close(dx, torch.ones_like(dx))
    (dx,) = torch.autograd.grad(y.sum(), x)
    leaf = (x + residual).detach().requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm_reference(leaf, weight).sum(), leaf)
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_input(backend):
    x = torch.empty(0, 16, requires_grad=True)
    weight = torch.ones(16, requires_grad=True)
    y = rms_norm(x, weight, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert weight.grad.eq(0).all()


def test_cpu_path_passes_gradcheck():
    x, r = seeded(3, 7, dtype=torch.float64), seeded(3, 7, dtype=torch.float64, seed=1)
    w = seeded(7, dtype=torch.float64, seed=2)
    inputs = [t.requires_grad_() for t in (x, r, w)]
    assert torch.autograd.gradcheck(lambda x, r, w: rms_norm_residual(x, r, w), inputs)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, weight_offset=1.0), inputs[::2])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": torch.ones(15)}, r"weight.shape \(\(15,\)\) must equal x.shape\[-1:\] \(\(16,\)\)"),
        ({"x": torch.ones(5, 16, dtype=torch.int32)}, "x.dtype"),
        ({"x": torch.ones(16, 5).t()}, r"x.stride\(-1\) \(5\) must be 1"),
        ({"weight": torch.ones(16, device="meta")}, "weight.device"),
        ({"rounding": "up"}, "rounding"),
        ({"backend": "numpy"}, "backend"),
        ({"residual": torch.ones(5, 17)}, "residual.shape"),
        ({"residual": torch.ones(5, 16).half()}, "residual.dtype"),
    ],
)
def test_bad_input_names_the_argument(kwargs, message):
    arguments = {"x": torch.ones(5, 16), "weight": torch.ones(16)} | kwargs
    with pytest.raises(ValueError, match=message):
        (rms_norm_residual if "residual" in kwargs else rms_norm)(**arguments)
