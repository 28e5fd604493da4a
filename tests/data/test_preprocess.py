"""Text in, .bin/.idx and a table of documents out."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flagscale_like.data.preprocess import find_inputs, preprocess, read_documents
from flagscale_like.data.tokenizer import Tokenizer, train_bpe
from flagscale_like.errors import DataError
from tests.harness import cli

TEXTS = [f"document {i}: " + "the quick brown fox jumps over the lazy dog " * (i % 5 + 1) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "bpe").folder


def write_all_formats(folder):
    """The same forty texts as jsonl, parquet and text files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:20]))
    pq.write_table(pa.table({"text": TEXTS[20:30]}), folder / "b.parquet")
    for i in range(30, 40):
        (folder / f"c{i}.txt").write_text(TEXTS[i])
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_can_be_read_back_and_leads_to_its_source(tmp_path, tokenizer, workers):
    files = find_inputs([str(write_all_formats(tmp_path / "in"))])
    summary = preprocess(files, tokenizer, tmp_path / "out" / "text", workers=workers)
    dataset, words = IndexedDataset(str(tmp_path / "out" / "text")), Tokenizer(tokenizer)
    table = pq.read_table(tmp_path / "out" / "text.documents.parquet").to_pylist()
    assert summary.documents == len(dataset) == len(table) == 40
    assert summary.tokens == int(np.sum(dataset.sequence_lengths))
    for ids, row, text in zip((dataset[i] for i in range(40)), table, TEXTS, strict=True):
        assert ids[-1] == words.eod
        assert words.decode(ids[:-1]) == text
        name = row["source"].rpartition("/")[2]
        if name == "a.jsonl":
            source = (tmp_path / "in" / name).read_text().splitlines()[row["line"] - 1]
            assert json.loads(source)["text"] == text
        elif name == "b.parquet":
            assert TEXTS[20:30][row["line"] - 1] == text
        else:
            assert (tmp_path / "in" / name).read_text() == text


def test_a_text_file_divides_into_paragraphs_with_their_first_lines(tmp_path):
    (tmp_path / "x.txt").write_text("\none\ntwo\n\n\nthree\n")
    found = [(d.line, d.text) for d in read_documents([tmp_path / "x.txt"], unit="paragraph")]
    assert found == [(2, "one\ntwo\n"), (6, "three\n")]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "x.jsonl:2: no JSON object with a 'text' field"),
        ("x.jsonl", b'{"body": "a"}\n', "x.jsonl:1: no JSON object with a 'text' field"),
        ("x.jsonl", b'{"text": 3}\n', "x.jsonl:1: 'text' is int, not text"),
        ("x.txt", b"fine\n\xff\xfe\n", "x.txt:2: not UTF-8"),
        ("x.txt", b"", "no document with text in 1 files"),
        ("x.jsonl", b"", "no document with text in 1 files"),
        ("x.parquet", b"no parquet", "x.parquet: cannot be read"),
    ],
)
def test_bad_input_is_located_and_leaves_nothing_behind(tmp_path, tokenizer, name, content, part):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        preprocess([tmp_path / name], tokenizer, tmp_path / "o" / "text")
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert list((tmp_path / "o").iterdir()) == []


def test_the_command_ends_with_the_code_of_bad_data(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text("no json")
    result = cli(
        "preprocess", str(tmp_path / "x.jsonl"), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "text")
    )
    assert result.returncode == DataError.exit_code == 11
    assert result.stderr.startswith(f"error: {tmp_path}/x.jsonl:1: no JSON object")
    assert len(result.stderr.splitlines()) == 1


def test_an_input_that_matches_nothing_is_refused():
    with pytest.raises(DataError, match="matches no file"):
        find_inputs(["/nowhere/*.jsonl"])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        Tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(tmp_path)
