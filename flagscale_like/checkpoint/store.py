"""Save and restore a training run. Each rank saves what it holds; any layout loads it.

A save has three phases, and the training loop waits for the first alone:

1. snapshot: this rank's fragments are copied to host memory;
2. write: a thread of each rank puts its copy on disk;
3. publish: once every rank's file is there, a thread of rank 0 writes the manifest, renames the folder, moves the latest
   pointer.

Between the phases the ranks have to agree that all are done. No thread communicates: each rank tells its `pulse`, the loop
adds the pulses up in the reduction that every step makes anyway, and `advance` takes the sum, at the same step on all.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.background import Background
from flagscale_like.checkpoint.companions import Origin, write_companions
from flagscale_like.checkpoint.format import WrittenFile, finish_folder, specs_of, write_fragments
from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.checkpoint.manifest import (
    STATE,
    TEMPORARY,
    check_file,
    misnamed,
    publish,
    read_manifest,
    remove,
    remove_leftovers,
    step_folders,
    step_name,
    step_of,
    to_remove,
    write_json,
)
from flagscale_like.checkpoint.shard import Shard
from flagscale_like.config import Checkpoint
from flagscale_like.errors import CheckpointError, required
from flagscale_like.runtime.host_copy import HostCopies
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.random_state import random_states


class WeightSource(Protocol):
    """What weights are loaded from: a native checkpoint, a Hugging Face folder, or one of them with adapters.

    Attributes:
        reads_in_threads: whether several threads may read at once.

    `grain` says of how many elements a fragment's parts are that are read for themselves: 1 where any range is, all of it
    where a part costs as much as the whole.
    """

    folder: Path
    reads_in_threads: bool

    @property
    def arch(self) -> ModelArch: ...

    def keys(self) -> list[str]: ...

    def global_shape(self, key: str) -> tuple[int, ...]: ...

    def origin(self) -> Origin: ...

    def check(self, target: Fragment) -> None: ...

    def grain(self, target: Fragment) -> int: ...

    def read(self, kind: str, target: Fragment, out: Tensor) -> None: ...


@dataclass
class Snapshot:
    """One rank's share of a checkpoint, in host memory of its own: later updates do not reach it."""

    fragments: list[Fragment]
    tensors: list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on every rank but for the times.

    Attributes:
        stall_s: how long training waited for it on this rank.
        write_s: how long writing and publishing took on this rank, beside training.
        error: why there is no such checkpoint; None where there is one.
        notes: what went wrong beside it: older checkpoints that could not be removed. On rank 0.
    """

    step: int
    path: Path
    stall_s: float
    write_s: float
    error: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Save:
    """A save under way."""

    step: int
    state: dict[str, Any]
    temporary: Path
    final: Path
    work: Background
    publishing: bool = False
    stall_s: float = 0.0
    write_s: float = 0.0
    notes: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run. All ranks call each method alike, but for `pulse`, which is local.

    Args:
        root: the run's checkpoints/ folder, on a file system that all ranks see.
        options: what to keep, and what to do while a save is under way.

    Attributes:
        outcomes: the saves that ended; see `take_outcomes`.
        companions: files that every checkpoint holds beside the weights; see checkpoint.companions. On rank 0.

    Raises:
        CheckpointError: the folder cannot be made.
    """

    def __init__(self, root: Path, ctx: ParallelContext, options: Checkpoint) -> None:
        self.root, self.ctx, self.options = Path(root), ctx, options
        self.outcomes: list[Saved] = []
        self.companions: dict[str, bytes] = {}
        self._copies = HostCopies(ctx.platform)
        self._shards: list[Shard] = []
        self._save: _Save | None = None
        problem = None
        if ctx.is_main:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.root)
            except OSError as error:
                problem = f"{self.root}: cannot be made: {error.strerror}"
        # Of this start of the run: what an earlier, killed one left has another name.
        self._launch, problem = ctx.broadcast((uuid.uuid4().hex[:8], problem))
        if problem:
            raise CheckpointError(problem)

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._save is not None

    def save(self, step: int, shards: Callable[[], Iterable[Shard]], state: dict[str, Any]) -> None:
        """Begin a save. Where one is under way, wait for that first: there is one set of host buffers.

        How it ended is found in `outcomes` later; `finish` waits for it.

        Args:
            shards: what this rank holds of every model; asked for once, at the first save.
            state: JSON-able: what the loop needs to go on.
        """
        self.finish()
        began = time.perf_counter()
        snapshot = self._snapshot(shards)
        name = step_name(step)
        temporary = self.root / f"{TEMPORARY}{name}-{self._launch}"
        work = Background(lambda: self._write(temporary, snapshot), name=f"write {name}")
        self._save = _Save(step, state, temporary, self.root / name, work)
        self._save.stall_s = time.perf_counter() - began
        if not self.options.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until no save is under way."""
        began = time.perf_counter()
        while (save := self._save) is not None:
            save.work.wait()
            save.stall_s += time.perf_counter() - began
            began = time.perf_counter()
            self.advance(*self.ctx.sum(self.pulse()))

    def pulse(self) -> list[float]:
        """[1 if this rank's thread is at work, 1 if it failed]; for `advance`, once added up over all ranks."""
        if self._save is None:
            return [0.0, 0.0]
        work = self._save.work
        return [0.0, float(work.error is not None)] if work.done else [1.0, 0.0]

    def advance(self, working: float, failed: float) -> None:
        """Take the save under way to its next phase, if every rank has done with this one.

        Args:
            working, failed: the ranks' pulses, added up. They decide alone, so that all ranks do the same.
        """
        save = self._save
        if save is None or working:
            return
        began = time.perf_counter()
        save.write_s += save.work.seconds
        if failed:
            errors = self.ctx.gather(_describe(save.work.error, self.ctx.rank))
            if self.ctx.is_main:
                shutil.rmtree(save.temporary, ignore_errors=True)
            self._end("; ".join(error for error in errors if error))
        elif not save.publishing:
            save.publishing = True
            files = self.ctx.gather_to_main(save.work.result())
            # The other ranks have no part in it, and are done at once.
            task = (lambda: self._publish(save, files)) if self.ctx.is_main else (lambda: None)
            save.work = Background(task, name=f"publish {save.final.name}")
            save.stall_s += time.perf_counter() - began
        else:
            self._end(None)

    def _end(self, error: str | None) -> None:
        save = required(self._save, "a save under way")
        self._save = None
        self.outcomes.append(Saved(save.step, save.final, save.stall_s, save.write_s, error, save.notes))

    def take_outcomes(self) -> list[Saved]:
        """The saves that ended since the last call."""
        taken, self.outcomes = self.outcomes, []
        return taken

    def reserve(self, shards: Callable[[], Iterable[Shard]]) -> None:
        """Make the host buffers now. Otherwise the first save waits for page faults and pinning."""
        self._snapshot(shards)

    def before_update(self) -> None:
        """Call before parameters change: on CUDA a snapshot may still be on its way to the host."""
        self._copies.hold_compute()

    def _snapshot(self, shards: Callable[[], Iterable[Shard]]) -> Snapshot:
        """Copy this rank's fragments into reused host buffers."""
        if not self._shards:
            # Views of what the optimizer updates in place, for the whole run: finding them takes longer than copying them.
            self._shards = [shard for shard in shards() if shard.primary]
        tensors: list[tuple[str, Tensor]] = []
        self._copies.begin()
        for index, shard in enumerate(self._shards):
            for kind, source in shard.tensors.items():
                name = f"{index}.{kind}"
                tensors.append((name, self._copies.copy(name, source)))
        for name, rng in random_states(self.ctx.platform).items():
            tensors.append((name, self._copies.copy(name, rng)))
        self._copies.end()
        return Snapshot([shard.fragment for shard in self._shards], tensors)

    def _write(self, folder: Path, snapshot: Snapshot) -> WrittenFile:
        """In a thread of each rank: this rank's file."""
        self._copies.wait()
        folder.mkdir(exist_ok=True)
        path = folder / f"rank_{self.ctx.rank:05d}.safetensors"
        tensors = (tensor for _, tensor in snapshot.tensors)
        return write_fragments(
            path, snapshot.fragments, tensors, specs_of(snapshot.tensors), sha256=self.options.sha256
        )

    def _publish(self, save: _Save, files: list[WrittenFile]) -> None:
        """In a thread of rank 0: state, index, manifest, rename, latest pointer, retention, in this order."""
        state = write_json(save.temporary / STATE, save.state, sha256=self.options.sha256)
        beside = write_companions(self.companions, save.temporary, sha256=self.options.sha256)
        finish_folder(save.temporary, files, [state, *beside], sha256=self.options.sha256)
        publish(save.temporary, save.final)
        old = to_remove(self.root, keep=self.options.keep, keep_every=self.options.keep_every, good=save.final)
        save.notes = tuple(remove(old, wait=False))

    def newest_good(self, at_most: int | None = None) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every file has its size and checksum; and why newer ones were rejected.

        The ranks share the checking and agree on the result.

        Args:
            at_most: the newest up to this step; where there is none, the oldest after it.
        """
        names = self.ctx.from_main(lambda: [p.name for p in step_folders(self.root)])
        folders = [self.root / name for name in names]
        if at_most is not None:
            early = [folder for folder in folders if step_of(folder) <= at_most]
            folders = [*early, *reversed(folders[: len(folders) - len(early)])]
        rejected: list[str] = []
        for folder in folders:
            problems = verify(folder, self.ctx)
            if not problems:
                return folder, rejected
            rejected.append(f"{folder.name}: {problems[0]}")
        return None, rejected

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run has gone back, and they are of a branch that was given up."""
        if self.ctx.is_main:
            problems = remove(folder for folder in step_folders(self.root) if step_of(folder) > step)
        # A later step's checkpoint that stays would be taken for the newest.
        problems = self.ctx.broadcast(problems if self.ctx.is_main else None)
        if problems:
            raise CheckpointError("; ".join(problems))


def _describe(error: BaseException | None, rank: int) -> str | None:
    if error is None:
        return None
    return f"rank {rank}: {error if isinstance(error, OSError) else f'{type(error).__name__}: {error}'}"


def verify(folder: Path, ctx: ParallelContext) -> list[str]:
    """What is wrong with a checkpoint's files; the ranks check a share each and all get the whole list."""
    problems = misnamed(folder)
    try:
        records = read_manifest(folder)
        for record in records[ctx.rank :: ctx.world_size]:
            problem = check_file(folder, record)
            if problem:
                problems.append(problem)
    except CheckpointError as error:
        problems.append(str(error))
    return sorted({problem for found in ctx.gather(problems) for problem in found})


def layout_record(ctx: ParallelContext) -> dict[str, int]:
    """The layout, as checkpoints record it."""
    par = ctx.layout
    return {"tp": par.tp, "pp": par.pp, "vpp": par.vpp, "cp": par.cp, "dp": ctx.dp}
