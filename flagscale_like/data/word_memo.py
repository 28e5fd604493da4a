"""WordMemo: encodes ASCII text by byte-level BPE with a cache of words, which makes preprocessing several times faster.

A byte-level BPE splits text into words by a regular expression and encodes each word by itself. Nearly all words of a text
have occurred before, so their ids are in the cache. Splitting with Python's `re` and joining cached ids avoids the offsets,
locks and copies of the general tokenizer. For ASCII text, the character classes of the expression are the same in every
regular-expression engine and Unicode version. Text that is not ASCII or contains a special token goes to the tokenizer.
"""

from __future__ import annotations

import json
import random
import re
import string

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import pre_tokenizers

# The expression that the ByteLevel pre-tokenizer applies with use_regex (Radford et al. 2019).
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE, LETTER, DIGIT = r" \t\n\x0b\x0c\r", "a-zA-Z", "0-9"
IDENTITY_ON_ASCII = {"NFC", "NFD", "NFKC", "NFKD"}
MAX_WORDS, MAX_WORD_CHARACTERS = 1 << 18, 64


class _Memo(dict):
    """Maps a word to the bytes of its int32 ids. It encodes missing words, and clears itself at MAX_WORDS words."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        super().__init__()
        self._model = tokenizer.model
        self._to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> bytes:
        (mapped, _), *_ = self._to_bytes.pre_tokenize_str(word)
        ids = np.array([token.id for token in self._model.tokenize(mapped)], dtype=np.int32).tobytes()
        if len(word) <= MAX_WORD_CHARACTERS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


class WordMemo:
    """Encodes ASCII text to the same ids as its tokenizer. `WordMemo.of` makes one."""

    def __init__(self, tokenizer: FastTokenizer, words: re.Pattern, special: re.Pattern | None) -> None:
        self._words, self._special, self._memo = words, special, _Memo(tokenizer)

    @classmethod
    def of(cls, tokenizer: FastTokenizer) -> WordMemo | None:
        """Make a memo for a tokenizer. None: it is not a byte-level BPE, or the ids of a probe text differ."""
        found = json.loads(tokenizer.to_str())
        expression = _word_expression(found)
        if expression is None or found["model"].get("dropout"):
            return None
        special = [re.escape(token["content"]) for token in found["added_tokens"]]
        memo = cls(tokenizer, re.compile(expression), re.compile("|".join(special)) if special else None)
        probe = _probe()
        same = memo.encode(probe).tolist() == tokenizer.encode(probe, add_special_tokens=False).ids
        return memo if same else None

    def handles(self, text: str) -> bool:
        """Whether `encode` can encode this text: it is ASCII and contains no special token."""
        return text.isascii() and not (self._special and self._special.search(text))

    def encode(self, text: str) -> np.ndarray:
        """Encode an ASCII text to int32 ids."""
        return np.frombuffer(b"".join(map(self._memo.__getitem__, self._words.findall(text))), dtype=np.int32)


def _word_expression(tokenizer: dict) -> str | None:
    """The `re` expression that splits ASCII text into the tokenizer's words. None: the tokenizer is not a byte-level BPE, or
    splits text by other means.

    Args:
        tokenizer: the parsed tokenizer.json.
    """
    normalizer, before, model = tokenizer["normalizer"], tokenizer["pre_tokenizer"] or {}, tokenizer["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if normalizer is not None and normalizer["type"] not in IDENTITY_ON_ASCII:
        return None
    steps = before.get("pretokenizers", [before])
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(splits) > 1:
        return None
    if not splits:
        return to_ascii(GPT2_WORDS) if last["use_regex"] else None
    split = splits[0]
    plain = split.get("type") == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    if not plain or last["use_regex"] or "Regex" not in split["pattern"]:
        return None
    return to_ascii(split["pattern"]["Regex"])


def to_ascii(expression: str) -> str | None:
    r"""Translate an expression with \p{L}, \p{N}, \s, \S, \r and \n to an `re` expression for ASCII text.

    None: the expression has other escapes or groups, or `re` cannot compile it.
    """
    out, inside, i = [], False, 0
    classes = {r"\p{L}": LETTER, r"\p{N}": DIGIT, r"\s": SPACE}
    while i < len(expression):
        name = next((c for c in (*classes, r"\S", r"\r", r"\n") if expression.startswith(c, i)), None)
        if name in classes:
            out.append(classes[name] if inside else f"[{classes[name]}]")
        elif name == r"\S" and not inside:
            out.append(f"[^{SPACE}]")
        elif name in (r"\r", r"\n"):
            out.append(name)
        elif expression[i] == "\\":
            return None
        else:
            inside = {"[": True, "]": False}.get(expression[i], inside)
            out.append(expression[i])
        i += len(name or " ")
    try:
        pattern = "".join(out)
        return pattern if re.compile(pattern).groups == 0 else None
    except re.error:
        return None


def _probe() -> str:
    """A fixed pseudo-random text in which words, numbers, quotes, punctuation and white space are mixed."""
    source = random.Random(0)
    parts = ["'s", "'LL", "'re", "don't", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", " the", "The", "42"]
    parts += [*string.printable, *map(chr, range(32)), " (", "...", "\n\n", " \n ", "12345", "x1y"]
    return "".join(source.choice(parts) for _ in range(20_000))
