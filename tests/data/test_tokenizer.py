"""What a tokenizer folder gives: ids and their bound, special tokens as text or as tokens, the text that new tokens add."""

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from flagscale_like.data.index_file import read_lengths
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.pretrain import build_dataset, check_sources, micro_batches
from flagscale_like.data.tokenizer import Tokenizer, train_bpe
from flagscale_like.errors import DataError
from flagscale_like.runtime.parallel import parallel_context
from tests.commands import invoke
from tests.harness import run_ranks, tiny_config


def sentencepiece_like(folder):
    """A tokenizer whose decoder drops the space before the first word, as Llama 2's and Mistral's do."""
    tokenizer = FastTokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>"]
    tokenizer.train_from_iterator(
        ["hello world the end"] * 9, trainers.BpeTrainer(vocab_size=60, special_tokens=special)
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer(folder)


def test_a_continuation_keeps_the_spaces_between_words(tmp_path):
    words = sentencepiece_like(tmp_path / "tok")
    prompt, new = words.encode_batch(["hello world", "the end"])
    assert words.decode(new) == "the end"  # alone it has lost its space
    assert "hello world" + words.continuation(prompt, new) == "hello world the end"


def test_a_character_that_is_spread_over_tokens_is_whole(tmp_path):
    words = train_bpe(["hello world"], 257, tmp_path / "tok")  # bytes alone
    ids = words.encode_batch(["né"])[0]
    assert words.continuation(ids[:1], ids[1:]) == "é"


def with_gaps(folder):
    """A tokenizer of few entries, whose largest id is 70,001."""
    vocabulary = {"<unk>": 0, "</s>": 1, "one": 5, "two": 70_001}
    tokenizer = FastTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer(folder)


def test_the_largest_id_decides_and_not_the_number_of_entries(tmp_path):
    words = with_gaps(tmp_path / "tok")
    assert words.vocab_size == 70_002
    (tmp_path / "x.txt").write_text("one two one")
    report = preprocess([tmp_path / "x.txt"], words.folder, tmp_path / "x")
    assert report.largest_id == 70_001
    assert np.fromfile(tmp_path / "x.bin", dtype=np.int32).tolist() == [5, 70_001, 5, 1]
    assert read_lengths(str(tmp_path / "x")).tolist() == [4]


def read_first(config):
    with parallel_context(config.parallel) as ctx:
        return next(micro_batches(build_dataset(config, ctx, "train", 4), config, ctx)).tokens.tolist()


def test_a_source_of_a_larger_tokenizer_is_refused_before_the_model_sees_it(tmp_path):
    """By what was recorded; and where nothing was, by the sample itself, whatever the device would make of it."""
    larger, own = with_gaps(tmp_path / "larger"), train_bpe(["one two"], 300, tmp_path / "own")
    (tmp_path / "x.txt").write_text("one two " * 40)
    preprocess([tmp_path / "x.txt"], larger.folder, tmp_path / "x")
    data = {"sources": [{"path": str(tmp_path / "x")}], "tokenizer": str(own.folder), "split": "1,0,0"}
    config = tiny_config(tmp_path / "run", model__vocab_size=320, data=data)
    with pytest.raises(
        DataError, match="holds token 70001, model.vocab_size is 320: it was made with another tokenizer"
    ):
        check_sources(config)
    (tmp_path / "x.report.json").unlink()  # as another program writes a source
    with pytest.raises(AssertionError, match="a sample holds token 70001, model.vocab_size is 320"):
        run_ranks(1, read_first, config)


def test_documents_begin_with_bos_where_it_is_asked_for(tmp_path):
    tokenizer = sentencepiece_like(tmp_path / "tok")
    (tmp_path / "x.txt").write_text("hello world")
    words = ["preprocess", str(tmp_path / "x.txt"), "--tokenizer", str(tokenizer.folder), "--out", str(tmp_path / "x")]
    refused = invoke([*words, "--add-bos"])
    assert "names no bos_token, which --add-bos writes" in refused.error
    (tmp_path / "tok/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<unk>"}))
    assert invoke([*words, "--add-bos"]).exit_code == 0
    ids = np.fromfile(tmp_path / "x.bin", dtype=np.uint16).tolist()
    assert ids == [0, *tokenizer.encode_batch(["hello world"])[0], tokenizer.eod]


def test_special_tokens_inside_a_text_are_text_unless_asked_for(tmp_path):
    tokenizer = train_bpe(["some text"], 300, tmp_path / "tok")
    text = "before <|endoftext|> after"
    (tmp_path / "x.txt").write_text(text)
    found = {}
    for kind in ("text", "ids"):
        out = tmp_path / kind
        words = ["preprocess", str(tmp_path / "x.txt"), "--tokenizer", str(tokenizer.folder), "--out", str(out)]
        outcome = invoke([*words, *([] if kind == "text" else ["--special-tokens", kind])])
        assert outcome.exit_code == 0, outcome.error
        found[kind] = np.fromfile(f"{out}.bin", dtype=np.uint16).tolist()
    assert found["ids"].count(tokenizer.eod) == 2  # inside, and at the end
    assert found["text"].count(tokenizer.eod) == 1
    assert tokenizer.decode(found["text"]) == text
    refused = invoke([*words, "--special-tokens", "error", "--overwrite"])
    assert f"{tmp_path}/x.txt:1: holds the special token '<|endoftext|>'" in refused.error


def test_a_tokenizer_is_trained_on_a_very_long_word_and_reads_it_whole(tmp_path):
    """Without the cut it takes half a minute: the time of a word's merges grows with the square of its length."""
    text = random.Random(0).choices("acgt", k=300_000)
    tokenizer = train_bpe(["".join(text), "one two"], 300, tmp_path / "tok")
    assert tokenizer.vocab_size == 300
    saved = json.loads((tmp_path / "tok/tokenizer.json").read_text())
    assert saved["pre_tokenizer"]["type"] == "ByteLevel"
