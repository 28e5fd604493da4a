"""Faults for tests: what a rank does to itself at a named moment. The product knows nothing of them."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flagscale_like.checkpoint import format, manifest
from flagscale_like.config import RunConfig
from flagscale_like.engine.engine import Engine, Outputs
from flagscale_like.jsonl import read_records
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


def _is_latest(path: Path, *_: Any, **__: Any) -> bool:
    return path.name == manifest.LATEST


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


# Moments of a run that saves at steps 2, 4 and 6; the faults hit step 5, or the save of step 4.
# The tensors a snapshot copies are the same each time, and so are the pieces of a file: both count from the first save.
MOMENTS: dict[str, Callable[[int], None]] = {
    "in mid-step": lambda pieces: at_call(Engine, "forward_backward", 5, after),
    # One call more than a snapshot has: `reserve` is the first, the save of step 2 the second.
    "during staging": lambda pieces: at_call(host_copy.HostCopies, "copy", 2 * pieces + pieces // 2, before),
    "during a shard's write": lambda pieces: at_call(manifest.Checksum, "update", 1 + pieces + 1 + pieces // 2, before),
    "before the metadata": lambda pieces: at_call(format, "write_manifest", 2, before),
    "after the metadata": lambda pieces: at_call(format, "write_manifest", 2, after),
    "before the latest pointer moves": lambda pieces: at_call(manifest, "write_json", 2, before, when=_is_latest),
    "after the latest pointer moved": lambda pieces: at_call(manifest, "write_json", 2, after, when=_is_latest),
}


def die(config: RunConfig, rank: int, moment: str, pieces: int) -> None:
    """Train, and SIGKILL this process at the moment, if it is the rank."""
    if int(os.environ["RANK"]) == rank:
        MOMENTS[moment](pieces)
    train_run(config)
