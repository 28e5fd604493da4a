"""A sentence-transformers folder: the files beside a Hugging Face folder that say how its hidden states become vectors.

| file | content |
|---|---|
| modules.json | the modules: transformer, pooling, normalisation |
| sentence_bert_config.json | most tokens of a text |
| 1_Pooling/config.json | last, mean or first token |
| config_sentence_transformers.json | prompts by name, and that scores are cosines |

Their names and keys are those that sentence-transformers has read since version 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flagscale_like.errors import ConversionError
from flagscale_like.json_files import BAD_JSON, write_json

Pooling = Literal["last", "mean", "first"]

MODULES, POOLING, NORMALIZE = "modules.json", "1_Pooling", "2_Normalize"
TRANSFORMER, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
MODES: dict[str, Pooling] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
}
NAMES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "first"}  # since version 6
OTHER_MODES = (
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
)
NO_LIMIT = 10**9  # transformers writes 10^30 where a tokenizer has no limit
KINDS = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class TextSettings:
    """What a sentence-transformers folder says of texts.

    Attributes:
        pooling: which hidden states make a vector.
        prompts: what is put before a text, by name: `query`, `document`.
        max_tokens: most tokens of a text; None: it does not say.
    """

    pooling: Pooling
    prompts: Mapping[str, str]
    max_tokens: int | None


def is_sentence_transformers(folder: Path) -> bool:
    """Whether a folder is one of sentence-transformers."""
    return (folder / MODULES).is_file()


def read_text_settings(folder: Path) -> TextSettings:
    """What a folder says of texts.

    Raises:
        ConversionError: a file cannot be read, or names what this system does not compute.
    """
    modules = _read(folder / MODULES)
    kinds = tuple(str(module.get("type", "")).rpartition(".")[2] for module in modules)
    if kinds not in (KINDS, KINDS[:2]):
        raise ConversionError(f"{folder / MODULES}: has {', '.join(kinds)}: supported: {', '.join(KINDS)}")
    pooling = _read(folder / modules[1]["path"] / "config.json")
    on = [name for name in (*MODES, *OTHER_MODES) if pooling.get(name)] or [pooling.get("pooling_mode")]
    known = MODES | NAMES
    if len(on) != 1 or on[0] not in known:
        raise ConversionError(f"{folder}: pools by {', '.join(map(str, on))}: supported: last token, mean, first token")
    path = folder / PROMPTS
    prompts = (_read(path).get("prompts") or {}) if path.is_file() else {}
    path = folder / modules[0].get("path", "") / TRANSFORMER
    limit = _read(path).get("max_seq_length") if path.is_file() else None
    return TextSettings(known[on[0]], prompts, int(limit) if limit else _tokenizer_limit(folder))


def _tokenizer_limit(folder: Path) -> int | None:
    """Most tokens of a text where the tokenizer says it, as sentence-transformers writes it since version 6."""
    path = folder / "tokenizer_config.json"
    limit = _read(path).get("model_max_length") if path.is_file() else None
    return int(limit) if limit and limit < NO_LIMIT else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *BAD_JSON) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from None


def write_text_settings(folder: Path, settings: TextSettings, *, size: int) -> str | None:
    """Write the files beside a Hugging Face folder, and a padding token into its tokenizer where that has none.

    Args:
        size: numbers of a vector.

    Returns:
        What was changed of the tokenizer, in a line.

    Raises:
        ConversionError: the folder holds no tokenizer.
    """
    types = [f"sentence_transformers.models.{kind}" for kind in KINDS]
    paths = ("", POOLING, NORMALIZE)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]
    for name in (POOLING, NORMALIZE):
        (folder / name).mkdir()
    modes = {name: pooling == settings.pooling for name, pooling in MODES.items()}
    pooling = {"word_embedding_dimension": size, **modes, **dict.fromkeys(OTHER_MODES, False), "include_prompt": True}
    write_json(folder / MODULES, modules)
    write_json(folder / POOLING / "config.json", pooling)
    write_json(folder / TRANSFORMER, {"max_seq_length": settings.max_tokens, "do_lower_case": False})
    prompts = {"prompts": dict(settings.prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / PROMPTS, prompts)
    return _add_padding(folder)


def _add_padding(folder: Path) -> str | None:
    """sentence-transformers pads a batch: a tokenizer without a padding token pads with the token that ends a text."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise ConversionError(f"{folder.name}: sentence-transformers needs a tokenizer: give --tokenizer FOLDER")
    config = _read(path)
    if config.get("pad_token"):
        return None
    write_json(path, {**config, "pad_token": config["eos_token"]})
    end = config["eos_token"]
    return (
        f"the tokenizer has no padding token: the export pads with {end['content'] if isinstance(end, dict) else end}"
    )
