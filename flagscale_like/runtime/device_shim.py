"""Lets megatron-core 0.16.1, which is written for CUDA, run on another device. The only monkey-patches of the project.

megatron-core writes `device="cuda"`, `torch.cuda.current_device()` and `tensor.type() == "torch.cuda.FloatTensor"` into its
training path. On CUDA nothing is patched. A platform that asks for it (`needs_shim`) gives a device and a namespace, and
nothing of torch itself is changed for it. Instead

1. the name `torch` inside the megatron modules listed in `MODULES` is bound to a stand-in whose factories take "cuda" for
   the platform's device and whose `cuda` is the platform's namespace; every other attribute is torch's own;
2. the few functions in `SCOPED` that ask a tensor for its type string, or call `.cuda()` on it, run inside a
   TorchFunctionMode that answers for these two methods, and that ends with the call;
3. the CUDA random-number state that activation recompute keeps is the platform's;
4. where there are no streams, a pipeline output is sent as a detached alias: the schedule frees an output's storage
   (`out.data = empty`) after `isend`, and gloo, unlike NCCL, reads it later. Without this the interleaved schedule trains
   on garbage, silently;
5. where there are no streams, a gradient reduction or parameter gather of one rank with itself, in place, is left out:
   gloo copies the whole buffer onto itself;
6. `fused_weight_gradient_mlp_cuda`, apex's product that accumulates into main_grad, is torch's addmm: the linear layers then
   write a micro-batch's weight gradient where it belongs, without a temporary and a second pass over memory;
7. the sizes of an all-to-all between expert-parallel ranks are made into plain numbers, as they are on their way from a GPU:
   gloo takes no tensors.

One thing is mended on every device: `te_general_gemm`, which megatron-core's router asks for, is unbound without Transformer
Engine (`bind_missing_names`).

Before any of it, where the platform does not compile, `without_fusions` switches megatron-core's own fusions off.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from flagscale_like.runtime.platforms import Platform
from flagscale_like.runtime.storage import memory_of

logger = logging.getLogger(__name__)

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
    "megatron.core.optimizer": "gathers the kinds of parameters of all ranks",
    "megatron.core.optimizer.optimizer": "found_inf and loss scale",
    "megatron.core.optimizer.distrib_optimizer": "state tensors",
    "megatron.core.optimizer.grad_scaler": "loss scale",
    "megatron.core.optimizer.clip_grads": "norm of the gradients",
    "megatron.core.pipeline_parallel.p2p_communication": "receive buffers, synchronize",
    "megatron.core.pipeline_parallel.schedules": "total_num_tokens",
    "megatron.core.transformer.moe.router": "weights on the current device",
    "megatron.core.transformer.moe.token_dispatcher": "stream for the counts on their way to the host",
    "megatron.core.transformer.moe.shared_experts": "stream of the shared experts",
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


FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")


class _Cuda:
    """Answers for torch.cuda: the platform's namespace, with the platform's device as the current one."""

    def __init__(self, platform: Platform) -> None:
        self._device, self._namespace = platform.device, platform.cuda_namespace()

    def current_device(self) -> torch.device:
        return self._device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._namespace, name)


class _Distributed:
    """torch.distributed with the platform's gather of objects."""

    def __init__(self, platform: Platform) -> None:
        self.all_gather_object = platform.all_gather_object

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)


class _Torch:
    """torch with `device="cuda"` read as the platform's device; what is not listed here is torch's own object."""

    def __init__(self, platform: Platform) -> None:
        self.cuda, self.distributed = _Cuda(platform), _Distributed(platform)
        for name in FACTORIES:
            setattr(self, name, self._on(platform.device, getattr(torch, name)))

    @staticmethod
    def _on(device: torch.device, factory: Callable) -> Callable:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = device
            return factory(*args, **kwargs)

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _TypeNames(TorchFunctionMode):
    """Within it `tensor.type()` gives the CUDA name, and `tensor.cuda()` the tensor on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:  # a model that is built on the meta device stays there
            return args[0] if args[0].is_meta else args[0].to(self._device)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + func(*args).rpartition(".")[2]
        return func(*args, **(kwargs or {}))


class _DtypeCheck(type):
    """A class whose instances are the tensors of one dtype, on any device."""

    dtype: torch.dtype

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == cls.dtype


def _tensors_of(dtype: torch.dtype) -> tuple[type, ...]:
    return (_DtypeCheck(str(dtype), (), {"dtype": dtype}),)


def _scoped(function: Callable, device: torch.device) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _TypeNames(device):
            return function(*args, **kwargs)

    return call


def send_detached(function: Callable) -> Callable:
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
        in_place = memory_of(output) == memory_of(input_) and output.storage_offset() == input_.storage_offset()
        if group.size() == 1 and in_place:
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


def loaded_by(
    spec: ModuleSpec | None, run: Callable[[Callable[[ModuleType], None], ModuleType], None]
) -> ModuleSpec | None:
    """A module's spec whose loader leaves the loading to `run`, which gets the loader's own function and the module."""
    if spec is not None and spec.loader is not None:
        # A loader is an object of one module: what is set on it is for that module alone.
        spec.loader.exec_module = functools.partial(run, spec.loader.exec_module)
    return spec


class _WithoutFusions(MetaPathFinder):
    """Loads the real megatron.core.jit, once, and switches its fuser off before another module takes it from there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "megatron.core.jit":
            return None
        sys.meta_path.remove(self)
        return loaded_by(PathFinder.find_spec(name, path, target), self._load)

    @staticmethod
    def _load(load: Callable[[ModuleType], None], module: ModuleType) -> None:
        load(module)
        module.disable_jit_fuser()


def without_fusions() -> None:
    """Have megatron-core's fusions run as plain functions, if it is not loaded yet.

    It decorates them with torch.compile while it loads, which loads inductor: seconds of every start. No configuration of
    ours runs one of these fusions (model/build.py turns them off), but those of mixture-of-experts layers.
    """
    if "megatron.core.jit" not in sys.modules and not any(isinstance(f, _WithoutFusions) for f in sys.meta_path):
        sys.meta_path.insert(0, _WithoutFusions())


def bind_missing_names() -> None:
    """Give the router's module the name that megatron-core 0.16.1 leaves out where Transformer Engine is not installed."""
    module = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None


def _to_numbers(platform: Platform, tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stands for maybe_move_tensor_to_cpu on a device whose tensors are not CUDA's: see 7. in the module's docstring."""
    if not torch.is_tensor(tensor):
        return tensor
    return platform.to_numpy(tensor) if as_numpy else platform.to_host(tensor)


_installed: Platform | None = None


def install(platform: Platform) -> None:
    """Patch megatron-core for a platform that asks for it, once a process."""
    global _installed
    if _installed is not None:
        assert _installed.device == platform.device, f"megatron-core is patched for {_installed.device} already"
        return
    _installed = platform
    logger.info("megatron-core is patched to run on %s (runtime/device_shim.py)", platform.device)
    stand_in = _Torch(platform)
    for name in MODULES:
        vars(importlib.import_module(name))["torch"] = stand_in
    for module_name, class_name, function_name in SCOPED:
        module: ModuleType = importlib.import_module(module_name)
        owner = getattr(module, class_name) if class_name else module
        setattr(owner, function_name, _scoped(getattr(owner, function_name), platform.device))

    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: platform.rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: platform.set_rng_state(state)

    # Float16Module tells tensors by their CUDA classes.
    transformer_module = importlib.import_module("megatron.core.transformer.module")
    transformer_module._FLOAT_TYPES = _tensors_of(torch.float32)
    transformer_module._HALF_TYPES = _tensors_of(torch.float16)
    transformer_module._BF16_TYPES = _tensors_of(torch.bfloat16)

    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = functools.partial(_to_numbers, platform)

    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.fused_weight_gradient_mlp_cuda = _WeightGradient
    layers._grad_accum_fusion_available = True
    if not platform.has_streams:
        _install_for_gloo()


def _install_for_gloo() -> None:
    """4. and 5. of the module's docstring."""
    p2p = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication").P2PCommunicator
    p2p._communicate = send_detached(p2p._communicate)
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _not_alone(getattr(buffers, name)))
