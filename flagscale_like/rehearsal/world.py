"""The world of one rank without the others: process groups that send nothing, tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers c10d's operators for tensors without data
from megatron.core import parallel_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flagscale_like.config import Parallel
from flagscale_like.rehearsal.device import RehearsedPlatform
from flagscale_like.rehearsal.expected import Expected
from flagscale_like.rehearsal.fakes import FAKES
from flagscale_like.runtime.parallel import ParallelContext, grid, prepare

# Elements up to which a tensor that the host makes for itself has data.
HOST_NUMBERS = 1 << 24
# Sums that are not 0, whatever this rank adds to them: a step of which nothing counts is not updated.
COUNTED = ("total", "count", "grad-square")
READ = torch.ops.aten._local_scalar_dense.default
SELECT = torch.ops.aten.masked_select.default


class RehearsedContext(ParallelContext):
    """What the other ranks would say is what this one says."""

    def barrier(self) -> None: ...

    def broadcast(self, value: object) -> object:
        return value

    def from_main(self, work: Callable[[], Any]) -> Any:
        return work()

    def add_up(self, numbers: Tensor, names: Sequence[str]) -> list[float]:
        """As on other ranks: the last stage counts tokens and has a loss, and there is a gradient."""
        found = super().add_up(numbers, names)
        return [1.0 if name in COUNTED else number for name, number in zip(names, found, strict=True)]

    @property
    def speaks(self) -> bool:
        """The rank that would is not there."""
        return True

    def gather_models(self, value: object) -> list:
        return [value] * self.dp

    def gather_to_main(self, value: object) -> list:
        return [value] * self.world_size if self.is_main else []


class Host(TorchDispatchMode):
    """The host's part of a rehearsal: its own small tensors have data, and what it reads of the device's is expected.

    It stands over torch's FakeTensorMode, which takes what is left.
    """

    def __init__(self, expected: Expected) -> None:
        super().__init__()
        self.expected = expected

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See Recorder."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        function, kwargs = func, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function is READ and isinstance(args[0], FakeTensor):
            return self.expected.number(args[0])
        if function in FAKES:
            return FAKES[function](*args, **kwargs)
        if function is SELECT and (chosen := self.expected.trues(args[1])) is not None:
            return args[0].new_empty(chosen)
        if self._is_the_hosts(function, tensors, args, kwargs):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        out = function(*args, **kwargs)
        self.expected.see(function, args, kwargs, out)
        if function.namespace == "c10d" and len(tensors) > 1:
            self.expected.gathered(tensors[1], tensors[0])
        return out

    @staticmethod
    def _is_the_hosts(function: Callable, tensors: list[Tensor], args: Sequence, kwargs: Mapping[str, Any]) -> bool:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return False
        if tensors:
            return not any(isinstance(tensor, FakeTensor) or tensor.device.type != "cpu" for tensor in tensors)
        size = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
        return torch.Size(size).numel() <= HOST_NUMBERS if all(isinstance(n, int) for n in size) else False


class WithoutData(FakeTensorMode):
    """torch's mode of tensors without data, for a device that can hold none."""

    @property
    def avoid_device_init(self) -> bool:
        """Whether constants are left off the device; torch asks this of CUDA's devices alone."""
        return True


@contextlib.contextmanager
def rehearsed_rank(
    platform: RehearsedPlatform, layout: Parallel, rank: int, world_size: int, *, local_rank: int = 0, seed: int = 1234
) -> Iterator[ParallelContext]:
    """Be rank `rank` of `world_size` ranks, none of which is there. Inside, the device's tensors have no data.

    Raises:
        ConfigError: see RunConfig.data_parallel_size, which is asked before.
    """
    prepare(platform)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            torch.autograd.set_multithreading_enabled(False),  # so that a backward pass is in the caller's stack
            WithoutData(allow_non_fake_inputs=True),
            Host(platform.expected),
            grid(platform, layout, world_size, seed, 1800.0, local_rank, kind=RehearsedContext) as ctx,
        ):
            yield ctx
    finally:  # after an error as well, so that the process can rehearse another rank
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
