import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, seeded

from flagscale_kernels import layer_norm, layer_norm_reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 123), (3, 7, 128), (123, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_as_good_as_pytorch(backend, shape, bias, dtype):
    x = 3 + seeded(*shape, dtype=dtype)
    parameters = [1 + 0.1 * seeded(shape[-1], dtype=dtype, seed=2)] + [seeded(shape[-1], dtype=dtype, seed=3)] * bias
    assert_as_good_as_pytorch(
        lambda *t: layer_norm(*t, backend=backend), layer_norm_reference, [x, *parameters], [seeded(*shape, seed=1)]
    )


@pytest.mark.parametrize("h", [8193, 33000])  # the backward's rows do not fit in one tile, nor do the forward's
def test_rows_that_are_read_in_parts(h):
    inputs = [seeded(5, h, dtype=torch.bfloat16), *(seeded(h, dtype=torch.bfloat16, seed=i) for i in (1, 2))]
    assert_as_good_as_pytorch(
        lambda *t: layer_norm(*t, backend="triton"), layer_norm_reference, inputs, [seeded(5, h, seed=3)]
    )


def test_the_definition_is_pytorchs():
    x, weight, bias = seeded(5, 16), seeded(16, seed=1), seeded(16, seed=2)
    expected = torch.nn.functional.layer_norm(x, (16,), weight, bias, 1e-3)
    torch.testing.assert_close(layer_norm_reference(x, weight, bias, 1e-3), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_weight_a_slice_and_no_rows(backend):
    x, weight = seeded(5, 3, 32, dtype=torch.bfloat16)[..., :16], seeded(16)
    y = layer_norm(x, weight, weight, backend=backend)
    torch.testing.assert_close(y, layer_norm_reference(x, weight, weight), rtol=0.01, atol=0.01)
    leaf = weight.clone().requires_grad_()
    layer_norm(seeded(0, 16), leaf, leaf, backend=backend).sum().backward()
    assert leaf.grad.eq(0).all()


def test_cpu_path_passes_gradcheck():
    inputs = [t.requires_grad_() for t in (seeded(3, 7).double(), seeded(7).double(), seeded(7, seed=1).double())]
    assert torch.autograd.gradcheck(layer_norm, inputs)
    assert torch.autograd.gradcheck(layer_norm, inputs[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(15)}, r"weight.shape \(\(15,\)\)"),
        ({"bias": torch.ones(15)}, r"bias.shape \(\(15,\)\)"),
        ({"bias": torch.ones(16).half()}, "bias.dtype"),
        ({"x": torch.ones(5, 16, dtype=torch.int32)}, "x.dtype"),
        ({"x": torch.ones(16, 5).t()}, r"x.stride\(-1\) \(5\) must be 1"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**{"x": torch.ones(5, 16), "weight": torch.ones(16)} | change)
