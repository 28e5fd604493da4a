"""Companions: what a checkpoint holds beside the weights so that they can be used: the tokenizer, the generation settings.

They lie in the folder `tokenizer` of a checkpoint, under the names that Hugging Face folders give them, and the manifest has
their checksums. A checkpoint can therefore be exported and asked for text wherever it is moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from flagscale_like.checkpoint.manifest import COMPANIONS, Checksum, FileRecord, fsync_folder

GENERATION = "generation_config.json"
# What defines the ids of a tokenizer, and what else belongs to it.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def read_companions(folders: Iterable[Path | None]) -> dict[str, bytes]:
    """The files, by name: those of the first folder that has a tokenizer, and the first generation settings for its ids.

    Args:
        folders: None, and folders that are not there, are passed over.
    """
    there = {folder: fingerprint(folder) for folder in folders if folder is not None and folder.is_dir()}
    chosen = next((folder for folder, ids in there.items() if ids is not None), None)
    names = {name: chosen / name for name in TOKENIZER_FILES} if chosen is not None else {}
    settings = [folder / GENERATION for folder, ids in there.items() if ids == there.get(chosen)]
    if settings := [path for path in settings if path.is_file()]:
        names[GENERATION] = settings[0]
    return {name: path.read_bytes() for name, path in names.items() if path.is_file()}


def write_companions(files: Mapping[str, bytes], checkpoint: Path, *, sha256: bool = False) -> list[FileRecord]:
    """Write the files into a checkpoint that is not finished, fsynced.

    Returns:
        Their records, for the manifest.

    Raises:
        OSError: no space, no permission.
    """
    if not files:
        return []
    folder, records = checkpoint / COMPANIONS, []
    folder.mkdir()
    for name, data in sorted(files.items()):
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        checksum = Checksum(sha256=sha256)
        checksum.update(data)
        records.append(checksum.record(f"{COMPANIONS}/{name}"))
    fsync_folder(folder)
    return records


def companions_at(checkpoint: Path) -> Path | None:
    """The folder of a checkpoint's companions, if it holds a tokenizer."""
    folder = checkpoint / COMPANIONS
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def fingerprint(tokenizer: Path | None) -> str | None:
    """A hash of the files that define a tokenizer's ids; None where there are none."""
    files = [tokenizer / name for name in VOCABULARY_FILES if tokenizer is not None and (tokenizer / name).is_file()]
    if not files:
        return None
    digest = xxhash.xxh3_64()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Origin:
    """The Hugging Face folder that weights come from, as far as it says how the model is used.

    Attributes:
        folder: where it was; empty where the weights come from none.
        token_ids: bos, eos and pad ids of its config.json; an eos may be a list.
        tokenizer: fingerprint of its tokenizer; None where it had none, or an earlier version recorded none.
    """

    folder: str = ""
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None

    @classmethod
    def of(cls, record: Any) -> Origin:
        """What state.json says; nothing, where it says nothing that can be used."""
        if not isinstance(record, Mapping) or not isinstance(record.get("token_ids", {}), Mapping):
            return cls()
        return cls(str(record.get("folder", "")), dict(record.get("token_ids", {})), record.get("tokenizer"))

    def record(self) -> dict[str, Any]:
        """For state.json."""
        return {"folder": self.folder, "token_ids": dict(self.token_ids), "tokenizer": self.tokenizer}

    def has_tokenizer(self, folder: Path | None) -> bool:
        """Whether the tokenizer in a folder has the ids that the origin's has. Without a folder nothing says otherwise."""
        return folder is None or (self.tokenizer is not None and fingerprint(folder) == self.tokenizer)
