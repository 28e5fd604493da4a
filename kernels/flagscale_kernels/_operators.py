"""An operator: a function of tensors, registered with PyTorch where something traces it and called directly elsewhere.

A `torch.library.custom_op` works under torch.compile, fake tensors, functorch and dispatch modes, and costs more time on
the host than the launch of a kernel. So an operator calls the custom op only where one of these is at work; else it runs
its function, and a `torch.autograd.Function` of its own for the gradient. `kernels/benchmarks/overhead.py` measures both.

Either way the function runs on the device of its first tensor (Triton launches on the current one), and with autocast
off: what autocast casts, the public functions cast before (`autocast_to`). A gradient has no gradient of its own: the
backward of a backward raises RuntimeError.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
NAMESPACE = "flagscale_kernels"


@contextlib.contextmanager
def launching_on(device: torch.device) -> Iterator[None]:
    """Within this context `device` is the current CUDA device, and autocast is off for its type."""
    with contextlib.ExitStack() as stack:
        if not is_current(device):
            stack.enter_context(torch.cuda.device(device))
        if autocasting(device):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def is_current(device: torch.device) -> bool:
    """Whether a Triton kernel that is launched now runs where tensors of `device` are."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def autocasting(device: torch.device) -> bool:
    """Whether torch.autocast is on for the device's type; it knows no meta tensors."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as torch casts the operands of a product; float64 stays."""
    device = tensors[0].device
    if not autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def traced(args: Sequence[Any]) -> bool:
    """Whether the call is being traced or its tensors are not plain ones, so that only the custom op can handle it."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(isinstance(t, Tensor) and (type(t) not in PLAIN_TYPES or t.is_meta) for t in args)


class Operator:
    """A function of tensors and options, with a fake and a gradient as `torch.library.custom_op` takes them.

    function: its annotations make the schema; the first argument is a tensor. name: in the package's namespace.
    mutates: names of the arguments that it writes to.
    """

    def __init__(self, function: Callable, name: str, mutates: tuple[str, ...]) -> None:
        names = list(inspect.signature(function).parameters)
        self._written = [names.index(argument) for argument in mutates]
        self._function = function
        self._gradient: type[torch.autograd.Function] | None = None

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            device = args[0].device
            if is_current(device) and not autocasting(device):
                return function(*args)
            with launching_on(device):
                return function(*args)

        self._run = run
        self._definition = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=mutates)
        self._custom_op = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.register_fake = self._definition.register_fake

    def __call__(self, *args: Any) -> Any:
        if traced(args):
            return self._custom_op(*args)
        if self._gradient is not None and torch.is_grad_enabled():
            return self._gradient.apply(*args)
        result = self._run(*args)
        for i in self._written:  # so that autograd sees a tensor that it saved and that is written over
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        return result

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Give the operator a gradient: `setup_context(ctx, inputs, output)` saves what `backward(ctx, *grads)` reads."""
        self._definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._run(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        self._gradient = type(getattr(self._function, "__name__", "operator"), (torch.autograd.Function,), methods)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Operator]:
    """A decorator that makes an Operator of a function."""
    return lambda function: Operator(function, name, mutates)
