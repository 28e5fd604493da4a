"""The time of every config of the attention kernels, so that their lists and defaults can follow a measurement."""

import contextlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import torch

from flagscale_kernels._tuning import TunedKernel

OPERATORS = ("flash_attention", "piecewise_attention")


def neighbours(config):
    """Configs around one of a list: other tiles, warps and pipeline depths."""
    for bm, bn, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)):
        if bm * bn >= 2048 and (warps == 4 or bm * bn >= 4096):
            yield replace(config, bm=bm, bn=bn, warps=warps, stages=stages)


def _compile(kernel, launches):
    """Compile the launches in threads, because most of a compilation waits for ptxas. What does not compile is left."""
    from triton.runtime._async_compile import AsyncCompileMode

    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for grid, args, options in launches:
            kernel.warmup(*args, grid=grid, **options)


def _timed(device, config, run):
    row = {"config": asdict(config)}
    try:
        return row | device.times(run)
    except Exception as error:
        device.settle()
        return row | {"error": f"{type(error).__name__}: {str(error)[:200]}"}


@contextlib.contextmanager
def _each_config(device, results, wide):
    """Within this context a launch of an attention kernel times every config and adds a row for each to `results`."""
    stock = TunedKernel.launch

    def launch(self, grid, *args, block_d, element_bytes, key=(), **constexprs):
        def run(config):
            self.kernel[grid(config)](*args, **constexprs, **config.launch_options())

        listed = self.configs(self.chip(), block_d, element_bytes)
        candidates = list(dict.fromkeys([*listed, *(neighbours(listed[0]) if wide else [])]))
        _compile(self.kernel, [(grid(c), args, constexprs | c.launch_options()) for c in candidates])
        for config in candidates:
            row = _timed(device, config, lambda config=config: run(config))
            results.append({"kernel": self.name, **row, "default": config == listed[0], "listed": config in listed})
        run(listed[0])  # what follows reads a right result

    TunedKernel.launch = launch
    try:
        yield
    finally:
        TunedKernel.launch = stock


def rows(workload, device, wide=False):
    """Yield a row for each kernel of the workload's forward and backward and each of its configs, the fastest first."""
    tensors = [t.requires_grad_() if i in workload.differentiable else t for i, t in enumerate(workload.tensors())]
    found = []
    with _each_config(device, found, wide):
        out = workload.ours(*tensors)
        torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.randn_like(out))
    for row in sorted(found, key=lambda row: (row["kernel"], row.get("milliseconds", float("inf")))):
        yield {"kind": "config", "operator": workload.operator, "shape": workload.shape, **row}
