"""Companions: what a checkpoint holds beside the weights so that they can be used: the tokenizer, the generation settings.

They lie in the folder `tokenizer` of a checkpoint, under the names that Hugging Face folders give them, and the manifest has
their checksums. A checkpoint can therefore be exported and asked for text wherever it is moved.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from flagscale_like.checkpoint.manifest import COMPANIONS, Checksum, FileRecord, fsync_folder
from flagscale_like.errors import ConversionError
from flagscale_like.json_files import BAD_JSON

GENERATION = "generation_config.json"
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# What defines the ids of a tokenizer, and what else belongs to it.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def code_files(folder: Path, auto_map: Any) -> list[str]:
    """The Python files of a folder that an auto_map names, and those that they import from beside them.

    They are carried for transformers' trust_remote_code. Nothing here runs them.

    Args:
        auto_map: of config.json or tokenizer_config.json: "module.Class" by transformers' auto class, or a list of such.
    """
    values = list(auto_map.values()) if isinstance(auto_map, Mapping) else []
    values = [v for value in values for v in (value if isinstance(value, list) else [value])]
    # "repository--module.Class" names code of another repository.
    wanted = [v.split(".")[0] for v in values if isinstance(v, str) and "--" not in v]
    found: list[str] = []
    while wanted:
        name = f"{wanted.pop()}.py"
        if name in found or name != Path(name).name or not (folder / name).is_file():
            continue
        found.append(name)
        wanted += _imported_beside(folder / name)
    return sorted(found)


def _imported_beside(path: Path) -> list[str]:
    """Names of the modules that a Python file imports from its own folder."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (ValueError, SyntaxError, RecursionError):
        return []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [name for node in imports for name in ([node.module] if node.module else [a.name for a in node.names])]


def tokenizer_files(folder: Path) -> list[str]:
    """The names of a folder's files that its tokenizer consists of, the code of a class of its own included."""
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    try:
        config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, *BAD_JSON):
        return found
    return found + code_files(folder, config.get("auto_map") if isinstance(config, dict) else None)


def read_companions(folders: Iterable[Path | None], auto_map: Any = None) -> dict[str, bytes]:
    """The files, by name: those of the first folder that has a tokenizer, and the first generation settings for its ids.

    Args:
        folders: None, and folders that are not there, are passed over.
        auto_map: of the weights' config.json; the code that it names goes with the files.
    """
    there = {folder: fingerprint(folder) for folder in folders if folder is not None and folder.is_dir()}
    chosen = next((folder for folder, ids in there.items() if ids is not None), None)
    names = {name: chosen / name for name in tokenizer_files(chosen)} if chosen is not None else {}
    for folder in there:
        names |= {name: folder / name for name in code_files(folder, auto_map) if name not in names}
    settings = [folder / GENERATION for folder, ids in there.items() if ids == there.get(chosen)]
    if settings := [path for path in settings if path.is_file()]:
        names[GENERATION] = settings[0]
    return {name: path.read_bytes() for name, path in names.items() if path.is_file()}


# What generation_config.json may ask for beside temperature, top_p and top_k, and the values that ask for nothing.
NOT_APPLIED = {
    "repetition_penalty": (1, None),
    "no_repeat_ngram_size": (0, None),
    "num_beams": (1, None),
    "min_p": (0, None),
    "typical_p": (1, None),
    "penalty_alpha": (0, None),
    "bad_words_ids": ([], None),
    "suppress_tokens": ([], None),
}


@dataclass(frozen=True)
class Sampling:
    """How a folder's generation settings choose the next token.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p, top_k: see generation.rollout.Sampling.
        stop: ids that end an answer.
        not_applied: settings that are read by nothing here, with their values.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[int, ...] = ()
    not_applied: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Sampling:
        """What generation_config.json says; the likeliest token, where there is none, or it does not say do_sample.

        Raises:
            ConversionError: it holds something else.
        """
        path = folder / GENERATION
        if not path.is_file():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            ends = found.get("eos_token_id")
            stop = tuple(int(number) for number in (ends if isinstance(ends, list) else [ends]) if number is not None)
            not_applied = {k: found[k] for k, off in NOT_APPLIED.items() if k in found and found[k] not in off}
            if not found.get("do_sample"):
                return cls(stop=stop, not_applied=not_applied)
            # transformers' defaults
            numbers = [default if found.get(k) is None else found[k] for k, default in SAMPLING_DEFAULTS.items()]
            sampling = cls(float(numbers[0]), float(numbers[1]), int(numbers[2]), stop, not_applied)
        except (OSError, *BAD_JSON, TypeError, AttributeError) as error:
            raise ConversionError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        if not (sampling.temperature >= 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
            raise ConversionError(f"{path}: temperature, top_p or top_k is out of range ({numbers})")
        return sampling


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
        model_type, auto_map: of its config.json; the second names the code of a class that transformers has not.
    """

    folder: str = ""
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    model_type: str = ""
    auto_map: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Any) -> Origin:
        """What state.json says; nothing, where it says nothing that can be used."""
        if not isinstance(record, Mapping) or not isinstance(record.get("token_ids", {}), Mapping):
            return cls()
        code = record.get("auto_map")
        return cls(
            str(record.get("folder", "")),
            dict(record.get("token_ids", {})),
            record.get("tokenizer"),
            str(record.get("model_type", "")),
            dict(code) if isinstance(code, Mapping) else {},
        )

    def record(self) -> dict[str, Any]:
        """For state.json."""
        return {
            "folder": self.folder,
            "token_ids": dict(self.token_ids),
            "tokenizer": self.tokenizer,
            "model_type": self.model_type,
            "auto_map": dict(self.auto_map),
        }

    def has_tokenizer(self, folder: Path | None) -> bool:
        """Whether the tokenizer in a folder has the ids that the origin's has. Without a folder nothing says otherwise."""
        return folder is None or (self.tokenizer is not None and fingerprint(folder) == self.tokenizer)
