"""The shim changes megatron-core and leaves torch alone; each silent error that it or we cure stays cured."""

import importlib
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

from flagscale_like.data.batch import Batch
from flagscale_like.engine.engine import loss_function
from flagscale_like.engine.shards import adam_step, ensure_moments, set_adam_step
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime import device_shim
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.platforms import get_platform
from flagscale_like.runtime.platforms.cpu import CpuPlatform
from tests.harness import build_engine, run_ranks, tiny_config

PLACES = (
    [
        (torch, name)
        for name in ("tensor", "zeros", "ones", "empty", "cuda", "manual_seed", "get_rng_state", "FloatTensor")
    ]
    + [
        (torch.cuda, name)
        for name in (
            "current_device",
            "synchronize",
            "Stream",
            "stream",
            "current_stream",
            "get_rng_state",
            "manual_seed",
        )
    ]
    + [(torch.Tensor, name) for name in ("cuda", "type", "to", "is_cuda")]
)


def compare_torch_before_and_after() -> list[str]:
    before = [getattr(owner, name) for owner, name in PLACES]
    modes = torch.overrides._get_current_function_mode_stack()
    device_shim.install(get_platform())
    changed = [name for (owner, name), old in zip(PLACES, before, strict=True) if getattr(owner, name) is not old]
    if torch.overrides._get_current_function_mode_stack() != modes:
        changed.append("function modes")
    if torch.zeros(1).type() != "torch.FloatTensor":
        changed.append("Tensor.type()")
    return changed


def test_torch_is_as_it_was_for_code_outside():
    assert run_ranks(1, compare_torch_before_and_after) == [[]]


def read_stand_in() -> dict:
    device_shim.install(get_platform())
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    event = schedules.torch.cuda.Event(enable_timing=True)
    return {
        "zeros": schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type,
        "tensor": schedules.torch.tensor([1.0], device=torch.device("cuda", 0)).device.type,
        "current_device": torch.device(schedules.torch.cuda.current_device()).type,
        "passed through": schedules.torch.nn is torch.nn,
        "timed": event.elapsed_time(event),
        "stream": schedules.torch.cuda.Stream(device=schedules.torch.cuda.current_device(), priority=-1).query(),
    }


def test_inside_megatron_core_cuda_means_the_cpu():
    assert run_ranks(1, read_stand_in) == [
        {"zeros": "cpu", "tensor": "cpu", "current_device": "cpu", "passed through": True, "timed": 0.0, "stream": True}
    ]


class MetaPlatform(CpuPlatform):
    """Stands for a chip: its tensors have a device and a type string that are neither the CPU's nor CUDA's."""

    name = torch_type = "meta"

    def __init__(self) -> None:
        self.device = torch.device("meta")


def use_another_device() -> dict:
    device_shim.install(MetaPlatform())
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    module = importlib.import_module("megatron.core.transformer.module")
    grad_scaler = importlib.import_module("megatron.core.optimizer.grad_scaler")
    scaler = grad_scaler.DynamicGradScaler(4.0, 1.0, 2.0, 0.5, 10, 2)
    scaler.load_state_dict({"scale": torch.ones(1), "growth_tracker": 0, "hysteresis_tracker": 2})
    half = module.fp32_to_float16(torch.ones(2, device="meta"), lambda x: x.bfloat16())
    with device_shim._TypeNames(torch.device("meta")):
        type_name = half.type()
    return {
        "zeros": schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type,
        "current_device": torch.device(schedules.torch.cuda.current_device()).type,
        "left on the host": schedules.torch.zeros([]).device.type,
        "scale": scaler._scale.device.type,
        "type": type_name,
        "back": str(module.float16_to_fp32(half).dtype),
    }


def test_the_same_mechanism_serves_any_device():
    assert run_ranks(1, use_another_device) == [
        {
            "zeros": "meta",
            "current_device": "meta",
            "left on the host": "cpu",
            "scale": "meta",
            "type": "torch.cuda.BFloat16Tensor",
            "back": "torch.float32",
        }
    ]


def test_every_patched_place_exists_in_this_megatron_core():
    for name in device_shim.MODULES:
        assert hasattr(importlib.import_module(name), "torch"), name
    for module_name, class_name, function in device_shim.SCOPED:
        module = importlib.import_module(module_name)
        assert callable(getattr(getattr(module, class_name) if class_name else module, function))


def test_a_pipeline_output_that_is_freed_after_its_send_is_whole_in_what_gloo_sends():
    """Silent error 1: gloo reads the storage after isend has returned; the schedule frees it before."""
    sent = []
    communicate = device_shim.send_detached(
        lambda self, *, tensor_send_next, tensor_send_prev, **_: sent.append(tensor_send_next)
    )
    output = torch.arange(6.0).requires_grad_() * 2
    communicate(None, tensor_send_next=output, tensor_send_prev=None, recv_prev=False, recv_next=False)
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    assert output.numel() == 1
    assert torch.equal(sent[0], torch.arange(6.0) * 2)


def steps_after_restoring(config) -> tuple[int, int, list[float]]:
    """(updates counted, distinct step tensors, their values) after one update of an optimizer restored to step 4."""
    with parallel_context(config.parallel) as ctx:
        optimizer = build_engine(config, ctx).optimizer
        ensure_moments(optimizer)
        set_adam_step(optimizer, 4)
        (part,) = optimizer.chained_optimizers
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                main.grad = torch.ones_like(main)
        part.optimizer.step()
        counts = [part.optimizer.state[m]["step"] for group in part.optimizer.param_groups for m in group["params"]]
        return adam_step(optimizer), len({c.data_ptr() for c in counts}), [float(c) for c in counts]


def test_adam_counts_one_step_an_update_after_a_restore(tmp_path):
    """Silent error 2: with a step tensor shared by all parameters it would count one a parameter."""
    ((step, distinct, counts),) = run_ranks(1, steps_after_restoring, tiny_config(tmp_path))
    assert step == 5
    assert len(counts) > 10
    assert distinct == len(counts)
    assert set(counts) == {5.0}


def test_the_reported_loss_is_not_scaled_with_the_schedules_own():
    """Silent error 3: the schedules divide the loss in place after the loss function has returned it."""
    ones = torch.ones(2, 3)
    batch = Batch(tokens=ones.long(), labels=ones.long(), loss_mask=ones)
    total, tokens, report = loss_function(NextToken(), batch, torch.full((2, 3), 2.0, requires_grad=True))
    total.data.div_(8)
    tokens.mul_(2)
    assert float(report["sums"]["total"]) == 12.0
    assert int(report["sums"]["count"]) == 6


def gradients_of_two_micro_batches(fused: bool, dtype: torch.dtype) -> tuple[list, bool]:
    """(main_grad after two backward passes of a linear layer, whether the layer itself has added to it)."""
    device_shim.install(get_platform())
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    generator = torch.Generator().manual_seed(1)
    weight: Any = torch.nn.Parameter(torch.randn(5, 7, generator=generator).to(dtype))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(5, 7), False
    for _ in range(2):
        x = torch.randn(3, 2, 7, generator=generator).to(dtype).requires_grad_()
        output = layers.linear_with_grad_accumulation_and_async_allreduce(
            x, weight, None, gradient_accumulation_fusion=fused, allreduce_dgrad=False, sequence_parallel=False
        )
        output.backward(torch.randn(3, 2, 5, generator=generator).to(dtype))
        if not fused:
            gradient: Any = weight.grad
            weight.main_grad.add_(gradient)
        weight.grad = None
    return weight.main_grad.tolist(), weight.grad_added_to_main_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_adds_its_weight_gradient_to_main_grad_itself(dtype):
    ((fused, by_itself),) = run_ranks(1, gradients_of_two_micro_batches, True, dtype)
    ((plain, by_hand),) = run_ranks(1, gradients_of_two_micro_batches, False, dtype)
    assert by_itself
    assert not by_hand
    fused, plain = torch.tensor(fused), torch.tensor(plain)
    torch.testing.assert_close(fused, plain)
    assert fused.abs().max() > 1
