"""Texts as an embedding model reads them: the ids that transformers' tokenizer gives a text, with what it puts around it.

Which ids begin and end a text is the tokenizer's business (the post-processor of tokenizer.json). So a model that is exported
with its tokenizer gets the same ids from transformers and from sentence-transformers as here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_like.data.chat import copy_tokenizer_files
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_JSON, write_json

CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Affixes:
    """The ids that a tokenizer puts around a text.

    Attributes:
        before, after: token ids.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True)
class EncodedText:
    """A text's ids, int32 [n], and whether a limit cut them."""

    ids: np.ndarray
    cut: bool


class TextEncoder:
    """Encodes texts for an embedding model.

    Args:
        folder: a Hugging Face tokenizer folder.

    Attributes:
        tokenizer: the tokenizer of the folder. The text of a special token becomes that token, as in transformers.
        affixes: what it puts around a text.

    Raises:
        DataError: the folder holds no readable tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        self.tokenizer = Tokenizer(folder)
        self.affixes = Affixes(tuple(self.tokenizer.before_text), tuple(self.tokenizer.after_text))

    def encode(self, texts: Sequence[str], limit: int | None = None) -> list[EncodedText]:
        """Encode each text as it is.

        Args:
            limit: most ids of a text, with those around it; what is behind is cut. None: no limit.

        Raises:
            DataError: the limit has no room for a token of the text.
        """
        room = None if limit is None else limit - len(self.affixes)
        if room is not None and room < 1:
            raise DataError(
                f"a limit of {limit} tokens: the tokenizer puts {len(self.affixes)} around each text: give "
                f"{len(self.affixes) + 1} or more"
            )
        found = []
        for ids in self.tokenizer.encode_many(list(texts)):
            whole = np.concatenate((self.affixes.before, ids[:room], self.affixes.after)).astype(np.int32)
            found.append(EncodedText(whole, room is not None and len(ids) > room))
        return found

    def describe(self) -> str:
        """What a text becomes, in words: `<s> text </s>`."""
        sides = [" ".join(map(self.tokenizer.decode_one, ids)) for ids in (self.affixes.before, self.affixes.after)]
        return f"{sides[0]} text {sides[1]}".strip()


def copy_with_end(folder: str | Path, target: Path) -> None:
    """Write a copy of a tokenizer folder that puts the end-of-text token behind every text, and keeps what it puts before.

    Raises:
        DataError: the tokenizer has no tokenizer.json or puts something behind a text already; `target` is another
            tokenizer; or a file cannot be written.
    """
    path, found = Path(folder) / "tokenizer.json", TextEncoder(folder)
    words, affixes = found.tokenizer, found.affixes
    if affixes.after:
        raise DataError(f"tokenizer {folder}: ends each text already: {found.describe()}: leave out --end")
    if not path.is_file():
        raise DataError(f"tokenizer {folder}: has no tokenizer.json: save it with transformers as a fast tokenizer")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except BAD_JSON as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    values["post_processor"] = _with_end(values.get("post_processor"), words, affixes)
    if target.exists() and (
        not (target / path.name).is_file() or json.loads((target / path.name).read_text()) != values
    ):
        raise DataError(f"{target}: is there and is another tokenizer: remove it, or choose another prefix")
    try:
        copy_tokenizer_files(folder, target)
        write_json(target / path.name, values)
        config = json.loads((target / CONFIG).read_text(encoding="utf-8")) if (target / CONFIG).is_file() else {}
        if "add_eos_token" in config:  # of Llama's tokenizers it decides, not the post-processor
            write_json(target / CONFIG, {**config, "add_eos_token": True})
    except OSError as error:
        raise DataError(f"{error.filename or target}: cannot be written: {error.strerror or error}") from None
    _check_end(target, Affixes(affixes.before, (words.eod,)))


def _check_end(folder: Path, wanted: Affixes) -> None:
    """Check that a tokenizer puts the same around a text here and in transformers.

    Raises:
        DataError: it does not.
    """
    from transformers import AutoTokenizer

    found = TextEncoder(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    theirs = tokenizer("a")["input_ids"]
    ours = found.encode(["a"])[0].ids.tolist()
    if found.affixes != wanted or theirs != ours:
        raise DataError(
            f"tokenizer {folder}: gives {ours} for 'a', transformers {theirs}: its post-processor is not known, and cannot "
            "be made to end a text: leave out --end"
        )


def _with_end(own: dict | None, words: Tokenizer, affixes: Affixes) -> dict:
    """A post-processor that puts ids before a text as `own` does, and the end-of-text token behind it."""
    names = {words.decode_one(token): token for token in (*affixes.before, words.eod)}
    before = [{"SpecialToken": {"id": words.decode_one(token), "type_id": 0}} for token in affixes.before]
    end = {"SpecialToken": {"id": words.decode_one(words.eod), "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [*before, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, end],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in names.items()},
    }
    if own is None or own.get("type") != "ByteLevel":
        return template
    return {"type": "Sequence", "processors": [own, template]}  # ByteLevel trims offsets, which another step would lose
