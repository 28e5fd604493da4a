"""Lets megatron-core 0.16.1 run on CPU + gloo. The only monkey-patches of the project, and never installed on CUDA.

megatron-core writes `device="cuda"`, `torch.cuda.current_device()` and `tensor.type() == "torch.cuda.FloatTensor"` into its
training path. Nothing of torch itself is changed for it. Instead

1. the name `torch` inside the megatron modules listed in `MODULES` is bound to a stand-in whose factories take "cuda" for
   the CPU and whose `cuda` namespace answers for it; every other attribute is torch's own;
2. the few functions in `SCOPED` that ask a tensor for its type string, or call `.cuda()` on it, run inside a
   TorchFunctionMode that answers for these two methods, and that ends with the call;
3. the CUDA random-number state that activation recompute keeps is the CPU's;
4. a pipeline output is sent as a detached alias: the schedule frees an output's storage (`out.data = empty`) after
   `isend`, and gloo, unlike NCCL, reads it later. Without this the interleaved schedule trains on garbage, silently;
5. a gradient reduction or parameter gather of one rank with itself, in place, is left out: gloo copies the whole buffer
   onto itself;
6. `fused_weight_gradient_mlp_cuda`, apex's product that accumulates into main_grad, is torch's addmm: the linear layers then
   write a micro-batch's weight gradient where it belongs, without a temporary and a second pass over memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

# module -> the place in it that needs a device
MODULES = {
    "megatron.core.parallel_state": "synchronize after groups are made",
    "megatron.core.utils": "buffers and norms on the current device",
    "megatron.core.tensor_parallel.mappings": "outputs of all-gather and reduce-scatter",
    "megatron.core.tensor_parallel.layers": "weights, and gradients under sequence parallelism",
    "megatron.core.tensor_parallel.utils": "gathered buffers",
    "megatron.core.tensor_parallel.random": "RNG tracker",
    "megatron.core.distributed.param_and_grad_buffer": "parameter and gradient buffers, communication streams",
    "megatron.core.distributed.distributed_data_parallel": "communication stream",
    "megatron.core.optimizer.optimizer": "found_inf and loss scale",
    "megatron.core.optimizer.distrib_optimizer": "state tensors",
    "megatron.core.optimizer.grad_scaler": "loss scale",
    "megatron.core.optimizer.clip_grads": "norm of the gradients",
    "megatron.core.pipeline_parallel.p2p_communication": "receive buffers, synchronize",
    "megatron.core.pipeline_parallel.schedules": "total_num_tokens",
}

# (module, class or None, function) -> what it asks of a tensor
SCOPED = {
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "__init__"): "param.type()",
    ("megatron.core.optimizer.grad_scaler", "DynamicGradScaler", "load_state_dict"): "state_dict['scale'].cuda()",
    (
        "megatron.core.models.common.language_module.language_module",
        "LanguageModule",
        "setup_embeddings_and_output_layer",
    ): "weight.data.cuda()",
}


class _Stream:
    """A stream on a machine where work is already in order."""

    def wait_stream(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: object) -> _Stream:
        return self

    record = wait = wait_event

    def query(self) -> bool:
        return True


class _CudaOnCpu:
    """Answers for torch.cuda; what is not listed here is torch.cuda's own."""

    Stream = Event = _Stream

    def current_device(self) -> torch.device:
        return CPU

    def synchronize(self, *_: object) -> None: ...

    def empty_cache(self) -> None: ...

    def current_stream(self, *_: object) -> _Stream:
        return _Stream()

    default_stream = current_stream

    def stream(self, *_: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, *_: object) -> torch.Tensor:
        return torch.get_rng_state()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchOnCpu:
    """torch with `device="cuda"` read as the CPU; everything else is torch's own object."""

    cuda = _CudaOnCpu()

    def __init__(self) -> None:
        for name in ("tensor", "zeros", "ones", "empty"):
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    @staticmethod
    def _on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _TypeNames(TorchFunctionMode):
    """Within it `tensor.type()` gives the CUDA name and `tensor.cuda()` the tensor."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **(kwargs or {}))


def _scoped(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _TypeNames():
            return function(*args, **kwargs)

    return call


def _send_detached(function: Callable) -> Callable:
    """Wrap P2PCommunicator._communicate: see 4. in the module's docstring."""

    @functools.wraps(function)
    def call(self: object, *, tensor_send_next: Any, tensor_send_prev: Any, **kwargs: Any) -> Any:
        return function(
            self,
            tensor_send_next=None if tensor_send_next is None else tensor_send_next.detach(),
            tensor_send_prev=None if tensor_send_prev is None else tensor_send_prev.detach(),
            **kwargs,
        )

    return call


def _not_alone(collective: Callable) -> Callable:
    """Wrap a collective of param_and_grad_buffer: see 5. in the module's docstring."""

    @functools.wraps(collective)
    def call(output: torch.Tensor, input_: torch.Tensor, *, group: Any, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == input_.data_ptr():
            return None
        return collective(output, input_, group=group, **kwargs)

    return call


class _WeightGradient:
    """Stands for apex's fused_weight_gradient_mlp_cuda: see 6. in the module's docstring."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """main_grad [out, in] += grad_output^T [out, tokens] total_input [tokens, in]."""
        if grad_output.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), total_input)
        else:
            main_grad.add_(grad_output.t().mm(total_input))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


@functools.cache
def install() -> None:
    """Patch megatron-core, once. The caller has made sure that there is no CUDA device in use."""
    stand_in = _TorchOnCpu()
    for name in MODULES:
        importlib.import_module(name).torch = stand_in
    for module_name, class_name, function_name in SCOPED:
        module: ModuleType = importlib.import_module(module_name)
        owner = getattr(module, class_name) if class_name else module
        setattr(owner, function_name, _scoped(getattr(owner, function_name)))

    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    # Float16Module compares tensors against the CUDA types, which a CPU build of torch cannot do.
    transformer_module = importlib.import_module("megatron.core.transformer.module")
    transformer_module._FLOAT_TYPES = (torch.FloatTensor,)
    transformer_module._HALF_TYPES = (torch.HalfTensor,)
    transformer_module._BF16_TYPES = (torch.BFloat16Tensor,)

    p2p = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication").P2PCommunicator
    p2p._communicate = _send_detached(p2p._communicate)

    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.fused_weight_gradient_mlp_cuda = _WeightGradient
    layers._grad_accum_fusion_available = True

    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _not_alone(getattr(buffers, name)))
