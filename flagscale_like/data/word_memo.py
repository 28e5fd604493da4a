"""Byte-level BPE of ASCII text with every word encoded once: what makes preprocessing several times faster.

A byte-level BPE cuts text into words by a regular expression and encodes each by itself, so that text is a concatenation
of words that were nearly all met before. Finding them with `re` and joining their remembered ids skips the offsets, the
locks and the copies that the general tokenizer pays for each. In ASCII the expression's classes are small and fixed, the
same in every engine and Unicode version; other text, and text with a special token in it, is left to the tokenizer.
"""

from __future__ import annotations

import json
import random
import re
import string

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import pre_tokenizers

# The expression that the ByteLevel pre-tokenizer applies by itself (Radford et al. 2019).
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE, LETTER, DIGIT = r" \t\n\x0b\x0c\r", "a-zA-Z", "0-9"
IDENTITY_ON_ASCII = {"NFC", "NFD", "NFKC", "NFKD"}
MOST_WORDS, LONGEST_WORD = 1 << 18, 64


class _Memo(dict):
    """word -> its ids, as int32 bytes."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        super().__init__()
        self._model = tokenizer.model
        self._to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> bytes:
        (mapped, _), *_ = self._to_bytes.pre_tokenize_str(word)
        ids = np.array([token.id for token in self._model.tokenize(mapped)], dtype=np.int32).tobytes()
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


class WordMemo:
    """Encodes ASCII text like its tokenizer; make one with `WordMemo.of`."""

    def __init__(self, tokenizer: FastTokenizer, words: re.Pattern, special: re.Pattern | None) -> None:
        self._words, self._special, self._memo = words, special, _Memo(tokenizer)

    @classmethod
    def of(cls, tokenizer: FastTokenizer) -> WordMemo | None:
        """A memo for a tokenizer that is a byte-level BPE and gives the same ids for a probe; else None."""
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
        """Whether `encode` may be asked for this text."""
        return text.isascii() and not (self._special and self._special.search(text))

    def encode(self, text: str) -> np.ndarray:
        """Ids of an ASCII text, int32."""
        return np.frombuffer(b"".join(map(self._memo.__getitem__, self._words.findall(text))), dtype=np.int32)


def _word_expression(tokenizer: dict) -> str | None:
    """The tokenizer's words, as an expression of `re` for ASCII text; None if it is built in another way."""
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
    r"""An expression with \p{L}, \p{N}, \s, \S, \r and \n as one of `re` for ASCII text; None where it says more."""
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
    """Words, numbers, quotes, punctuation and white space in every neighbourhood."""
    source = random.Random(0)
    parts = ["'s", "'LL", "'re", "don't", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", " the", "The", "42"]
    parts += [*string.printable, *map(chr, range(32)), " (", "...", "\n\n", " \n ", "12345", "x1y"]
    return "".join(source.choice(parts) for _ in range(20_000))
