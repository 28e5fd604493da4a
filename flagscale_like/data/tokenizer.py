"""Tokenizer: reads a Hugging Face tokenizer folder for preprocessing and for megatron-core's datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from flagscale_like.data.formats import printable
from flagscale_like.data.sentence_piece import MODEL_FILE, SentencePiece, is_sentence_piece, read_json_files
from flagscale_like.data.word_memo import WordMemo
from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_JSON, write_json

END_OF_DOCUMENT = "<|endoftext|>"
LONGEST_WORD_BYTES = 1000  # that a tokenizer is trained on in one piece: the time grows with the square
TRAINED_ON_FILE = "trained_on.json"

# The files that say what a tokenizer's special tokens are. The first that names one decides.
CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Backend(Protocol):
    """What reads a folder's vocabulary.

    Attributes:
        size: the largest id plus 1, added tokens included. (Ids may have gaps.)
        special_texts: the texts that are one special token each.
    """

    size: int
    special_texts: tuple[str, ...]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens around it."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and [start, end) of each token in characters."""

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """The text of ids, with special tokens where `special`."""

    def text_of(self, number: int) -> str:
        """One token as the vocabulary has it."""

    def id_of(self, text: str) -> int | None:
        """The id of a token."""

    def own_id(self, name: str) -> int | None:
        """The id that the vocabulary itself gives a special token such as eos_token, where no file names it."""

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that the tokenizer itself puts around it."""


class FastBackend:
    """A tokenizer.json, read by the `tokenizers` library, which loads it in milliseconds in every worker."""

    def __init__(self, tokenizer: FastTokenizer, *, special: bool) -> None:
        self.tokenizer = tokenizer
        tokenizer.no_truncation()  # a tokenizer that was saved for fine-tuning may truncate texts
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not special
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        added = tokenizer.get_added_tokens_decoder().values()
        self.special_texts = tuple(token.content for token in added if token.special)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special)

    def text_of(self, number: int) -> str:
        return self.tokenizer.id_to_token(number) or ""

    def id_of(self, text: str) -> int | None:
        return self.tokenizer.token_to_id(text)

    def own_id(self, name: str) -> int | None:
        return None

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)]


class TransformersBackend:
    """A folder of another form (vocab.json and merges.txt), read by transformers."""

    def __init__(self, folder: Path, *, special: bool) -> None:
        from transformers import AutoTokenizer

        # Any: the class depends on the folder.
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        self._options = {"add_special_tokens": False, "split_special_tokens": not special}
        self.size = 1 + max(self.tokenizer.get_vocab().values())
        added = self.tokenizer.added_tokens_decoder.values()
        self.special_texts = tuple(token.content for token in added if token.special)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), **self._options)["input_ids"]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.tokenizer(
            text, return_offsets_mapping=True, **self._options
        )  # NotImplementedError without offsets
        return found["input_ids"], found["offset_mapping"]

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special)

    def text_of(self, number: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(number) or ""

    def id_of(self, text: str) -> int | None:
        return self.tokenizer.get_vocab().get(text)

    def own_id(self, name: str) -> int | None:
        return getattr(self.tokenizer, f"{name}_id", None)

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), **self._options | {"add_special_tokens": True})["input_ids"]


def open_backend(folder: Path, *, special: bool) -> tuple[Backend, dict[str, str], Mapping[str, Any]]:
    """Read a tokenizer folder.

    Returns:
        its vocabulary, the special tokens that its files name, by name, and tokenizer_config.json.

    Raises:
        DataError: the folder is not there, or holds no tokenizer that can be read.
    """
    if not folder.is_dir():  # transformers would ask a hub for a repository of this name
        raise DataError(f"tokenizer {folder}: no such folder")
    try:
        files = read_json_files(folder, (CONFIG_FILE, SPECIAL_FILE, ADDED_FILE))
        names = _special_names(files)
        if (folder / "tokenizer.json").is_file():
            backend = FastBackend(FastTokenizer.from_file(str(folder / "tokenizer.json")), special=special)
        elif (folder / MODEL_FILE).is_file() and is_sentence_piece(folder / MODEL_FILE):
            backend = SentencePiece(folder, special=special, names=names, files=files)
        else:
            backend = TransformersBackend(folder, special=special)
    except Exception as error:  # tokenizers raises bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"tokenizer {folder}: cannot be read: {reason}") from None
    return backend, names, files[CONFIG_FILE]


def _special_names(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    names = {}
    for name in SPECIAL_TOKENS:
        for file in (CONFIG_FILE, SPECIAL_FILE):
            value = files[file].get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if value:
                names.setdefault(name, str(value))
    return names


def _special_id(backend: Backend, names: Mapping[str, str], name: str) -> int | None:
    return backend.id_of(names[name]) if name in names else backend.own_id(name)


def special_ids(folder: Path) -> dict[str, int]:
    """The ids of a folder's bos, eos and pad, under the names of config.json (bos_token_id), as far as it has them.

    Raises:
        DataError: see open_backend().
    """
    backend, names, _ = open_backend(folder, special=True)
    found = {f"{name}_id": _special_id(backend, names, name) for name in ("bos_token", "eos_token", "pad_token")}
    return {name: number for name, number in found.items() if number is not None}


@contextmanager
def _whole_characters(texts: Sequence[str]) -> Iterator[None]:
    """What a tokenizer raises for half a character, as JSON may write one (\\ud83d), in words."""
    try:
        yield
    except (TypeError, UnicodeEncodeError):
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"a text has an unpaired surrogate, half a character, at {error.start}: {text[:40]!r}: write all of it"
                ) from None
        raise


class Tokenizer:
    """Encodes and decodes text. Code in the folder is never run.

    A folder with a tokenizer.json is read by the `tokenizers` library, one with SentencePiece's tokenizer.model by the
    `sentencepiece` library, and any other by transformers.AutoTokenizer.

    Args:
        folder: a Hugging Face tokenizer folder.
        special: whether the text of a special token, such as <|endoftext|>, is encoded as that token; otherwise as any text.

    Attributes:
        vocab_size: the largest id plus 1, added tokens included. (Ids may have gaps.)
        eod: the id of the end-of-text token, which ends each document.
        bos: the id of the token that begins a text; None where there is none.

    Raises:
        DataError: the folder holds no readable tokenizer, or the tokenizer has no end-of-text token.
    """

    def __init__(self, folder: str | Path, *, special: bool = True) -> None:
        self.folder = Path(folder)
        self._backend, self._names, config = open_backend(self.folder, special=special)
        self._memo: WordMemo | None = None
        self._memo_tried = False
        self.vocab_size = self._backend.size
        self._add_bos, self._add_eos = config.get("add_bos_token"), config.get("add_eos_token")
        eod = _special_id(self._backend, self._names, "eos_token")
        if eod is None:
            raise DataError(
                f"tokenizer {folder}: tokenizer_config.json names no eos_token, the token that ends a document: add it"
            )
        self.eod = eod
        self.bos = _special_id(self._backend, self._names, "bos_token")

    @property
    def before_text(self) -> list[int]:
        """The special tokens with which a text begins by the tokenizer's own rule: none, or bos.

        add_bos_token of tokenizer_config.json decides, or else the vocabulary.
        """
        if self._add_bos is not None:
            return [self.bos] if self._add_bos and self.bos is not None else []
        return self._around_a_text()[0]

    @property
    def after_text(self) -> list[int]:
        """The special tokens with which a text ends by the tokenizer's own rule: none, or eos.

        add_eos_token of tokenizer_config.json decides, or else the vocabulary.
        """
        if self._add_eos is not None:
            return [self.eod] if self._add_eos else []
        return self._around_a_text()[1]

    def _around_a_text(self) -> tuple[list[int], list[int]]:
        """What the vocabulary itself puts before and after a text."""
        plain, whole = self.encode_batch(["a"])[0], self.encode_whole(["a"])[0]
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return next(((whole[:i], whole[i + len(plain) :]) for i in starts), ([], []))

    @property
    def pad(self) -> int:
        """The id with which megatron-core pads an incomplete last sample. The loss mask excludes it."""
        return self.eod

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """The values of the tokenizer that megatron-core puts into the key of its sample index."""
        return {"class": type(self).__name__, "vocab_size": self.vocab_size, "eod": self.eod}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text to token ids, without adding special tokens.

        Raises:
            DataError: a text is none that UTF-8 can write.
        """
        with _whole_characters(texts):
            return self._backend.encode(texts)

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text with the special tokens that the tokenizer puts around it."""
        return self._backend.encode_whole(texts)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode like `encode_batch`, to int32 arrays. Faster for many texts, because it uses data.word_memo where it can."""
        if self._memo is None and isinstance(self._backend, FastBackend) and not self._memo_tried:
            self._memo, self._memo_tried = WordMemo.of(self._backend.tokenizer), True
        found: list[Any] = [None] * len(texts)
        if self._memo is not None:
            found = [self._memo.encode(text) if self._memo.handles(text) else None for text in texts]
        rest = [i for i, ids in enumerate(found) if ids is None]
        if rest:
            for i, ids in zip(rest, self.encode_batch([texts[i] for i in rest]), strict=True):
                found[i] = np.array(ids, dtype=np.int32)
        return found

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Encode a text to int32 ids, and [start, end) of each token in the text's characters. No special token is added.

        Raises:
            DataError: the tokenizer knows no offsets, or the text is none that UTF-8 can write.
        """
        try:
            with _whole_characters([text]):
                ids, offsets = self._backend.encode_with_offsets(text)
        except NotImplementedError:
            raise DataError(
                f"tokenizer {self.folder}: has no tokenizer.json, and gives no offsets: save it with transformers as a fast "
                "tokenizer"
            ) from None
        return np.array(ids, dtype=np.int32), offsets

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens that the folder names, such as bos_token, as a chat template gets them."""
        return dict(self._names)

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The texts that are one special token each."""
        return self._backend.special_texts

    def decode_one(self, token: int) -> str:
        """The text of one token as the vocabulary has it; special tokens too."""
        return self._backend.text_of(token)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Decode token ids to text. `special` keeps the special tokens."""
        return self._backend.decode(list(ids), special=special)

    def continuation(self, ids: Sequence[int], new: Sequence[int]) -> str:
        """The text that `new` adds to the text of `ids`.

        Both are decoded together and cut, because a decoder drops the space at the beginning of a text (SentencePiece), and a
        character may be spread over several tokens.
        """
        before, whole = self.decode(ids), self.decode([*ids, *new])
        return whole[len(before) :] if whole.startswith(before) else self.decode(new)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path, *, inputs: Sequence[Path] = ()) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) and save it as a Hugging Face folder.

    Longer words than LONGEST_WORD_BYTES, such as base64 or DNA without spaces, are read in pieces.

    Args:
        texts: the training texts.
        vocab_size: 257 or more: the 256 bytes and the end-of-text token.
        folder: where to save the tokenizer.
        inputs: the files of the texts, which is_trained_on() compares.
    """
    tokenizer = FastTokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD_BYTES)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / TRAINED_ON_FILE, _trained_on(vocab_size, inputs))
    write_json(folder / CONFIG_FILE, config)  # the last file: a folder that has it is whole
    return Tokenizer(folder)


def is_trained_on(folder: Path, vocab_size: int, inputs: Sequence[Path] = ()) -> bool:
    """Whether train_bpe() made the folder, of this size and of files with these names, sizes and times."""
    try:
        found = json.loads((folder / TRAINED_ON_FILE).read_text(encoding="utf-8"))
    except (OSError, *BAD_JSON):
        return False
    return (folder / CONFIG_FILE).is_file() and found == _trained_on(vocab_size, inputs)


def _trained_on(vocab_size: int, inputs: Sequence[Path]) -> dict[str, Any]:
    stats = [(printable(path), path.stat()) for path in inputs]
    return {"vocab_size": vocab_size, "inputs": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}
