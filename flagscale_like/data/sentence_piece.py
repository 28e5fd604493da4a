"""SentencePiece: reads tokenizer.model with the sentencepiece library, and the special tokens that the files beside it add.

Folders of Baichuan and of the first Llama have a tokenizer.model and a class of their own, whose code is not run here. What
such a class adds to the model is in the files: names of special tokens, tokens that were added later, and whether a text
begins and ends with a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

MODEL_FILE = "tokenizer.model"


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands.

    Attributes:
        special: it has a meaning of its own, such as the end of a text; decoding leaves it out.
        lstrip, rstrip: white space before it, or behind it, belongs to it.
    """

    text: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def is_sentence_piece(path: Path) -> bool:
    """Whether a tokenizer.model is SentencePiece's. (Llama 3 gives tiktoken's ranks the same name, which are text.)"""
    with open(path, "rb") as file:
        return file.read(1) == b"\n"  # the protobuf tag of its first field, the pieces


def added_tokens(config: Mapping[str, Any], names: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Tokens that a folder adds to its model, by text.

    Args:
        config: of tokenizer_config.json, whose added_tokens_decoder gives ids and flags.
        names: of special_tokens_map.json.
        more: of added_tokens.json: ids by text.
    """
    found = {text: AddedToken(text, int(number), special=False) for text, number in more.items()}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        text = str(token["content"])
        strips = {side: bool(token.get(side)) for side in ("lstrip", "rstrip")}
        found[text] = AddedToken(text, int(number), bool(token.get("special")), **strips)
    for listed in (names, config):
        for token in listed.get("additional_special_tokens") or ():
            text = token["content"] if isinstance(token, dict) else token
            if text in found and not found[text].special:
                found[text] = AddedToken(text, found[text].id, True, found[text].lstrip, found[text].rstrip)
    return found


class SentencePiece:
    """A SentencePiece model and the tokens added to it.

    Args:
        folder: has tokenizer.model.
        special: whether the text of a special token is encoded as that token.
        names: the special tokens that the folder names, such as bos_token, by name.
        files: the JSON files beside the model, by name; empty where one is missing.

    Raises:
        RuntimeError, ValueError, KeyError, TypeError: a file is damaged.
    """

    def __init__(
        self, folder: Path, *, special: bool, names: Mapping[str, str], files: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._model = SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
        self._pieces = self._model.get_piece_size()
        config, map_ = files["tokenizer_config.json"], files["special_tokens_map.json"]
        added = added_tokens(config, map_, files["added_tokens.json"])
        for text in names.values():
            known = added.get(text)
            number = known.id if known is not None else self._model.piece_to_id(text)
            if known is None and number == self._model.unk_id() and self._model.id_to_piece(number) != text:
                continue  # the model has no such piece
            added[text] = AddedToken(text, number, True, *((known.lstrip, known.rstrip) if known else ()))
        for number in range(self._pieces):
            if self._model.is_control(number):
                text = self._model.id_to_piece(number)
                added.setdefault(text, AddedToken(text, number, special=True))
        self._added, self._by_id = added, {token.id: token for token in added.values()}
        # Classes of transformers before 4.31, and those copied from them, put a space before every part of a text.
        self._prefix_every_part = config.get("legacy") is not False
        self._matched = [token for token in added.values() if special or not token.special]
        longest_first = sorted((re.escape(token.text) for token in self._matched), key=len, reverse=True)
        self._split = re.compile("|".join(longest_first)) if longest_first else None
        bos, eos = (self.id_of(names[n]) if n in names else self.own_id(n) for n in ("bos_token", "eos_token"))
        self._before = [bos] if bos is not None and config.get("add_bos_token", True) else []
        self._behind = [eos] if eos is not None and config.get("add_eos_token", False) else []
        self.size = 1 + max([self._pieces - 1, *self._by_id])
        self.special_texts = tuple(token.text for token in added.values() if token.special)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text to token ids, without special tokens around it."""
        plain = [i for i, text in enumerate(texts) if not (self._split and self._split.search(text))]
        encoded = self._model.encode([texts[i] for i in plain], num_threads=1)
        found = dict(zip(plain, encoded, strict=True))
        return [found[i] if i in found else self.encode_with_offsets(text)[0] for i, text in enumerate(texts)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and [start, end) of each token in the text's characters."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end, token in self._parts(text):
            if token is not None:
                ids.append(token.id)
                offsets.append((start, end))
                continue
            some, where = self._encode_part(text[start:end], prefix=not ids or self._prefix_every_part)
            ids += some
            offsets += [(start + begin, start + stop) for begin, stop in where]
        return ids, offsets

    def _parts(self, text: str) -> Iterator[tuple[int, int, AddedToken | None]]:
        """The parts between added tokens, and the tokens, with [start, end) of each."""
        at = 0
        for match in self._split.finditer(text) if self._split else ():
            token, start, end = self._added[match.group()], match.start(), match.end()
            if start < at:  # white space that the token before it took
                continue
            if token.lstrip:
                start = at + len(text[at:start].rstrip())
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            if at < start:
                yield at, start, None
            yield start, end, token
            at = end
        if at < len(text):
            yield at, len(text), None

    def _encode_part(self, text: str, *, prefix: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids and offsets of a part without added tokens. `prefix`: with the space that the model puts before a text."""
        before = "" if prefix else self._model.id_to_piece(self._model.unk_id())
        found = self._model.encode(before + text, return_type="offset_mapping")
        ids, offsets = found["ids"], found["offsets"]
        skipped = len(self._model.encode(before)) if before else 0
        moved = [(begin - len(before), end - len(before)) for begin, end in offsets[skipped:]]
        return list(ids[skipped:]), _whole_characters(moved, [self._model.is_byte(i) for i in ids[skipped:]])

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """The text of token ids, with special tokens where `special`; ids that are none stand for nothing."""
        parts: list[str] = []
        held: list[int] = []
        for number in ids:
            token = self._by_id.get(number)
            if token is None:
                held += [number] if 0 <= number < self._pieces else []
            elif special or not token.special:
                parts += [self._decode_part(held, first=not parts), token.text]
                held = []
        return "".join([*parts, self._decode_part(held, first=not parts)])

    def _decode_part(self, ids: list[int], *, first: bool) -> str:
        """The text of a part without added tokens. The model takes off the space that it put before the part."""
        if first or self._prefix_every_part:
            return self._model.decode(ids)
        before = [self._model.unk_id()]
        return self._model.decode(before + ids).removeprefix(self._model.decode(before))

    def id_of(self, text: str) -> int | None:
        """The id of a special or added token, or of a piece."""
        if text in self._added:
            return self._added[text].id
        number = self._model.piece_to_id(text)
        return None if number == self._model.unk_id() and self._model.id_to_piece(number) != text else number

    def own_id(self, name: str) -> int | None:
        """The id that the model itself gives bos_token, eos_token, pad_token or unk_token."""
        own = {"bos_token": "bos_id", "eos_token": "eos_id", "pad_token": "pad_id", "unk_token": "unk_id"}
        number = getattr(self._model, own[name])() if name in own else -1
        return number if number >= 0 else None

    def text_of(self, number: int) -> str:
        """One token as the vocabulary has it."""
        if number in self._by_id:
            return self._by_id[number].text
        return self._model.id_to_piece(number) if 0 <= number < self._pieces else ""

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Like encode(), with bos and eos as add_bos_token and add_eos_token say. Llama's classes add bos by default."""
        return [self._before + ids + self._behind for ids in self.encode(texts)]


def _whole_characters(offsets: list[tuple[int, int]], are_bytes: list[bool]) -> list[tuple[int, int]]:
    """Give every byte of a character the character's place. SentencePiece gives it to the last byte alone."""
    for i in reversed(range(len(offsets) - 1)):
        begin, end = offsets[i]
        if are_bytes[i] and are_bytes[i + 1] and begin == end:
            offsets[i] = offsets[i + 1]
    return offsets


def read_json_files(folder: Path, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """JSON objects of a folder, by the names of their files; empty where a file is missing.

    Raises:
        ValueError: a file holds no JSON object.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no JSON object")
        found[name] = value
    return found
