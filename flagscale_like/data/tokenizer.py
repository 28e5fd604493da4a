"""Tokenizer: reads a Hugging Face tokenizer folder for preprocessing and for megatron-core's datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from flagscale_like.data.word_memo import WordMemo
from flagscale_like.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer:
    """Encodes and decodes text.

    The `tokenizers` library reads a folder that has a tokenizer.json, because it loads in milliseconds in every worker.
    transformers.AutoTokenizer reads any other folder. Code in the folder is never run.

    Args:
        folder: a Hugging Face tokenizer folder.
        special: whether the text of a special token, such as <|endoftext|>, is encoded as that token; otherwise as any text.

    Attributes:
        vocab_size: the largest id plus 1, added tokens included. (Ids may have gaps.)
        eod: the id of the end-of-text token, which ends each document.

    Raises:
        DataError: the folder holds no readable tokenizer, or the tokenizer has no end-of-text token.
    """

    def __init__(self, folder: str | Path, *, special: bool = True) -> None:
        self.folder, self._special = Path(folder), special
        if not self.folder.is_dir():
            raise DataError(f"tokenizer {folder}: no such folder")
        self._fast: FastTokenizer | None = None
        self._memo: WordMemo | None = None
        self._memo_tried = False
        try:
            if (self.folder / "tokenizer.json").is_file():
                self._fast = FastTokenizer.from_file(str(self.folder / "tokenizer.json"))
                self._fast.no_truncation()  # a tokenizer that was saved for fine-tuning may truncate texts
                self._fast.no_padding()
                self._fast.encode_special_tokens = not special
                self.vocab_size = 1 + max(self._fast.get_vocab(with_added_tokens=True).values())
                eos = self._special_token("eos_token")
                self.eod = self._fast.token_to_id(eos) if eos else None
            else:
                from transformers import AutoTokenizer

                self._slow = AutoTokenizer.from_pretrained(
                    str(self.folder), trust_remote_code=False, local_files_only=True
                )
                self.vocab_size, self.eod = 1 + max(self._slow.get_vocab().values()), self._slow.eos_token_id
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"tokenizer {folder}: cannot be read: {str(error).splitlines()[0]}") from None
        if self.eod is None:
            raise DataError(
                f"tokenizer {folder}: tokenizer_config.json names no eos_token, the token that ends a document: add it"
            )

    def _special_token(self, name: str) -> str | None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            path = self.folder / file
            if path.is_file():
                value = json.loads(path.read_text(encoding="utf-8")).get(name)
                value = value.get("content") if isinstance(value, dict) else value
                if value:
                    return value
        return None

    @property
    def pad(self) -> int:
        """The id with which megatron-core pads an incomplete last sample. The loss mask excludes it."""
        return self.eod

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """The values of the tokenizer that megatron-core puts into the key of its sample index."""
        return {"class": type(self).__name__, "vocab_size": self.vocab_size, "eod": self.eod}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text to token ids, without adding special tokens."""
        if self._fast is not None:
            return [e.ids for e in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        found = self._slow(list(texts), add_special_tokens=False, split_special_tokens=not self._special)
        return found["input_ids"]

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text with the special tokens that the tokenizer puts around it."""
        if self._fast is not None:
            return [e.ids for e in self._fast.encode_batch_fast(list(texts), add_special_tokens=True)]
        return self._slow(list(texts), split_special_tokens=not self._special)["input_ids"]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode like `encode_batch`, to int32 arrays. Faster for many texts, because it uses data.word_memo where it can."""
        if self._memo is None and self._fast is not None and not self._memo_tried:
            self._memo, self._memo_tried = WordMemo.of(self._fast), True
        found: list[np.ndarray | None] = [None] * len(texts)
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
            DataError: the tokenizer knows no offsets.
        """
        fast = self._fast or getattr(self._slow, "backend_tokenizer", None)
        if fast is None:
            raise DataError(
                f"tokenizer {self.folder}: has no tokenizer.json, and gives no offsets: save it with transformers as a fast "
                "tokenizer"
            )
        found = fast.encode(text, add_special_tokens=False)
        return np.array(found.ids, dtype=np.int32), found.offsets

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens that tokenizer_config.json names, such as bos_token, as a chat template gets them."""
        names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        return {name: text for name in names if (text := self._special_token(name))}

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The texts that are one special token each."""
        fast = self._fast or self._slow.backend_tokenizer
        return tuple(token.content for token in fast.get_added_tokens_decoder().values() if token.special)

    def decode_one(self, token: int) -> str:
        """The text of one token as the vocabulary has it; special tokens too."""
        found = self._fast.id_to_token(token) if self._fast is not None else self._slow.convert_ids_to_tokens(token)
        return found or ""

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Decode token ids to text. `special` keeps the special tokens."""
        ids = list(ids)
        if self._fast is not None:
            return self._fast.decode(ids, skip_special_tokens=not special)
        return self._slow.decode(ids, skip_special_tokens=not special)

    def continuation(self, ids: Sequence[int], new: Sequence[int]) -> str:
        """The text that `new` adds to the text of `ids`.

        Both are decoded together and cut, because a decoder drops the space at the beginning of a text (SentencePiece), and a
        character may be spread over several tokens.
        """
        before, whole = self.decode(ids), self.decode([*ids, *new])
        return whole[len(before) :] if whole.startswith(before) else self.decode(new)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) and save it as a Hugging Face folder.

    Args:
        texts: the training texts.
        vocab_size: 257 or more: the 256 bytes and the end-of-text token.
        folder: where to save the tokenizer.
    """
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return Tokenizer(folder)
