"""Measures the cost of checkpoints: the stall, the slowdown of steps during a write, and the rates relative to the disk's.

    python benchmarks/checkpoint.py --folder /path/on/the/disk --out checkpoint.json

One process trains a model of about 30 M parameters (12 bytes of weights and moments for each) and saves it in three ways:
synchronously, asynchronously, and with torch.distributed.checkpoint.async_save. For comparison, the same run measures a
copy of the same bytes in memory, and the writing and reading of a file of the same size as `dd` does it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import AsyncStager

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.manifest import step_folders, verify_files
from flagscale_like.config import RunConfig
from flagscale_like.data.pretrain import build_datasets, micro_batches
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.run import Start, start

BLOCK = 16 << 20


def config_of(folder: Path, layers: int) -> RunConfig:
    model = {"num_layers": layers, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 1408}
    return RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {**model, "vocab_size": 4096},
            "train": {
                "steps": 100_000,
                "micro_batch_size": 1,
                "global_batch_size": 2,
                "seq_length": 64,
                "precision": "fp32",
            },
            "optimizer": {"lr": 1e-3, "warmup_steps": 1},
            "data": {"synthetic": True},
            "checkpoint": {"interval": 10, "keep": 1},
        }
    )


def timed(function: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def write_like_dd(path: Path, size: int) -> float:
    """The seconds to write a new file of `size` bytes from memory, with fsync."""
    block = memoryview(os.urandom(BLOCK))

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for at in range(0, size, BLOCK):
                file.write(block[: min(BLOCK, size - at)])
            os.fsync(file.fileno())

    return timed(write)


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_like_dd(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


class CopyingStager(AsyncStager):
    """Copies the tensors before the save. torch's default stager does not copy CPU tensors, and would save later values."""

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def stage(self, state_dict: dict) -> dict:
        for name, tensor in state_dict.items():
            if name not in self.buffers:
                self.buffers[name] = torch.empty_like(tensor)
            self.buffers[name].copy_(tensor)
        return self.buffers

    def synchronize_staging(self) -> None:
        """Nothing is under way when stage() returns."""

    def close(self) -> None: ...


class Bench:
    def __init__(self, config: RunConfig, begun: Start, folder: Path, repeats: int) -> None:
        self.config, self.begun, self.folder, self.repeats = config, begun, folder, repeats
        self.engine, self.store = begun.engine, begun.store
        data, _ = build_datasets(config, self.engine.ctx, train_samples=100_000, valid_samples=0)
        self.batches = micro_batches(data, config, self.engine.ctx)
        shards = self.engine.fragments()
        self.state = {f"{i}.{kind}": tensor for i, shard in enumerate(shards) for kind, tensor in shard.tensors.items()}
        self.size = sum(t.numel() * t.element_size() for t in self.state.values())

    def step(self) -> float:
        def one() -> None:
            self.engine.forward_backward(self.batches, NextToken(), self.config.train.global_batch_size)
            self.store.before_update()
            self.engine.update(clip=0.0, grad_norm=1.0)

        self.begun.progress.step += 1
        return timed(one)

    def save(self) -> None:
        step = self.begun.progress.step
        state = {"step": step, "model": self.config.model.model_dump(mode="json"), **self.engine.state()}
        self.store.save(step, self.engine.fragments, state)

    def copies(self) -> list[float]:
        """The seconds to copy the state, tensor by tensor, into allocated memory. A step precedes each copy."""
        targets, times = [torch.empty_like(t).copy_(t) for t in self.state.values()], []
        for _ in range(self.repeats):
            self.step()
            times.append(timed(lambda: [b.copy_(a) for a, b in zip(self.state.values(), targets)]))
        return times

    def synchronous(self) -> tuple[list[float], list[float]]:
        """The seconds of synchronous saves, and of writing a file of the same size, alternating."""
        saves, writes, probe = [], [], self.folder / "probe"
        for _ in range(self.repeats):
            writes.append(write_like_dd(probe, self.size))
            probe.unlink()
            self.step()
            saves.append(timed(lambda: (self.save(), self.store.finish())))
        self.store.take_outcomes()
        return saves, writes

    def asynchronous(self) -> tuple[list[float], list[float], list[float]]:
        """The stalls of asynchronous saves, the times of steps during a write, and the times until publication."""
        store, stalls, steps, writes = self.store, [], [], []
        for _ in range(self.repeats):
            self.step()
            self.save()
            while store.busy:
                steps.append(self.step())
                store.advance(*self.engine.ctx.sum(store.pulse()))
            (saved,) = store.take_outcomes()
            assert saved.error is None
            stalls.append(saved.stall_s)
            writes.append(saved.write_s)
        return stalls, steps, writes

    def torch_dcp(self) -> tuple[list[float], list[float]]:
        group, stager = dist.new_group(backend="gloo"), CopyingStager()
        stalls, steps = [], []
        for index in range(self.repeats + 1):
            path = self.folder / "dcp"
            shutil.rmtree(path, ignore_errors=True)
            self.step()
            began = time.perf_counter()
            future: Any = dcp.async_save(self.state, checkpoint_id=path, process_group=group, async_stager=stager)
            stall = time.perf_counter() - began
            during = []
            while not future.done():
                during.append(self.step())
            future.result()
            if index:  # the first save allocates the buffers; flagscale_like allocates its buffers in `reserve`
                stalls.append(stall)
                steps += during
        return stalls, steps

    def read(self, folder: Path, processes: int) -> tuple[list[float], list[float], list[float]]:
        """The seconds to load, to verify, and to read the same files as `dd` does; alternating, and always from the disk."""

        def load() -> None:
            self.engine.load(CheckpointReader(folder))

        loads, checks, reads = [], [], []
        files = list(folder.iterdir())
        for _ in range(self.repeats):
            for times, function in (
                (loads, load),
                (checks, lambda: verify_files(folder, processes=processes)),
                (reads, lambda: [read_like_dd(path) for path in files]),
            ):
                for path in files:
                    forget(path)
                times.append(timed(function))
        return loads, checks, reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder to write to; default: a temporary folder")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file with all times")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder))
    config = config_of(folder, options.layers)
    Path(config.run_dir).mkdir()
    try:
        with parallel_context(config.parallel) as ctx:
            measured = measure(Bench(config, start(config, ctx), folder, options.repeats))
            measured["device"] = ctx.platform.describe()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(measured)
    if options.out:
        options.out.write_text(json.dumps(measured, indent=1))


def measure(bench: Bench) -> dict:
    size, repeats = bench.size, bench.repeats
    for _ in range(3):
        bench.step()
    result: dict = {"bytes": size, "torch threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    result["step_s"] = [bench.step() for _ in range(2 * repeats)]
    result["copy_s"] = bench.copies()
    result["sync save_s"], result["disk write_s"] = bench.synchronous()
    result["async stall_s"], result["step beside async_s"], result["async write_s"] = bench.asynchronous()
    result["dcp stall_s"], result["step beside dcp_s"] = bench.torch_dcp()
    newest = next(itertools.islice(step_folders(bench.store.root), 1))
    result["load_s"], result["verify_s"], result["disk read_s"] = bench.read(newest, os.cpu_count() or 1)
    return result


def report(measured: dict) -> None:
    median = {key: statistics.median(times) for key, times in measured.items() if isinstance(times, list) and times}
    worst = {key: max(times) for key, times in measured.items() if isinstance(times, list) and times}
    gigabytes = measured["bytes"] / 1e9
    sync, copy = median["sync save_s"], median["copy_s"]
    print(f"state {gigabytes * 1e3:.0f} MB, {measured['device']}, {measured['cpus']} CPUs; median (worst)")
    for key in median:
        print(f"{key:22} {median[key]:8.4f} ({worst[key]:.4f})")
    stall = median["async stall_s"]
    print(f"stall: {stall / copy:.2f} x a copy in memory, {stall / sync:.1%} of a synchronous save")
    print(f"stall of torch DCP: {median['dcp stall_s'] / copy:.2f} x a copy, {median['dcp stall_s'] / sync:.1%}")
    for name in ("async", "dcp"):
        if f"step beside {name}_s" in median:
            ratio = median[f"step beside {name}_s"] / median["step_s"]
            print(f"a step during an {name} write: {ratio:.2f} x a step without a write")
    for name, mine, disk in (
        ("synchronous save", "sync save_s", "disk write_s"),
        ("load", "load_s", "disk read_s"),
        ("verify", "verify_s", "disk read_s"),
    ):
        rate, own = gigabytes / median[mine], gigabytes / median[disk]
        print(f"{name}: {rate:.2f} GB/s; the disk alone: {own:.2f} GB/s ({rate / own:.0%})")


if __name__ == "__main__":
    main()
