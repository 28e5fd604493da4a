"""Save and restore a training run: snapshot, write, commit. Each rank saves what it holds; any layout loads it.

`snapshot` copies to host memory, `write` puts the copy on disk, `commit` publishes the folder. They are separate so that
the training loop has to wait for the first alone.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.format import (
    LATEST,
    STATE,
    CheckpointReader,
    FileRecord,
    check_file,
    fragment_metadata,
    fsync_folder,
    read_manifest,
    steps,
    write_json,
    write_manifest,
    write_safetensors,
)
from flagscale_like.checkpoint.fragments import Fragment
from flagscale_like.checkpoint.layout import (
    MOMENTS,
    adam_step,
    ensure_moments,
    optimizer_shards,
    parameter_pieces,
    set_adam_step,
)
from flagscale_like.config import RunConfig
from flagscale_like.errors import CheckpointError
from flagscale_like.model.build import LanguageModel, build_chunks
from flagscale_like.runtime.parallel import ParallelContext


class WeightSource(Protocol):
    """What weights are loaded from: a native checkpoint, or a Hugging Face folder."""

    @property
    def arch(self) -> ModelArch: ...

    def global_shape(self, key: str) -> tuple[int, ...]: ...

    def read(self, kind: str, target: Fragment, out: Tensor) -> None: ...


@dataclass
class Snapshot:
    """One rank's share of a checkpoint, in host memory of its own: later updates do not reach it."""

    fragments: list[Fragment]
    tensors: list[tuple[str, Tensor]]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        root: the run's checkpoints/ folder, on a file system that all ranks see.
        keep: newest checkpoints kept.
    """

    def __init__(self, root: Path, ctx: ParallelContext, *, keep: int) -> None:
        self.root = Path(root)
        self.ctx = ctx
        self.keep = keep
        self._buffers: dict[str, Tensor] = {}
        if ctx.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        ctx.barrier()

    def save(self, step: int, chunks: list[LanguageModel], optimizer: MegatronOptimizer, state: dict[str, Any]) -> Path:
        """Save, and return the published folder. All ranks call it.

        Args:
            state: JSON-able: what the loop needs to go on.

        Raises:
            CheckpointError: on every rank, where any rank could not write; what was there before is untouched.
        """
        snapshot = self.snapshot(chunks, optimizer)
        state = {**state, "adam_step": adam_step(optimizer), "loss_scaler": loss_scaler_state(optimizer)}
        name = self.ctx.broadcast(f".tmp-step_{step:08d}-{uuid.uuid4().hex[:8]}")
        return self.commit(step, self.root / str(name), self.write(self.root / str(name), snapshot), state)

    def snapshot(self, chunks: list[LanguageModel], optimizer: MegatronOptimizer) -> Snapshot:
        """Copy this rank's fragments into reused host buffers."""
        ensure_moments(optimizer)
        fragments: list[Fragment] = []
        tensors: list[tuple[str, Tensor]] = []
        for shard in optimizer_shards(chunks, optimizer, self.ctx):
            if not shard.primary:
                continue
            for kind, source in shard.tensors.items():
                name = f"{len(fragments)}.{kind}"
                tensors.append((name, self._buffer(name, source)))
            fragments.append(shard.fragment)
        for name, rng in _rng_states(self.ctx).items():
            tensors.append((name, self._buffer(name, rng)))
        self.ctx.platform.synchronize()
        return Snapshot(fragments, tensors)

    def _buffer(self, name: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = self.ctx.platform.host_buffer(source.numel(), source.dtype).view(source.shape)
            self._buffers[name] = buffer
        return buffer.copy_(source, non_blocking=True)

    def write(self, folder: Path, snapshot: Snapshot) -> FileRecord | str:
        """Write this rank's file; a failure comes back as text, for all ranks to see in `commit`."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank_{self.ctx.rank:05d}.safetensors"
            return write_safetensors(path, snapshot.tensors, fragment_metadata(snapshot.fragments))
        except OSError as error:
            return f"rank {self.ctx.rank}: {error}"

    def commit(self, step: int, folder: Path, written: FileRecord | str, state: dict[str, Any]) -> Path:
        """Publish: state, manifest, rename, latest pointer, retention, in this order."""
        results = self.ctx.gather(written)
        failures = [result for result in results if isinstance(result, str)]
        final, failure = self.root / f"step_{step:08d}", "; ".join(failures)
        if self.ctx.is_main and not failure:
            try:
                records = [*results, write_json(folder / STATE, state)]
                write_manifest(folder, records)
                if final.exists():  # a step saved twice (after a rewind): the new one replaces the old one
                    os.replace(final, self.root / f".tmp-replaced-{uuid.uuid4().hex[:8]}")
                os.replace(folder, final)
                fsync_folder(self.root)
                write_json(self.root / LATEST, final.name)
                fsync_folder(self.root)
                self._prune(final)
            except OSError as error:
                failure = f"rank 0: {error}"
        failure = str(self.ctx.broadcast(failure))
        if failure:
            if self.ctx.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(f"{final}: could not be saved: {failure}; earlier checkpoints are untouched")
        return final

    def _prune(self, newest: Path) -> None:
        for old in [p for p in steps(self.root) if p != newest][max(self.keep - 1, 0) :]:
            shutil.rmtree(old, ignore_errors=True)
        for leftover in self.root.glob(".tmp-replaced-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def newest_good(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every file has its size and checksum; and why newer ones were rejected.

        The ranks share the checking and agree on the result.
        """
        candidates = self.ctx.broadcast([p.name for p in steps(self.root)] if self.ctx.is_main else None)
        rejected: list[str] = []
        for name in candidates:  # type: ignore[attr-defined]
            problems = verify(self.root / name, self.ctx)
            if not problems:
                return self.root / name, rejected
            rejected.append(f"{name}: {problems[0]}")
        return None, rejected


def verify(folder: Path, ctx: ParallelContext) -> list[str]:
    """What is wrong with a checkpoint's files; the ranks check a share each and all get the whole list."""
    problems = []
    try:
        records = read_manifest(folder)
        for record in records[ctx.rank :: ctx.world_size]:
            problem = check_file(folder, record)
            if problem:
                problems.append(problem)
    except CheckpointError as error:
        problems.append(str(error))
    return sorted({problem for found in ctx.gather(problems) for problem in found})


@torch.no_grad()
def load_weights(reader: WeightSource, chunks: list[LanguageModel], ctx: ParallelContext) -> None:
    """Fill the model's parameters on this layout, in the model's dtype.

    Raises:
        CheckpointError: a tensor is missing or of another shape; checked for all before any is written.
    """
    pieces = [(p, piece) for chunk in chunks for p, held in parameter_pieces(chunk, ctx).items() for piece in held]
    for _, piece in pieces:
        reader.global_shape(piece.box.key)
    for parameter, piece in pieces:
        out = torch.empty(piece.box.numel, dtype=parameter.dtype)
        reader.read("param", piece.box, out)
        parameter.data.view(-1)[piece.start : piece.start + piece.box.numel].copy_(out)


@torch.no_grad()
def load_optimizer(
    reader: CheckpointReader, chunks: list[LanguageModel], optimizer: MegatronOptimizer, ctx: ParallelContext
) -> None:
    """Fill the fp32 master weights and Adam's moments on this layout, the step count and the loss scale.

    Raises:
        CheckpointError: the checkpoint holds weights only.
    """
    if not all(reader.has(kind) for kind in MOMENTS):
        raise CheckpointError(f"{reader.folder}: holds weights only, no optimizer state; use checkpoint.load for it")
    ensure_moments(optimizer)
    for shard in optimizer_shards(chunks, optimizer, ctx):
        for kind, view in shard.tensors.items():
            out = torch.empty(shard.fragment.numel, dtype=view.dtype)
            reader.read(kind, shard.fragment, out)
            view.copy_(out)
    set_adam_step(optimizer, int(reader.state["adam_step"]))
    set_loss_scaler_state(optimizer, reader.state.get("loss_scaler"))


def load_rng(reader: CheckpointReader, ctx: ParallelContext) -> bool:
    """Put back this rank's random state, where the layout is the one that saved it; says whether."""
    saved = reader.state.get("layout", {})
    if saved != layout_record(ctx):
        return False
    default = reader.rank_tensor(ctx.rank, "rng.default")
    if default is None:
        return False
    ctx.platform.set_rng_state(default)
    tracker = get_cuda_rng_tracker()
    states = {name: reader.rank_tensor(ctx.rank, f"rng.{name}") for name in tracker.get_states()}
    tracker.set_states({name: state for name, state in states.items() if state is not None})
    return True


def layout_record(ctx: ParallelContext) -> dict[str, int]:
    """The layout, as checkpoints record it."""
    par = ctx.layout
    return {"tp": par.tp, "pp": par.pp, "vpp": par.vpp, "cp": par.cp, "dp": ctx.dp}


def _rng_states(ctx: ParallelContext) -> dict[str, Tensor]:
    states = {f"rng.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return {"rng.default": ctx.platform.rng_state(), **states}


def loss_scaler_state(optimizer: MegatronOptimizer) -> dict[str, Any] | None:
    """The fp16 loss scaler's numbers; None for other precisions."""
    scaler = optimizer.chained_optimizers[0].grad_scaler
    if scaler is None:
        return None
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in scaler.state_dict().items()}


def set_loss_scaler_state(optimizer: MegatronOptimizer, state: dict[str, Any] | None) -> None:
    """Put back what loss_scaler_state() returned."""
    scaler = optimizer.chained_optimizers[0].grad_scaler
    if scaler is None or not state:
        return
    tensors = {k: torch.tensor([v], dtype=torch.float) if k == "scale" else v for k, v in state.items()}
    for part in optimizer.chained_optimizers:
        part.grad_scaler.load_state_dict(tensors)


def read_latest(root: Path) -> Path | None:
    """The folder that the latest pointer names, if it is there."""
    try:
        return Path(root) / json.loads((Path(root) / LATEST).read_bytes())
    except (OSError, ValueError):
        return None


def load_model(reader: WeightSource, ctx: ParallelContext, *, precision: str) -> LanguageModel:
    """The whole model in this process: for generation and for comparing logits.

    Args:
        ctx: a context of one rank.
    """
    (model,) = build_chunks(RunConfig.for_inference(reader.arch, precision=precision), ctx)
    load_weights(reader, [model], ctx)
    return model
