import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, seeded

from flagscale_kernels import swiglu, swiglu_reference

ROWS = [(5,), (3, 7), (2, 3, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_output_and_gradients_are_as_good_as_pytorch(backend, rows, weighted, dtype):
    inputs = [seeded(*rows, 2 * 123, dtype=dtype)] + [seeded(*rows, 1, seed=1)] * weighted
    assert_as_good_as_pytorch(
        lambda x, w=None: swiglu(x, weight=w, backend=backend),
        lambda x, w=None: swiglu_reference(x, weight=w),
        inputs,
        [seeded(*rows, 123, seed=2)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_split_output_and_gradients_are_as_good_as_pytorch(backend, weighted, dtype):
    inputs = [seeded(3, 5, 123, dtype=dtype), seeded(3, 5, 123, dtype=dtype, seed=1)]
    inputs += [seeded(3, 5, dtype=dtype, seed=2)] * weighted
    assert_as_good_as_pytorch(
        lambda g, u, w=None: swiglu(g, u, weight=w, backend=backend),
        swiglu_reference,
        inputs,
        [seeded(3, 5, 123, seed=3)],
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_longer_than_one_block(weighted):
    f = 2048 + 123
    inputs = [seeded(3, 2 * f)] + [seeded(3, seed=1)] * weighted
    assert_as_good_as_pytorch(
        lambda x, w=None: swiglu(x, weight=w, backend="triton"),
        lambda x, w=None: swiglu_reference(x, weight=w),
        inputs,
        [seeded(3, f, seed=2)],
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's; a GPU says inf as quietly as it should
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gates_neither_overflow_nor_lose_the_gradient(backend):
    x = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0] + [1.0] * 5], requires_grad=True)
    y = swiglu(x, backend=backend)
    torch.testing.assert_close(y, swiglu_reference(x))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()
    torch.testing.assert_close(dx[0, 4], torch.tensor(1.0))


def test_saves_nothing_but_its_inputs():
    x, w = seeded(5, 32).requires_grad_(), seeded(5, seed=1).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        swiglu(x, weight=w)
    assert set(saved) == {x.data_ptr(), w.data_ptr()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_halves_of_a_larger_tensor(backend):
    packed = seeded(5, 3, 4 * 16)
    gate, up = packed[..., 16:32], packed[..., 48:]
    torch.testing.assert_close(swiglu(gate, up, backend=backend), swiglu_reference(gate, up))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_one_dimensional_input(backend):
    assert swiglu(torch.empty(0, 8), backend=backend).shape == (0, 4)
    x = seeded(8).requires_grad_()
    y = swiglu(x, backend=backend)
    torch.testing.assert_close(y, swiglu_reference(x))
    y.sum().backward()
    assert x.grad.shape == (8,)


def test_cpu_path_passes_gradcheck():
    x, w = seeded(3, 14, dtype=torch.float64), seeded(3, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda x, w: swiglu(x, weight=w), [x.requires_grad_(), w.requires_grad_()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": torch.ones(5, 15)}, r"gate.shape\[-1\] \(15\) must be divisible by 2"),
        ({"gate": torch.ones(5, 16), "up": torch.ones(5, 15)}, r"up.shape .*15.* must equal gate.shape .*16"),
        ({"gate": torch.ones(5, 16), "up": torch.ones(5, 16).half()}, "up.dtype"),
        ({"gate": torch.ones(5, 16, dtype=torch.int64)}, "gate.dtype"),
        ({"gate": torch.ones(16, 5)[:, ::2].t()}, r"gate.stride\(-1\) \(5\) must be 1"),
        ({"gate": torch.ones(5, 16), "weight": torch.ones(4)}, r"weight.shape \(\(4,\)\) must be \(5,\)"),
        ({"gate": torch.ones(5, 16), "weight": torch.ones(5, device="meta")}, "weight.device"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        swiglu(**arguments)
