"""A variant of an operator: its options, its inputs, and its definition in plain PyTorch to compare it with."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accuracy import assert_as_good_as_pytorch, seeded

from flagscale_kernels._attention_launch import ORDERED_VARIABLE
from flagscale_kernels._rivals import ALWAYS, NEVER, RIVALS_VARIABLE
from flagscale_kernels._tuning import AUTOTUNE_VARIABLE, TunedKernel

FP16, BF16 = torch.float16, torch.bfloat16
SHORT = {FP16: "fp16", BF16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """An operator with its options. `make(device)` returns (ours, reference, inputs, gradients of the outputs).

    `config` is the place in every kernel's list of tiles to compute with; None takes the first, which is the default.
    `rival` computes with the kernels for one kind of chip, where they take the call (`_rivals.py`); `ordered` adds dQ up in
    order (`_dq_sums.py`). Neither has run on a GPU yet: `may_hang`.
    """

    name: str
    make: Callable
    config: int | None = None
    rival: bool = False
    ordered: bool = False

    @property
    def may_hang(self) -> bool:
        return self.rival or self.ordered

    def check(self, device: str) -> None:
        """Raise AssertionError unless outputs and gradients are as good as PyTorch's in the same precision."""
        ours, reference, inputs, grads = self.make(device)
        variables = {RIVALS_VARIABLE: ALWAYS if self.rival else NEVER, ORDERED_VARIABLE: str(int(self.ordered))}
        with one_config(self.config), contextlib.ExitStack() as stack:
            for name, value in variables.items():
                stack.enter_context(environment(name, value))
            assert_as_good_as_pytorch(ours, reference, inputs, grads)


@contextlib.contextmanager
def one_config(place: int | None) -> Iterator[None]:
    """Within this context every attention kernel computes with the config at `place` of its list, or with the default.

    Where a kernel's list is shorter, its last config computes.
    """
    stock = TunedKernel.launch

    def launch(self, *args, **options):
        lists = self.configs
        self.configs = lambda *key: lists(*key)[: (place or 0) + 1][-1:]
        try:
            stock(self, *args, **options)
        finally:
            self.configs = lists

    TunedKernel.launch = launch
    try:
        with environment(AUTOTUNE_VARIABLE, "0"):
            yield
    finally:
        TunedKernel.launch = stock


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Within this context the environment variable has the value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def tensors_of(device, dtype, *shapes):
    return [seeded(*shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes)]


def gradients(device, *shapes):
    return [seeded(*shape, seed=90 + i).to(device) for i, shape in enumerate(shapes)]
