"""Faults for tests: what a rank does to itself at a named moment. The product knows nothing of them."""

import functools
import itertools
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from flagscale_like.checkpoint import manifest
from flagscale_like.config import RunConfig
from flagscale_like.engine.engine import Engine, Outputs
from flagscale_like.json_files import read_records
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.runtime import host_copy
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.metrics import Reporter, read_metrics


def train_run(config: RunConfig) -> None:
    with parallel_context(config.parallel) as ctx:
        pretrain(config, ctx)


def train_and_listen(config: RunConfig, before: Callable[[], None] = lambda: None) -> tuple[list[str], str | None]:
    """Train; what the run said, and the user error that ended it, as "Class: message"."""
    said: list[str] = []
    Reporter.say = lambda self, text: said.append(text)
    before()
    try:
        train_run(config)
    except ValueError as error:
        return said, f"{type(error).__name__}: {error}"
    return said, None


def losses(run_dir: Path | str) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(r["step"], r["lm loss"], r["grad-norm"]) for r in read_metrics(Path(run_dir)) if "lm loss" in r]


def resumed_from(run_dir: Path | str) -> int:
    """The step that the run's last start went on from."""
    return [e for e in read_records(Path(run_dir) / "resilience.jsonl") if e["event"] == "start"][-1]["step"]


def rank_files(folder: Path) -> dict[str, bytes]:
    """What every rank saved: weights, moments and random state."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("rank_*"))}


def kill_self(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, fault: Callable, *, when: Callable = lambda *_, **__: True) -> None:
    """Let the `number`-th call of `owner.name` for which `when` holds run `fault(call)` in its place."""
    original, seen = getattr(owner, name), [0]

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            seen[0] += 1
            if seen[0] == number:
                return fault(lambda: original(*args, **kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def before(call: Callable) -> None:
    kill_self()


def after(call: Callable) -> None:
    call()
    kill_self()


def _moved_to(name: str) -> Callable:
    """Of os.replace: whether a file gets this name."""
    return lambda source, target: Path(target).name == name


def poison(steps: set[int], *names: str) -> None:
    """Let the sums or samples of these names be NaN in what these calls of the engine's forward and backward give."""
    original, calls = Engine.forward_backward, [0]

    @functools.wraps(original)
    def forward_backward(*args: Any, **kwargs: Any) -> Outputs:
        outputs = original(*args, **kwargs)
        calls[0] += 1
        if calls[0] in steps:
            for name in names:
                found = outputs.sums if name in outputs.sums else outputs.samples
                if name in found:
                    found[name] = found[name] * float("nan")
        return outputs

    Engine.forward_backward = forward_backward


def _synced(name: str) -> Callable:
    """Of os.fsync: whether it is of a file whose name begins so."""
    return lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name.startswith(name)


def opened_for_writing(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
    """Of open: whether it begins a rank's file of a checkpoint."""
    return "w" in mode and Path(str(path)).name.startswith("rank_")


def _killed_in_mid_step() -> None:
    """After the gradients of step 5, before its update."""
    steps = itertools.count(1)
    register_optimizer_step_pre_hook(lambda *_: kill_self() if next(steps) == 5 else None)


def _killed_half_through_a_file() -> None:
    """Once the first save's file is on disk, no file may grow past half its size: the kernel kills whoever tries."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    original = os.fsync

    def fsync(handle: int) -> None:
        original(handle)
        if _synced("rank_")(handle):
            half = os.fstat(handle).st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY))

    os.fsync = fsync


# Moments of a run that saves at steps 2, 4 and 6: in step 5, or in the save of step 4. A call is counted over the saves.
MOMENTS: dict[str, Callable[[], None]] = {
    "in mid-step": _killed_in_mid_step,
    # A tensor is copied once when the buffers are made, once for step 2, and the third time for step 4.
    "during staging": lambda: at_call(
        host_copy.HostCopies, "copy", 3, before, when=lambda copies, name, source: name == "1.param"
    ),
    "during a shard's write": _killed_half_through_a_file,
    "before the index": lambda: at_call(os, "fsync", 2, before, when=_synced(manifest.INDEX)),
    "before the manifest": lambda: at_call(os, "replace", 2, before, when=_moved_to(manifest.MANIFEST)),
    "after the manifest": lambda: at_call(os, "replace", 2, after, when=_moved_to(manifest.MANIFEST)),
    "before the latest pointer moves": lambda: at_call(os, "replace", 2, before, when=_moved_to(manifest.LATEST)),
    "after the latest pointer moved": lambda: at_call(os, "replace", 2, after, when=_moved_to(manifest.LATEST)),
}


def die(config: RunConfig, rank: int, moment: str) -> None:
    """Train; the process of this rank is killed at the moment."""
    if int(os.environ["RANK"]) == rank:
        MOMENTS[moment]()
    train_run(config)
