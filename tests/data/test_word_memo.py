"""Encoding by remembered words gives what the tokenizer gives, or steps aside."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flagscale_like.data.tokenizer import Tokenizer as OurTokenizer
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.data.word_memo import WordMemo, to_ascii

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE = ["def f(x):\n    return {'a': 12345, \"b\": x}  # it's the TEST\r\n\r\n\tif not x: pass\n"] * 3


def byte_level(pattern: str | None, normalizer=None, **changes) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None, **changes)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


KINDS = {"gpt2": byte_level(None), "llama3": byte_level(LLAMA3, normalizers.NFC())}
MEMOS = {name: WordMemo.of(tokenizer) for name, tokenizer in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(max_codepoint=127), max_size=80) | st.text(" \n\r\t'sStTlL1a.(<|", max_size=60))
def test_ascii_is_encoded_as_by_the_tokenizer(name, text):
    tokenizer, memo = KINDS[name], MEMOS[name]
    assert memo is not None
    if memo.handles(text):
        assert memo.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_other_text_is_left_to_the_tokenizer():
    memo = MEMOS["gpt2"]
    assert memo.handles("plain")
    assert not memo.handles("na\u00efve")
    assert not memo.handles("a <|end|> in the text")


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(r"\w+|\W+"),  # a class that is not translated
        byte_level(r"[a-z]+"),  # words with gaps between them: the probe finds out
        byte_level(None, normalizers.Lowercase()),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
    ids=["classes", "gaps", "normalizer", "model"],
)
def test_a_tokenizer_of_another_kind_gets_no_memo(tokenizer):
    assert WordMemo.of(tokenizer) is None


def test_what_cannot_be_said_in_ascii_is_not_translated():
    assert to_ascii(r"\p{Lu}") is None
    assert to_ascii(r"(a)(b)") is None
    assert to_ascii(r"[^\s\p{L}]+") == r"[^ \t\n\x0b\x0c\ra-zA-Z]+"


def test_a_corpus_mixes_both_ways_in_order(tmp_path):
    tokenizer = train_bpe(["some text and na\u00efve more"], 280, tmp_path / "bpe")
    texts = ["some text", "na\u00efve", "", "more <|endoftext|> text", "x" * 200]
    found = tokenizer.encode_many(texts)
    assert [ids.tolist() for ids in found] == tokenizer.encode_batch(texts)
    assert all(ids.dtype == np.int32 for ids in found)


def test_a_folder_saved_with_truncation_still_encodes_whole_texts(tmp_path):
    folder = train_bpe(["some text"], 280, tmp_path / "bpe").folder
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    assert len(OurTokenizer(folder).encode_batch(["x" * 50])[0]) == 50
