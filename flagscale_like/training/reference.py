"""The log-probabilities of DPO's reference model: computed once by the starting weights, and kept in the run folder.

RUN_DIR/reference.safetensors holds, for each data source, by its mark (data.blend.source_mark), a float32 number for each
answer, chosen and rejected in turn. Its metadata says what the numbers are of (the weights, the sources, the length of a row)
and has a checksum. A run that starts or goes on with others refuses the file; every checkpoint of the run has the checksum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import Dataset

from flagscale_like.config import RunConfig
from flagscale_like.data.blend import source_mark
from flagscale_like.data.pairs import PairSource
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError, required
from flagscale_like.json_files import replace_file
from flagscale_like.objectives.preference import AnswerLogProbabilities
from flagscale_like.run_folder import RunFolder
from flagscale_like.training.answers import answer_values
from flagscale_like.training.parts import Part


class Reference(Part):
    """Gives the answers of a run's data sources their log-probabilities under the reference.

    Args:
        again: the run goes on, and they were computed again with the adapters off, where rounding may differ.

    Attributes:
        note: what was done for it, in words.
    """

    name = "reference"

    def __init__(self, values: Mapping[str, np.ndarray], checksum: str, note: str, *, again: bool) -> None:
        self.values, self.checksum, self.note, self.again = values, checksum, note, again

    def attach(self, dataset: Dataset) -> None:
        """Give the answers of a dataset, of any split, their log-probabilities."""
        for source in pair_sources(dataset):
            source.references = self.values[source_mark(source.dataset_path)]

    def state(self) -> dict[str, Any]:
        return {"checksum": self.checksum}

    def load(self, state: Mapping[str, Any]) -> None:
        if state["checksum"] != self.checksum and not self.again:
            raise CheckpointError(
                f"the run's checkpoint was trained with other log-probabilities of the reference (checksum "
                f"{state['checksum']}) than its reference.safetensors has ({self.checksum}): restore that file"
            )


class Unstored(Part):
    """The same of pairs that are made up (data.synthetic): nothing is kept, and a run that goes on computes them anew."""

    name = "reference"

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.note = (
            values,
            "the log-probabilities of the reference are of pairs that are made up, and not kept",
        )

    def attach(self, dataset: Dataset) -> None:
        """Give the answers of a dataset their log-probabilities."""
        for source in pair_sources(dataset):
            source.references = self.values


def pair_sources(dataset: Dataset) -> list[PairSource]:
    """The datasets of the sources of a run's dataset."""
    return list(getattr(dataset, "parts", None) or getattr(dataset, "datasets", []))


def reference_of(
    config: RunConfig,
    engine: Engine,
    dataset: Dataset,
    *,
    step: int,
    weights: Mapping[str, Any] | None,
    beat: Callable[[], None],
) -> Reference | Unstored:
    """Read the run's log-probabilities of the reference, or compute them with the weights as they are. All ranks call it.

    Args:
        dataset: of any split; the numbers are of all pairs of its sources.
        step: where the run stands.
        weights: what a new run's weights come from; None where they were drawn.
        beat: called from time to time while the log-probabilities are computed.

    Raises:
        CheckpointError: the file is damaged, or of other weights, sources or rows; or it is missing, and the run has made
            steps without LoRA, so that the weights are no longer the reference's.
    """
    if config.data.synthetic:
        return _of_synthetic(engine, dataset, beat)
    path, ctx = RunFolder(config.run_dir).reference, engine.ctx
    wanted = {
        "sources": {source_mark(source.path): source.path for source in config.data.sources},
        "seq_length": config.train.seq_length,
    }
    if not step:
        wanted["weights"] = {"kind": "drawn", "seed": config.train.seed} if weights is None else dict(weights)
    exists = ctx.from_main(path.is_file)
    if not exists and step and config.lora is None:
        raise CheckpointError(
            f"{path}: is missing, and the weights of step {step} are no longer the reference's: restore the file, or begin a "
            "new run"
        )
    note = f"the reference's log-probabilities are in {path}"
    if not exists:
        with engine.adapters_off():
            values = {
                source_mark(source.dataset_path): answer_values(engine, source.rows, AnswerLogProbabilities(), beat)
                for source in pair_sources(dataset)
            }
        if ctx.is_main:
            recorded = wanted if not step else wanted | {"weights": dict(engine.base or {})}
            _write(path, {name: required(own, name) for name, own in values.items()}, recorded)
        ctx.barrier()
        answers = sum(2 * len(source.rows.sizes) for source in pair_sources(dataset))
        how = ", again, with the adapters off" if step else ""
        note = f"computed the reference's log-probabilities of {answers:,} answers{how}: {path}"
    return Reference(*_read(path, wanted), note, again=bool(step) and not exists)


def _of_synthetic(engine: Engine, dataset: Dataset, beat: Callable[[], None]) -> Unstored:
    """What the weights as they are now give of pairs that are made up."""
    (source,) = pair_sources(dataset)
    with engine.adapters_off():
        found = engine.ctx.broadcast(answer_values(engine, source.rows, AnswerLogProbabilities(), beat))
    # In a rehearsal nobody but this rank has found any.
    return Unstored(np.zeros(2 * len(source.rows.sizes), np.float32) if found is None else found)


def _write(path: Path, values: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> None:
    metadata = {"of": json.dumps(wanted), "checksum": _checksum(values)}
    try:
        replace_file(path, save(dict(values), metadata=metadata))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None


def _checksum(values: Mapping[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values[name]).tobytes())
    return digest.hexdigest()


def _read(path: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """The numbers of each source, and their checksum.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is of something else than `wanted`.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}
        found, checksum = json.loads(metadata["of"]), metadata["checksum"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): restore it, or begin a new run") from None
    if _checksum(values) != checksum:
        raise CheckpointError(f"{path}: is damaged, its checksum is another: restore it, or begin a new run")
    for name, value in wanted.items():
        if not _same(name, found.get(name), value):
            raise CheckpointError(
                f"{path}: was computed with other {name} ({_words(name, found.get(name), value)}): go on with those, or "
                "begin a new run in another run_dir"
            )
    return values, checksum


def _same(name: str, found: Any, wanted: Any) -> bool:
    if name == "sources":  # by their marks, wherever they lie
        return found is not None and found.keys() == wanted.keys()
    if name != "weights":
        return found == wanted
    keys: Sequence[str] = ("kind", "bytes", "xxh3", "seed")  # wherever they lie
    return all((found or {}).get(key) == wanted.get(key) for key in keys)


def _words(name: str, found: Any, wanted: Any) -> str:
    if name == "weights":
        return f"{(found or {}).get('folder', 'drawn')}, now {wanted.get('folder', 'drawn')}"
    if name == "sources" and found is not None:
        changed = [path for mark, path in wanted.items() if mark not in found]
        return f"{changed[0]} is new, or has changed" if changed else f"{len(found)}, now {len(wanted)}"
    return f"{found}, now {wanted}"
