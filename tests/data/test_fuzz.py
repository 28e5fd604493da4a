"""Damaged .idx, .bin, JSON lines and conversations are read or refused in a line: nothing hangs, nothing takes memory."""

import json
import random

import numpy as np
import pytest

from flagscale_like.data.blend import IndexCache, build_split
from flagscale_like.data.index_file import read_lengths, read_tokens
from flagscale_like.data.preprocess import preprocess, preprocess_chat
from flagscale_like.data.pretrain import check_sources
from flagscale_like.data.shards import ChatOptions
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.errors import required
from tests.data.chats import CHATML, make_tokenizer, write_chats
from tests.fuzz import ODD, answers, odd_bytes, odd_json
from tests.harness import tiny_config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A data source and its tokenizer: (prefix, tokenizer folder)."""
    folder = tmp_path_factory.mktemp("fuzz")
    texts = [f"{n} some words of a text" * (1 + n % 5) for n in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(texts, 270, folder / "tokenizer").folder
    preprocess([folder / "text.jsonl"], tokenizer, folder / "text")
    return folder / "text", tokenizer


def test_a_damaged_index_is_read_or_refused(source, tmp_path):
    """What passes the checks is read as training reads it: every document, and the samples of a split."""
    prefix, tokenizer = source
    draw, read = random.Random(1), 0
    index, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    data = {"sources": [{"path": str(tmp_path / "text")}], "tokenizer": str(tokenizer)}
    config = tiny_config(tmp_path / "run", model__vocab_size=384, data=data, train__seq_length=8)
    for turn in range(300):
        # The header, 34 bytes, says how long everything is; half of the damage is there.
        changed = odd_bytes(index, draw, last=34 if turn % 2 else None)
        (tmp_path / "text.idx").write_bytes(changed)
        (tmp_path / "text.bin").write_bytes(tokens if draw.random() < 0.8 else odd_bytes(tokens, draw))
        with answers() as said:
            lengths = read_lengths(str(tmp_path / "text"))
            for document in range(len(lengths)):
                assert len(read_tokens(str(tmp_path / "text"), lengths, document)) == lengths[document]
            words = required(check_sources(config), "tokenizer")
            samples = build_split(config, words, "train", 20, IndexCache(None, may_build=True))
            for number in range(len(samples)):
                assert np.asarray(samples[number]["tokens"]).shape == (8,)
        read += not said
    assert 0 < read < 300


def test_damaged_json_lines_are_documents_or_bad_lines(source, tmp_path):
    _, tokenizer = source
    draw = random.Random(2)
    lines = [json.dumps({"text": f"{n} a text", "meta": {"n": n}}) for n in range(8)]
    lines += ["[" * 5000, '{"text": ' * 5000, '{"text": "' + "x" * 5000]
    for turn in range(24):
        broken = [json.dumps(odd_json(json.loads(line), draw)) for line in lines[:8]] + [draw.choice(lines[8:])]
        data = "\n".join(broken).encode("utf-8", "surrogatepass")
        (tmp_path / "text.jsonl").write_bytes(odd_bytes(data, draw) if turn % 2 else data)
        for bad_lines in ("stop", "skip"):
            with answers():
                preprocess([tmp_path / "text.jsonl"], tokenizer, tmp_path / "out", bad_lines=bad_lines, overwrite=True)


@pytest.mark.parametrize("pairs", [False, True], ids=["conversations", "pairs"])
def test_damaged_conversations_are_bad_lines(pairs, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer", CHATML)
    (line, *_) = write_chats(tmp_path / "chats.jsonl", 1).read_text().splitlines()
    record = json.loads(line)
    if pairs:
        record = {"chosen": record["messages"], "rejected": record["messages"], "margin": 1.0, "weight": 1.0}
    draw, options = random.Random(3), ChatOptions(CHATML, "all", None, "refuse", False, pairs=pairs)
    path = tmp_path / "chats.jsonl"
    for turn in range(60):
        broken = [json.dumps(odd_json(record, draw)), json.dumps(draw.choice(ODD)), line]
        data = "\n".join(broken).encode("utf-8", "surrogatepass")
        path.write_bytes(odd_bytes(data, draw) if turn % 3 == 0 else data)
        for bad_lines in ("stop", "skip"):
            with answers():
                preprocess_chat([path], tokenizer, tmp_path / "out", options, bad_lines=bad_lines, overwrite=True)
