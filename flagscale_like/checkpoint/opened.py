"""Opens weights as a user names them: a run, a checkpoint or a Hugging Face folder, perhaps with LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flagscale_like.checkpoint.adapters import AdaptedWeights, holds_adapters, open_base, open_weights
from flagscale_like.checkpoint.companions import TOKENIZER_FILES, companions_at
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.manifest import find_checkpoint
from flagscale_like.checkpoint.peft_folder import PeftFolder, is_peft_folder
from flagscale_like.errors import CheckpointError


@dataclass(frozen=True)
class Opened:
    """Weights, and the tokenizer that lies with them.

    Attributes:
        tokenizer: its folder; None where there is none.
        notes: what to tell the user about both.
    """

    source: CheckpointReader | HfFolder | AdaptedWeights
    tokenizer: Path | None
    notes: list[str] = field(default_factory=list)


def open_adapted(
    path: Path, *, hugging_face: bool = False, adapter: Path | None, base: Path | None = None, force: bool = False
) -> Opened:
    """Open the weights at a path, with adapters where it holds some or `adapter` does.

    Args:
        path: a run, a checkpoint or a Hugging Face folder.
        hugging_face: it can only be the last.
        adapter: a run, a checkpoint of adapters or a folder in peft's format, whose base is at `path`.
        base: where the base of a checkpoint's adapters is now; None for where it was.
        force: take a base that is not the one the adapters were trained on.

    Raises:
        CheckpointError, ConversionError: something cannot be read, or does not belong together.
    """
    source = HfFolder(path) if hugging_face else open_weights(path)
    notes: list[str] = list(getattr(source, "notes", ()))
    if adapter is not None and is_peft_folder(adapter):
        if holds_adapters(source):
            raise CheckpointError(f"{path}: holds adapters alone, and cannot be the base of others")
        notes.append(
            f"{adapter}: peft records no identity of the base: not verified that it is {path}; the shapes agree"
        )
        return Opened(AdaptedWeights(source, PeftFolder(adapter, source.arch)), tokenizer_of(source, notes), notes)
    if adapter is not None:
        adapters, base = CheckpointReader(find_checkpoint(adapter)), path
        if not holds_adapters(adapters):
            raise CheckpointError(f"{adapters.folder}: holds no LoRA adapters")
    elif isinstance(source, CheckpointReader) and holds_adapters(source):
        adapters = source
    else:
        return Opened(source, tokenizer_of(source, notes), notes)
    way_out = "give the base's folder, and this one with --adapter" if base is None else "give another folder"
    opened = open_base(adapters, base, way_out=way_out, force=force)
    found = tokenizer_of(adapters, notes) or tokenizer_of(opened, notes)
    return Opened(AdaptedWeights(opened, adapters), found, notes)


def tokenizer_of(source: CheckpointReader | HfFolder, notes: list[str]) -> Path | None:
    """The tokenizer folder that lies with the weights, or that a run of an earlier version used; None if there is none.

    Args:
        notes: gets a line where the run's tokenizer is gone.
    """
    state = getattr(source, "state", None)
    if state is None:
        return source.folder if any((source.folder / name).is_file() for name in TOKENIZER_FILES) else None
    named = state.get("config", {}).get("data", {}).get("tokenizer")
    found = companions_at(source.folder)
    if found is None and named:  # a checkpoint of an earlier version has the path alone, as the run's YAML gave it
        found = Path(named) if Path(named).is_dir() else None
        if found is None:
            notes.append(
                f"warning: {source.folder}: the run's tokenizer was at {named}, and is not there: give --tokenizer FOLDER"
            )
    return found
