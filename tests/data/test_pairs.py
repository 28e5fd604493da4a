"""Pairs of answers: which lines are read, what is refused by file and line, and the rows that they are packed into."""

import json

import numpy as np
import pytest

from flagscale_like.data.blend import IndexCache, build_split
from flagscale_like.data.chat_shards import CUT
from flagscale_like.data.conversations import check_readable, conversations_at, pair_values
from flagscale_like.data.index_file import read_lengths, read_tokens
from flagscale_like.data.inspect import describe_index
from flagscale_like.data.pair_shards import MARGINS, OTHER_PROMPTS, parse_pair
from flagscale_like.data.pairs import pack_pairs
from flagscale_like.data.preprocess import preprocess_chat
from flagscale_like.data.shards import ChatOptions
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError, required
from tests.commands import invoke
from tests.data.chats import CHATML, make_tokenizer
from tests.data.pairs import write_pairs
from tests.harness import REPOSITORY, tiny_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tok"))


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


TURNS = [user("And three?"), says("Five."), user("Is it four?")]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def convert(folder, tokenizer, *records, **options):
    """The report, and each document of the output as (text, counted text)."""
    path = write(folder / "in.jsonl", *records)
    chat = ChatOptions(CHATML, pairs=True, **options)
    report, _ = preprocess_chat([path], tokenizer, folder / "out", chat, overwrite=True)
    words, prefix = Tokenizer(tokenizer), str(folder / "out")
    lengths, found = read_lengths(prefix), []
    for document in range(len(lengths)):
        ids, mask = read_tokens(prefix, lengths, document), read_tokens(prefix + ".mask", lengths, document)
        found.append(tuple(words.decode(part.tolist(), special=True) for part in (ids, ids[mask > 0])))
    return report, found


def test_the_forms_of_a_pair_give_the_same_tokens(tokenizer, tmp_path):
    texts = {"prompt": "And three?", "chosen": "It is.", "rejected": "No."}
    lists = {"prompt": [user("And three?")], "chosen": [says("It is.")], "rejected": [says("No.")], "margin": 0.5}
    whole = {"chosen": [user("And three?"), says("It is.")], "rejected": [user("And three?"), says("No.")], "weight": 2}
    report, found = convert(tmp_path, tokenizer, texts, lists, whole)
    head = "<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n"
    pair = [(head + "It is.<|im_end|>", "It is.<|im_end|>"), (head + "No.<|im_end|>", "No.<|im_end|>")]
    assert found == pair * 3
    assert (report.documents, report.counts[MARGINS], report.counts[OTHER_PROMPTS]) == (6, 1, 0)
    assert pair_values(tmp_path / "out").tolist() == [[0.0, 1.0], [0.5, 1.0], [0.0, 2.0]]
    assert conversations_at(tmp_path / "out").pairs


def test_no_token_of_the_shared_turns_counts_and_answers_may_have_several_turns(tokenizer, tmp_path):
    longer = [*TURNS, says("No."), user("What is five?"), says("It is.")]
    _, found = convert(tmp_path, tokenizer, {"chosen": longer, "rejected": [*TURNS, says("Five.")]})
    assert [counted for _, counted in found] == ["No.<|im_end|>It is.<|im_end|>", "Five.<|im_end|>"]


REFUSED = {
    "no JSON": ("no", "no JSON"),
    "a list": ([], "is list, not an object with prompt, chosen and rejected"),
    "nothing rejected": ({"prompt": "a", "chosen": "b"}, "has no rejected (its keys are prompt, chosen)"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "chosen is a text, but there is no prompt"),
    "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": " "}, "the rejected answer is empty: leave such"),
    "another prompt": (
        {"chosen": [user("a"), says("b")], "rejected": [user("c"), says("b")]},
        "begin with different messages: they share no prompt",
    ),
    "parted at a user": (
        {"chosen": [*TURNS, says("b")], "rejected": [*TURNS[:2], user("x"), says("b")]},
        "message 3: here chosen and rejected part, and chosen has user message",
    ),
    "no answer": ({"chosen": TURNS, "rejected": [*TURNS, says("b")]}, "message 4: here chosen and rejected part"),
    "unknown role": (
        {"prompt": "a", "chosen": [{"role": "x", "content": "b"}], "rejected": "c"},
        "message 2: unknown role 'x'",
    ),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "margin is '1': give a number"),
    "weight": ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1}, "weight is -1: give a number from 0 on"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_line_that_is_no_pair_is_refused_by_file_and_line(name, tokenizer, tmp_path):
    record, message = REFUSED[name]
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "in.jsonl", good)
    path.write_text(path.read_text() + ("no\n" if record == "no" else json.dumps(record) + "\n"))
    with pytest.raises(DataError) as error:
        preprocess_chat([path], tokenizer, tmp_path / "out", ChatOptions(CHATML, pairs=True))
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_a_pair_longer_than_a_row_is_refused_dropped_or_cut(tokenizer, tmp_path):
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    long = {"prompt": "a", "chosen": "abcdefgh" * 5, "rejected": "hgfedcba" * 5}
    with pytest.raises(DataError, match=r"in.jsonl:2: takes \d+ places of a row of 64: give a larger --length"):
        convert(tmp_path, tokenizer, short, long, length=64)
    report, found = convert(tmp_path, tokenizer, short, long, length=64, long="drop")
    assert (len(found), report.dropped["longer than 64"].documents) == (2, 1)
    report, found = convert(tmp_path, tokenizer, short, long, length=64, long="cut")
    assert (len(found), report.counts[CUT]) == (4, 1)
    lengths = read_lengths(str(tmp_path / "out"))
    assert lengths[2:].tolist() == [32, 32]
    assert all(counted in long["chosen"] + long["rejected"] for _, counted in found[2:])


def test_prompts_that_tokenise_differently_before_the_answers_are_counted(tokenizer, tmp_path):
    """The template's last characters and the answer's first may be one token: here a template without a new line."""
    joined = CHATML.replace("assistant\n'", "assistant'").replace("m['role'] + '\n'", "m['role']")
    path = write(tmp_path / "in.jsonl", {"prompt": "a", "chosen": "assistant", "rejected": "x"})
    report, _ = preprocess_chat([path], tokenizer, tmp_path / "out", ChatOptions(joined, pairs=True))
    assert report.counts[OTHER_PROMPTS] == 0  # <|im_start|>assistant + assistant: both begin a token of their own
    assert parse_pair(path.read_text()).margin == 0.0


def test_a_row_is_a_pack_of_whole_pairs_with_the_padding_in_its_last_document():
    answers = [(np.array([1, 2, 3]), np.array([0, 0, 1])), (np.array([1, 4]), np.array([0, 1]))]
    row = pack_pairs(answers, np.array([[0.5, 2.0]], dtype=np.float32), 8, pad=9)
    assert row["tokens"].tolist() == [1, 2, 3, 1, 4, 9, 9, 9]
    assert row["labels"].tolist() == [2, 3, 9, 4, 9, 9, 9, 9]
    assert row["loss_mask"].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert row["documents"].tolist() == [0, 3, 8]
    assert row["lengths"].tolist() == [3, 2]
    assert [row["extras"][name].tolist() for name in ("margins", "weights")] == [[0.5], [2.0]]


def test_an_epoch_of_rows_has_each_pair_of_its_split_once_and_splits_part_no_pair(tokenizer, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 50)
    preprocess_chat([path], tokenizer, tmp_path / "pairs", ChatOptions(CHATML, pairs=True))
    data = {"sources": [{"path": str(tmp_path / "pairs")}], "tokenizer": str(tokenizer), "split": "70,30,0"}
    config = tiny_config(tmp_path, data=data, train__seq_length=160, objective={"kind": "dpo"}, model__vocab_size=300)
    pairs = {}
    for split in ("train", "valid"):
        source = build_split(config, Tokenizer(tokenizer), split, 4, IndexCache(None, may_build=True))
        rows = [source[number] for number in range(len(source))]
        assert all(row["tokens"].shape == (160,) for row in rows)
        members = [pair for number in range(len(source)) for pair in source.members_of(number)]
        pairs[split] = sorted(members)
        document, start, stop = source.pieces(0)[1]
        assert (document, start) == (2 * source.members_of(0)[0] + 1, 0)
        assert stop == read_lengths(str(tmp_path / "pairs"))[document]
        source.references = np.arange(100, dtype=np.float32)
        expected = [float(2 * pair + side) for pair in source.members_of(1) for side in (0, 1)]
        assert source[1]["extras"]["references"].tolist() == expected
    assert pairs == {"train": list(range(35)), "valid": list(range(35, 50))}


def test_the_command_says_what_it_wrote_and_where_a_reward_is_read(tokenizer, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 20)
    done = invoke(
        ["data", "pairs", str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"), "--length", "96"]
    )
    assert done.exit_code == 0, done.error
    assert "20 pairs, " in done.printed
    assert "10 with a margin" in done.printed
    assert "a reward is read at the last counted token: <|im_end|> of 40 answers" in done.printed
    lines = [str(line) for line in describe_index(tmp_path / "out", None, samples=2)]
    assert any("20 pairs: the chosen answer is the first of two conversations" in line for line in lines)
    assert any("each pair in a row of its own" in line for line in lines)
    again = invoke(["data", "pairs", str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")])
    assert "exists: choose another prefix" in again.error


def test_a_prefix_whose_margins_are_of_other_pairs_is_refused(tokenizer, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 4)
    preprocess_chat([tmp_path / "pairs.jsonl"], tokenizer, tmp_path / "out", ChatOptions(CHATML, pairs=True))
    prefix = str(tmp_path / "out")
    found = required(conversations_at(prefix), "pairs")
    check_readable(prefix, found, places=128, vocab_size=300)
    with pytest.raises(DataError, match="tokenizer has 300 ids, model.vocab_size is 200"):
        check_readable(prefix, found, places=128, vocab_size=200)
    np.save(prefix + ".pairs.npy", np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(DataError, match=r"out.pairs.npy is of other pairs: run `data pairs` again"):
        check_readable(prefix, found, places=128, vocab_size=300)


def test_every_line_of_the_example_is_a_pair():
    lines = (REPOSITORY / "examples" / "preferences" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 84
    assert all(parse_pair(line).margin > 0 for line in lines)
