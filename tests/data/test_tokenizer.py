"""What a tokenizer folder gives: the text that new tokens add."""

import json

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from flagscale_like.data.tokenizer import Tokenizer, train_bpe


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
