import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, seeded

from flagscale_kernels import geglu, geglu_reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_output_and_gradients_are_as_good_as_pytorch(backend, approximate, weighted, dtype):
    inputs = [seeded(3, 7, 2 * 123, dtype=dtype)] + [seeded(3, 7, seed=1)] * weighted
    assert_as_good_as_pytorch(
        lambda x, w=None: geglu(x, weight=w, approximate=approximate, backend=backend),
        lambda x, w=None: geglu_reference(x, weight=w, approximate=approximate),
        inputs,
        [seeded(3, 7, 123, seed=2)],
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_split_tensors_and_pytorchs_gelu(backend, approximate):
    gate, up = seeded(5, 16).requires_grad_(), seeded(5, 16, seed=1).requires_grad_()
    got = geglu(gate, up, approximate=approximate, backend=backend)
    expected = torch.nn.functional.gelu(gate, approximate=approximate) * up
    torch.testing.assert_close(got, expected)
    for mine, exact in zip(*(torch.autograd.grad(t.sum(), [gate, up]) for t in (got, expected)), strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gates_neither_overflow_nor_lose_the_gradient(backend, approximate):
    x = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0] + [1.0] * 5], requires_grad=True)
    y = geglu(x, approximate=approximate, backend=backend)
    torch.testing.assert_close(y, geglu_reference(x, approximate=approximate))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx[0, :5], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_cpu_path_passes_gradcheck(approximate):
    x, w = (t.double().requires_grad_() for t in (seeded(3, 14), seeded(3, seed=1)))
    assert torch.autograd.gradcheck(lambda x, w: geglu(x, weight=w, approximate=approximate), [x, w])


def test_an_unknown_approximation_is_named():
    with pytest.raises(ValueError, match=r"approximate \('quick'\) must be one of \('tanh', 'none'\)"):
        geglu(torch.ones(3, 4), approximate="quick")
