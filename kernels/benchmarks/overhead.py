"""The host's time for a call: an operator as it is called, and through PyTorch's custom op, which tracing needs.

    python kernels/benchmarks/overhead.py

On the CPU, in microseconds: the least of several repetitions, and the ratio of the two within this run. The first operator
only allocates its outputs, so its time is all overhead. On a GPU the same Python runs before each launch, so that a small
model, whose kernels take less time than the host, waits for it.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import flagscale_kernels as fk
from flagscale_kernels import _operators


def microseconds(call, calls=200, repetitions=15):
    call()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return min(times)


@_operators.operator("overhead_probe")
def probe(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


@_operators.operator("overhead_probe_backward")
def probe_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@probe.register_fake
def _(x, weight, eps):
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


@probe_backward.register_fake
def _(dy, x, weight):
    return torch.empty_like(x), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    return *probe_backward(dy, *ctx.saved_tensors), None


probe.register_autograd(_backward, setup_context=_setup)


def measure(function):
    """(microseconds of a call, of its backward) of a function of x and a weight."""
    leaves = torch.randn(4, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    out = function(*leaves)
    gradient = torch.ones_like(out)
    backward = microseconds(lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True))
    return microseconds(lambda: function(*leaves)), backward


def both_ways(function):
    """What `measure` returns, called directly and through the custom ops."""
    direct, traced = measure(function), _operators.traced
    _operators.traced = lambda args: True
    custom = measure(function)
    _operators.traced = traced
    return direct, custom


def main():
    torch.set_num_threads(1)
    print("| operator | direction | direct, us | custom op, us | ratio |\n|---|---|---|---|---|")
    cases = [
        ("one that only allocates", lambda x, w: probe(x, w, 1e-6)[0]),
        ("rms_norm, whose PyTorch path computes", fk.rms_norm),
    ]
    for name, function in cases:
        for direction, direct, custom in zip(("forward", "backward"), *both_ways(function), strict=True):
            print(f"| {name} | {direction} | {direct:.0f} | {custom:.0f} | {custom / direct:.1f} |")


if __name__ == "__main__":
    main()
