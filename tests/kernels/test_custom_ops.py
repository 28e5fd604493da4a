"""Each operator under fake tensors, torch.compile and activation recompute, and the package's import."""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import BACKENDS, seeded
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpretedFunction

import flagscale_kernels as fk
from flagscale_kernels import _operators
from flagscale_kernels._checks import choose_backend, say_once
from flagscale_kernels.flash_attention import lacking_head_dim

TARGET = torch.tensor([1, -100, 3, 0, 2, 15])
TOKEN, INVERSE = fk.token_order(torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2], [1, 0]]))


def tokens(x):
    """The order of six tokens' copies, where x lies."""
    return TOKEN.to(x.device), INVERSE.to(x.device)


def rope_tables():
    return fk.rope_tables(fk.rope_frequencies(16)[0], 8)


def operators():
    """name -> (function of tensors and a backend, its tensors)."""
    x, w, heads, keys = seeded(6, 16), seeded(16, seed=1), seeded(6, 1, 4, 16, seed=2), seeded(6, 1, 2, 16, seed=3)
    weight, per_token = seeded(16, 16, seed=4), seeded(6, seed=5)
    cos, sin = rope_tables()

    def loss(x, backend):
        return fk.cross_entropy(x * 1, TARGET, label_smoothing=0.1, z_loss=1e-3, backend=backend)

    return {
        "rms_norm": (lambda x, w, backend: fk.rms_norm(x, w, backend=backend), [x, w]),
        "rms_norm_residual": (lambda x, r, w, backend: fk.rms_norm_residual(x, r, w, backend=backend), [x, x * 2, w]),
        "layer_norm": (lambda x, w, b, backend: fk.layer_norm(x, w, b, backend=backend), [x, w, w * 2]),
        "rope": (lambda q, k, backend: fk.rope(q, k, cos, sin, inplace_backward=True, backend=backend), [heads, keys]),
        "swiglu": (lambda x, backend: fk.swiglu(x, backend=backend), [x]),
        "swiglu_split": (
            lambda g, u, t, backend: fk.swiglu(g, u, weight=t, backend=backend),
            [x, x * 2, per_token],
        ),
        "geglu": (lambda x, backend: fk.geglu(x, approximate="none", backend=backend), [x]),
        "spread_tokens": (lambda x, backend: fk.spread_tokens(x, *tokens(x), backend=backend), [x]),
        "collect_tokens": (lambda x, backend: fk.collect_tokens(x.repeat(2, 1), *tokens(x), backend=backend), [x]),
        "cross_entropy": (loss, [x]),
        "fused_linear_cross_entropy": (
            lambda x, w, backend: fk.fused_linear_cross_entropy(x, w, TARGET, chunk_tokens=4, backend=backend),
            [x, weight],
        ),
        "flash_attention": (
            lambda q, k, v, backend: fk.flash_attention(
                q, k, v, causal=True, layout="sbnd", return_lse=True, backend=backend
            ),
            [heads, keys, keys * 2],
        ),
        "piecewise_attention": (
            lambda *t, backend: fk.piecewise_attention(*t, 3, causal=True, layout="sbnd", backend=backend),
            [heads, keys, heads * 2, keys * 3, keys * 2],
        ),
    }


NAMES = sorted(operators())


def ramp(o):
    """A different gradient for every element of an output."""
    return torch.linspace(0.1, 1, o.numel()).view(o.shape)


def outputs_and_gradients(function, tensors, backend):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o.float() * ramp(o)).sum() for o in out)
    return [*out, *torch.autograd.grad(total, leaves)]


def assert_same(got, expected):
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_triton_and_pytorch_paths_agree(name):
    function, tensors = operators()[name]
    triton, torch_ = (outputs_and_gradients(function, tensors, backend) for backend in BACKENDS)
    assert_same(triton, torch_)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors_give_the_shapes_of_the_real_ones(backend, name):
    function, tensors = operators()[name]
    if "cross_entropy" in name or name == "rope":
        meta_tables = [t.to("meta") for t in rope_tables()]
        options = {"backend": backend}
        target = TARGET.to("meta")
        function = {
            "rope": lambda q, k, backend: fk.rope(q, k, *meta_tables, **options),
            "cross_entropy": lambda x, backend: fk.cross_entropy(x, target, **options),
            "fused_linear_cross_entropy": lambda x, w, backend: fk.fused_linear_cross_entropy(x, w, target, **options),
        }[name]
    leaves = [t.to("meta").requires_grad_() for t in tensors]
    out = function(*leaves, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    real = operators()[name][0](*tensors, backend="torch")
    for fake, exact in zip(out, real if isinstance(real, tuple) else (real,), strict=True):
        assert (fake.shape, fake.dtype, fake.device.type) == (exact.shape, exact.dtype, "meta")
    gradients = torch.autograd.grad([o.sum() for o in out], leaves)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_traces_through_without_a_graph_break(name):
    function, tensors = operators()[name]
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(outputs_and_gradients(compiled, tensors, "torch"), outputs_and_gradients(function, tensors, "torch"))


def kernels_launched_outside_of(monkeypatch, inside):
    """A list of the kernels that are launched while inside() is false."""
    found, original = [], InterpretedFunction.__getitem__

    def launch(kernel, grid):
        if not inside():
            found.append(kernel.fn.__name__)
        return original(kernel, grid)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launch)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_launched_with_its_tensors_device_as_the_current_one(name, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(wanted):
        entered.append(wanted)
        yield
        entered.pop()

    monkeypatch.setattr(_operators, "is_current", lambda device: False)
    monkeypatch.setattr(torch.cuda, "device", device)
    outside = kernels_launched_outside_of(monkeypatch, lambda: entered)
    function, tensors = operators()[name]
    outputs_and_gradients(function, tensors, "triton")
    assert outside == []


def test_the_device_of_the_tensors_becomes_the_current_one(monkeypatch):
    current, entered = 0, []

    @contextlib.contextmanager
    def device(wanted):
        entered.append(wanted)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    for wanted in ("cuda:0", "cpu", "cuda:1", "meta"):
        with _operators.launching_on(torch.device(wanted)):
            pass
    assert entered == [torch.device("cuda:1")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_a_gradient_is_refused(backend, name):
    function, tensors = operators()[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(sum(o.square().sum() for o in out), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("name", NAMES)
def test_the_custom_op_and_the_direct_call_give_the_same_bits(name, monkeypatch):
    function, tensors = operators()[name]
    direct = outputs_and_gradients(function, tensors, "torch")
    monkeypatch.setattr(_operators, "traced", lambda args: True)
    for mine, exact in zip(direct, outputs_and_gradients(function, tensors, "torch"), strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_what_torchs_own_attention_casts_and_changes_nothing_inside(backend):
    for name in ("flash_attention", "piecewise_attention"):
        function, tensors = operators()[name]
        plain = outputs_and_gradients(function, [t.bfloat16() for t in tensors], backend)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = outputs_and_gradients(function, [tensors[0].bfloat16(), *tensors[1:]], backend)
        assert mixed[0].dtype == torch.bfloat16
        for mine, exact in zip(mixed, plain, strict=True):
            torch.testing.assert_close(mine, exact, check_dtype=False)
    for name in set(NAMES) - {"flash_attention", "piecewise_attention", "fused_linear_cross_entropy"}:
        function, tensors = operators()[name]
        plain = outputs_and_gradients(function, tensors, backend)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = outputs_and_gradients(function, tensors, backend)
        assert all(torch.equal(mine, exact) for mine, exact in zip(mixed, plain, strict=True)), name


def test_what_only_the_pytorch_path_takes_falls_back_on_a_gpu_too_and_says_so(monkeypatch):
    gpu: Any = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(1, 1, 5, 264))
    assert choose_backend(gpu, None) == "triton"
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="runs in PyTorch, which is slower: head dimensions must be from 1 to 256"):
        assert choose_backend(gpu, None, lacks=lacking_head_dim(gpu)) == "torch"
    gpu.dtype = torch.float64
    with pytest.warns(UserWarning, match="runs in PyTorch, which is slower: .*float64"):
        assert choose_backend(gpu, None) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(gpu, None) == "torch"  # said once
    assert choose_backend(gpu, "triton") == "triton"  # and refused by check_float


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_recompute_gives_the_same_gradients(backend, name, use_reentrant):
    function, tensors = operators()[name]

    def recomputed(*leaves, backend):
        return checkpoint(lambda *t: function(*t, backend=backend), *leaves, use_reentrant=use_reentrant)

    leaves = [t.clone().requires_grad_() for t in tensors]
    out = recomputed(*leaves, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    sum((o.float() * ramp(o)).sum() for o in out).backward()
    assert_same([*out, *(t.grad for t in leaves)], outputs_and_gradients(function, tensors, backend))


@pytest.mark.parametrize(
    "name",
    [
        "rms_norm",
        "rms_norm_residual",
        "layer_norm",
        "gated_packed",
        "gated_split",
        "spread_tokens",
        "collect_tokens",
        "rope",
        "rope_",
    ],
)
def test_operator_registration_passes_pytorchs_own_checks(name):
    x, w = seeded(6, 16).requires_grad_(), seeded(16, seed=1).requires_grad_()
    heads, keys = seeded(6, 1, 4, 16), seeded(6, 1, 2, 16, seed=1)
    arguments = {
        "rms_norm": (x, w, 1e-6, True, 1.0, "torch"),
        "rms_norm_residual": (x, seeded(6, 16, seed=2), w, 1e-6, False, 0.0, "torch"),
        "layer_norm": (x, w, w.detach() * 2, 1e-5, "torch"),
        "gated_packed": (x, None, "gelu_tanh", "torch"),
        "gated_split": (x, seeded(6, 16, seed=2).requires_grad_(), seeded(6, seed=3), "silu", "torch"),
        "spread_tokens": (x, TOKEN, INVERSE, "torch"),
        "collect_tokens": (seeded(12, 16).requires_grad_(), TOKEN, INVERSE, "torch"),
        "rope": (heads, keys, *rope_tables(), None, "sbnd", False, 1.0, "torch"),
        "rope_": (heads, keys, *rope_tables(), None, "sbnd", True, -1.0, "torch"),
    }[name]
    torch.library.opcheck(getattr(torch.ops.flagscale_kernels, name).default, arguments)


@pytest.mark.parametrize("name", ["flash_attention", "piecewise_attention", "cross_entropy_gradient_"])
def test_larger_operators_pass_pytorchs_own_checks(name):
    q, k = seeded(1, 2, 6, 16).requires_grad_(), seeded(1, 1, 6, 16, seed=1).requires_grad_()
    v = seeded(1, 1, 6, 16, seed=2).requires_grad_()
    rows = [seeded(6, 16), TARGET, seeded(6, seed=3), seeded(6, seed=4)]
    arguments = {
        "flash_attention": (q, k, v, *[None] * 4, 6, 6, 0.25, 0.0, -1, 0, "bnsd", True, "torch"),
        "piecewise_attention": (q, k, q, k, v, *[None] * 3, 6, 6, 3, True, 0.25, 0.0, "bnsd", True, "torch"),
        "cross_entropy_gradient_": (*rows, 0, 16, 0.1, 0.0, "torch"),
    }[name]
    torch.library.opcheck(getattr(torch.ops.flagscale_kernels, name).default, arguments)


def test_triton_on_the_cpu_without_the_interpreter_is_refused_and_import_asks_for_no_driver():
    code = """
import triton
def refuse(*args): raise AssertionError("the import asked for a driver")
triton.runtime.driver.__class__.active = property(refuse)
import torch, flagscale_kernels as fk
assert not torch.cuda.is_initialized()
try:
    fk.rms_norm(torch.ones(2, 4), torch.ones(4), backend="triton")
except ValueError as error:
    assert "TRITON_INTERPRET" in str(error), error
else:
    raise AssertionError("not refused")
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_pytorch_paths_work_where_triton_is_missing():
    code = """
import sys
sys.modules["triton"] = None  # makes `import triton` raise ImportError
import torch, flagscale_kernels as fk
x = torch.randn(3, 16, requires_grad=True)
fk.rms_norm(fk.swiglu(x), torch.ones(8)).sum().backward()
q = torch.randn(1, 2, 5, 16, requires_grad=True)
fk.piecewise_attention(q, q, q, q, q, 2, causal=True).sum().backward()
try:
    fk.swiglu(x, backend="triton")
except ValueError as error:
    assert "not installed" in str(error), error
else:
    raise AssertionError("not refused")
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
