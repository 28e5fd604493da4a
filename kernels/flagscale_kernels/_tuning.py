"""Tile shapes of the attention kernels, and the choice among them.

Each chip has a short list of configs, and the first is the default. On an A100 or H100 the list is measured once for
each kernel, head dimension, dtype, mask and length class. The fastest config is kept in the process and on disk, so
that a restarted run computes with the same tiles. FLAGSCALE_KERNELS_AUTOTUNE=0 takes the default without measuring:
then results do not depend on a measurement. Other chips have one conservative config.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flagscale_kernels._checks import say_once
from flagscale_kernels._triton import INTERPRETER, arch, triton

AUTOTUNE_VARIABLE = "FLAGSCALE_KERNELS_AUTOTUNE"
CACHE_VARIABLE = "FLAGSCALE_KERNELS_CACHE"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A tile of `bm` queries by `bn` keys, and the options that Triton compiles it with.

    `stages` is the pipeline depth of the main loop, `edge` that of the loops over the tiles at the edges of a band. An
    `edge` of 1 needs fewer registers on some chips and more on others; on sm_90 it serialises the products of all loops. In
    the kernel of dK and dV an `edge` of 0 masks all tiles in the main loop.
    `descriptors`: the loop's tiles are loaded by tensor descriptors (TMA on sm_90) where the tensors allow it.
    """

    bm: int
    bn: int
    warps: int = 4
    stages: int = 2
    edge: int = 1
    descriptors: bool = False

    def launch_options(self) -> dict[str, int]:
        tile = {"BM": self.bm, "BN": self.bn, "EDGE": self.edge, "DESCRIPTORS": self.descriptors}
        return tile | {"num_warps": self.warps, "num_stages": self.stages}


def _cache_folder() -> Path | None:
    """The folder of the choices, or None where no variable names one and the user has no home."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder)
    try:
        return Path.home() / ".cache" / "flagscale_kernels"
    except RuntimeError:
        return None


def device_name() -> str:
    """The name of the current GPU, which is that of the launch's tensors."""
    return _device_name(torch.cuda.current_device())


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def tile_lists(
    *,
    sm80: dict[int, list[Config]],
    sm90: dict[int, list[Config]],
    other: dict[int, list[Config]],
    float32: Config,
    interpreter: Config,
) -> Callable[[int, int, int], list[Config]]:
    """Return the `configs` function of a TunedKernel.

    Each dictionary has a list for head dimensions up to its key; above the last key the kernel is not offered. `other` is for
    chips that are neither sm_80 nor sm_90: it fits into 99 KiB of shared memory, which sm_86, sm_89 and sm_120 have.
    """

    def configs(chip: int, block_d: int, element_bytes: int) -> list[Config]:
        if chip == INTERPRETER:
            return [interpreter]
        if element_bytes == 4:  # exact fp32 products do not use the matrix units; for tests
            return [float32]
        lists = {80: sm80, 90: sm90}.get(chip, other)
        return next((lists[width] for width in sorted(lists) if block_d <= width), [])

    return configs


def median_milliseconds(call: Callable[[], None]) -> float:
    """The median time of a launch, or infinity where the chip lacks the shared memory or registers for it.

    Raises torch.OutOfMemoryError where there is no room for the 256 MB with which do_bench clears the cache.
    """
    try:
        return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


class TunedKernel:
    """A jit kernel and its configs for each chip.

    `configs(chip, block_d, element_bytes)` returns the list for a chip, which `chip()` names as `_triton.arch()` does.
    `milliseconds(call)` measures one launch.
    """

    every_config = False  # set by `run_every_config`

    def __init__(
        self,
        kernel: Any,
        configs: Callable[[int, int, int], list[Config]],
        *,
        chip: Callable[[], int] = arch,
        milliseconds: Callable[[Callable[[], None]], float] = median_milliseconds,
    ) -> None:
        self.kernel, self.configs, self.chip, self.milliseconds = kernel, configs, chip, milliseconds
        self.name = kernel.__name__
        self.chosen: dict[tuple, Config] = {}
        self.last: Config | None = None  # of the newest launch

    def offers(self, block_d: int, element_bytes: int) -> bool:
        """Whether there are tiles of this width for this chip."""
        return bool(self.configs(self.chip(), block_d, element_bytes))

    def launch(
        self,
        grid: Callable[[Config], tuple[int, ...]],
        *args: object,
        block_d: int,
        element_bytes: int,
        key: tuple = (),
        **constexprs: object,
    ) -> None:
        """Launch with the config chosen for this chip, block_d, element_bytes and `key`.

        `grid(config)` returns the launch grid; `args` and `constexprs` are the kernel's own arguments.
        """

        def run(config: Config) -> None:
            self.last = config
            self.kernel[grid(config)](*args, **constexprs, **config.launch_options())

        configs = self.configs(self.chip(), block_d, element_bytes)
        if TunedKernel.every_config:
            for config in configs:
                run(config)
            return
        if len(configs) == 1 or os.environ.get(AUTOTUNE_VARIABLE) == "0":
            run(configs[0])
            return
        device = device_name()
        full_key = (self.name, block_d, element_bytes, *key)
        if (device, full_key) not in self.chosen:
            if torch.cuda.is_current_stream_capturing():  # a measurement breaks the capture of a CUDA graph
                run(configs[0])
                return
            self.chosen[device, full_key] = self._choose(configs, run, full_key, device)
        run(self.chosen[device, full_key])

    def _choose(self, configs: list[Config], run: Callable[[Config], None], key: tuple, device: str) -> Config:
        folder = _cache_folder()
        path = folder and folder / f"{device.replace(' ', '_')}-triton-{triton.__version__}.json"
        # The entry's name includes the list: the choice from another list of configs does not count.
        entry = json.dumps([key, [asdict(c) for c in configs]])
        if path:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                return Config(**json.loads(path.read_text(encoding="utf-8"))[entry])
        try:
            best = min(configs, key=lambda config: self.milliseconds(lambda: run(config)))
        except torch.OutOfMemoryError:
            say_once(
                f"flagscale_kernels: no GPU memory is left to measure tiles of {self.name}, so this process takes the "
                f"default one; {AUTOTUNE_VARIABLE}=0 takes it everywhere"
            )
            return configs[0]
        if path:
            with contextlib.suppress(OSError):  # where the folder is read-only, the next process measures again
                _store(path, entry, best)
        return best


def length_class(length: int) -> int:
    """The upper limit of the lengths that share a measurement with `length`: 1024, 4096 or all longer ones.

    A short first batch does not decide for long sequences.
    """
    return next(limit for limit in (1024, 4096, 1 << 62) if length <= limit)


def _store(path: Path, entry: str, best: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {}
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(path.read_text(encoding="utf-8"))
    entries[entry] = asdict(best)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    scratch.replace(path)  # atomic: another rank reads the old file or the new one


@contextlib.contextmanager
def run_every_config() -> Iterator[None]:
    """Within this context each launch runs every config of its list, so that all of them are compiled."""
    TunedKernel.every_config = True
    try:
        yield
    finally:
        TunedKernel.every_config = False
