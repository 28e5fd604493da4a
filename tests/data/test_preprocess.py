"""Text in, .bin/.idx and a table of documents out."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flagscale_like.data.filters import Cleaning
from flagscale_like.data.inspect import describe_index
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.readers import find_inputs, read_documents
from flagscale_like.data.shards import ShardMaker
from flagscale_like.data.tokenizer import Tokenizer, train_bpe
from flagscale_like.errors import DataError
from tests.commands import invoke
from tests.harness import REPOSITORY, cli


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


TEXTS = [f"document {i}: " + "the quick brown fox jumps over the lazy dog " * (i % 5 + 1) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "bpe").folder


def write_all_formats(folder):
    """The same forty texts as jsonl, parquet and text files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:20]))
    pq.write_table(pa.table({"text": TEXTS[20:30]}), folder / "b.parquet")
    for i in range(30, 36):
        (folder / f"c{i}.txt").write_text(TEXTS[i])
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[36:38]).encode()
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines[:50]) + gzip.compress(lines[50:]))
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[38:]).encode()
    (folder / "e.jsonl.zst").write_bytes(zst(lines[:50]) + zst(lines[50:]))
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
        if name == "d.jsonl.gz":
            assert TEXTS[36:38][row["line"] - 1] == text
        elif name == "e.jsonl.zst":
            assert TEXTS[38:][row["line"] - 1] == text
        elif name == "a.jsonl":
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
        ("x.jsonl", b'{"text": null}\n', "x.jsonl:1: 'text' is NoneType, not text"),
        ("x.jsonl", b'\n{"text": "\\ud800"}\n', "x.jsonl:2: 'text' has an unpaired surrogate at character 0"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1: no JSON object with a 'text' field (RecursionError"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"text": "a b c"}\n' * 9, mtime=0)[:-12],
            "the compressed file is damaged or truncated about here (Compressed file ended",
        ),
        (
            "x.jsonl.gz",
            b"no gzip",
            "x.jsonl.gz: is named .gz, and its content is not gzip",
        ),
        ("x.jsonl.zst", zst(b'{"text": "a b c"}\n' * 9)[:-5], "the compressed file is damaged or truncated about here"),
        ("x.txt.zst", b"no zstd", "x.txt.zst: is named .zst, and its content is not zstd"),
        ("x.txt", b"", "no document is left of 1 files: 1 empty"),
        ("x.jsonl", b"", "no document is left of 1 files: the files hold none"),
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


def test_an_input_that_is_named_twice_is_read_once(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    inputs = [f"{tmp_path}/b.txt", f"{tmp_path}/*.txt", str(tmp_path), f"{tmp_path}/../{tmp_path.name}/c.txt"]
    assert [file.stem for file in find_inputs(inputs)] == ["b", "a", "c"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        Tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(tmp_path)


def outputs(prefix: Path) -> dict[str, bytes]:
    """What preprocessing wrote, but for the report, which names the tokenizer's folder."""
    found = {
        p.name[len(prefix.name) :]: p.read_bytes() for p in prefix.parent.iterdir() if p.name.startswith(prefix.name)
    }
    assert set(found) == {".bin", ".idx", ".documents.parquet", ".report.json"}
    table = pq.read_table(prefix.with_name(prefix.name + ".documents.parquet"))
    return found | {".documents.parquet": repr(table.to_pylist()).encode()}


def corpus_of(folder, documents=600):
    """A jsonl of lines of all lengths, blank ones and broken ones among them."""
    folder.mkdir(exist_ok=True)
    path = folder / "corpus.jsonl"
    lines = [json.dumps({"text": f"document {i} " + "word " * (i * 7 % 90)}) for i in range(documents)]
    if documents > 350:
        lines[100], lines[350] = "", "{broken"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_result_depends_on_no_number_of_shards_or_workers(tmp_path, tokenizer):
    path = corpus_of(tmp_path / "in")
    results = []
    for name, workers, shard_bytes in (("a", 1, 1 << 30), ("b", 1, 9_000), ("c", 2, 37_000)):
        prefix = tmp_path / name / "text"
        report = preprocess([path], tokenizer, prefix, workers=workers, shard_bytes=shard_bytes, bad_lines="skip")
        assert report.bad_lines == 1
        assert report.bad_line_places[0][:2] == (str(path), 351)
        results.append(outputs(prefix))
    assert results[0] == results[1] == results[2]


def test_a_bad_line_in_the_middle_of_a_divided_file_is_located_in_the_file(tmp_path, tokenizer):
    path = corpus_of(tmp_path / "in")
    with pytest.raises(DataError, match=r"corpus\.jsonl:351: no JSON object"):
        preprocess([path], tokenizer, tmp_path / "text", shard_bytes=30_000)


def test_a_killed_run_goes_on_with_its_finished_shards(tmp_path, tokenizer, monkeypatch):
    path = corpus_of(tmp_path / "in", documents=12_000)
    prefix = tmp_path / "out" / "text"
    arguments = [
        *("--out", str(prefix)),
        *("--tokenizer", str(tokenizer)),
        *("--shard-mb", "0.1", "--bad-lines", "skip"),
    ]
    command = [sys.executable, "-m", "flagscale_like", "preprocess", str(path), *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    work = tmp_path / "out" / "text.shards"
    while len(list(work.glob("0*.json"))) < 3:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(work.glob("0*.json")))
    (work / f"{done:06d}.bin").write_bytes(b"half a shard")
    damaged = next(work.glob("000001.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    made, make = [], ShardMaker.make
    monkeypatch.setattr(ShardMaker, "make", lambda self, shard, parts: made.append(shard) or make(self, shard, parts))
    preprocess([path], tokenizer, prefix, shard_bytes=5, bad_lines="skip")  # the interrupted run's size holds
    shards = -(-path.stat().st_size // int(0.1 * 2**20))
    assert len(made) == shards - done + 1
    assert not work.exists()
    preprocess([path], tokenizer, tmp_path / "whole" / "text", bad_lines="skip")
    assert outputs(prefix) == outputs(tmp_path / "whole" / "text")


def test_shards_of_other_options_are_not_mixed_in(tmp_path, tokenizer):
    path = corpus_of(tmp_path / "in")
    with pytest.raises(DataError):
        preprocess([path], tokenizer, tmp_path / "text", shard_bytes=30_000)
    assert list((tmp_path / "text.shards").glob("0*.json"))
    with pytest.raises(DataError, match="differs in bad_lines: repeat that command, or remove the folder"):
        preprocess([path], tokenizer, tmp_path / "text", bad_lines="skip")


def test_a_line_without_end_fills_no_memory(tmp_path, tokenizer):
    lines = [b'{"text": "before"}', b'{"text": "' + b"x" * 300_000 + b'"}', b'{"text": "after"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    report = preprocess([tmp_path / "x.jsonl"], tokenizer, tmp_path / "text", max_document_bytes=1000, bad_lines="skip")
    assert report.documents == 2
    assert report.bad_line_places == [
        (str(tmp_path / "x.jsonl"), 2, "has 300,013 bytes, more than max_document_bytes (1,000)")
    ]
    rows = pq.read_table(tmp_path / "text.documents.parquet").to_pylist()
    assert [row["line"] for row in rows] == [1, 3]


def test_what_is_dropped_is_counted_by_reason_and_located(tmp_path, tokenizer):
    texts = ["short", "a text of some length, kept", "a text of some length, kept", "sch\u00c3\u00b6n, mended and kept"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    cleaning = Cleaning(fix_text=True, min_characters=10, duplicates="exact")
    report = preprocess([tmp_path / "x.jsonl"], tokenizer, tmp_path / "text", cleaning=cleaning, shard_bytes=40)
    assert (report.read, report.documents) == (4, 2)
    written = json.loads((tmp_path / "text.report.json").read_text())
    assert written["dropped"]["too short"] == {"documents": 1, "characters": 5, "examples": [f"{tmp_path}/x.jsonl:1"]}
    assert written["dropped"]["duplicate"]["examples"] == [f"{tmp_path}/x.jsonl:3: as {tmp_path}/x.jsonl:2"]
    dataset, words = IndexedDataset(str(tmp_path / "text")), Tokenizer(tokenizer)
    assert words.decode(dataset[1][:-1]) == "sch\u00f6n, mended and kept"
    assert report.tokens == int(np.sum(dataset.sequence_lengths))
    assert [r["line"] for r in pq.read_table(tmp_path / "text.documents.parquet").to_pylist()] == [2, 4]


def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{}\n')
    with pytest.raises(DataError, match="no document is left of 1 files: 2 too short, 1 bad lines"):
        preprocess(
            [tmp_path / "x.jsonl"],
            tokenizer,
            tmp_path / "o" / "text",
            cleaning=Cleaning(min_characters=5),
            bad_lines="skip",
        )
    assert list((tmp_path / "o").iterdir()) == []


def test_a_disk_that_refuses_is_one_line_and_keeps_the_finished_shards(tmp_path, tokenizer):
    path = corpus_of(tmp_path / "in", documents=3000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the shards fit, the joined file does not
    try:
        with pytest.raises(DataError, match="complete shards are kept in") as error:
            preprocess([path], tokenizer, tmp_path / "text", shard_bytes=50_000, bad_lines="skip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "text.bin").exists()
    assert preprocess([path], tokenizer, tmp_path / "text", bad_lines="skip").documents == 2998


def test_an_output_below_a_file_is_refused(tmp_path, tokenizer):
    (tmp_path / "file").write_text("x")
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(DataError, match="Not a directory|File exists"):
        preprocess([tmp_path / "x.txt"], tokenizer, tmp_path / "file" / "text")


def test_two_runs_do_not_write_to_one_prefix(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "x.txt").write_text("some text")
    make = ShardMaker.make

    def meanwhile(self, shard, parts):
        with pytest.raises(DataError, match="another process is writing"):
            preprocess([tmp_path / "x.txt"], tokenizer, tmp_path / "text")
        return make(self, shard, parts)

    monkeypatch.setattr(ShardMaker, "make", meanwhile)
    assert preprocess([tmp_path / "x.txt"], tokenizer, tmp_path / "text").documents == 1


def test_inspect_shows_counts_lengths_and_documents_with_their_places(tmp_path, tokenizer):
    path = corpus_of(tmp_path / "in", documents=90)
    report = preprocess([path], tokenizer, tmp_path / "text", shard_bytes=5000)
    shown = "\n".join(map(str, describe_index(tmp_path / "text", None, samples=3)))
    assert f"90 documents, {report.tokens:,} tokens" in shown
    counts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) documents, [\d.]+% of tokens", shown)]
    assert sum(counts) == 90
    last = json.loads(path.read_text().splitlines()[-1])["text"]
    assert f"document 89, {path}:90, " in shown
    assert json.dumps(last)[1:100] in shown
    (tmp_path / "text.documents.parquet").unlink()
    (tmp_path / "text.report.json").unlink()
    assert any(str(line).startswith("document 0, ") for line in describe_index(tmp_path / "text", None, samples=1))
    with pytest.raises(DataError, match="is missing; `preprocess` writes it"):
        list(describe_index(tmp_path / "nothing", None, samples=1))


def test_a_tokenizer_of_another_input_or_size_is_not_taken_for_this_ones(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 30)
    (tmp_path / "b.txt").write_text("entirely different letters\n" * 30)
    out = tmp_path / "x"

    def run(name: str, size: str, *more: str):
        return invoke(["preprocess", str(tmp_path / name), "--train-tokenizer", size, "--out", str(out), *more])

    assert run("a.txt", "270").exit_code == 0
    for path in tmp_path.glob("x.*"):  # as if it had been interrupted behind the training
        path.unlink()
    trained = (tmp_path / "x-tokenizer/tokenizer.json").stat().st_mtime_ns
    assert run("a.txt", "270").exit_code == 0
    assert (tmp_path / "x-tokenizer/tokenizer.json").stat().st_mtime_ns == trained
    for path in tmp_path.glob("x.*"):
        path.unlink()
    for name, size in (("b.txt", "270"), ("a.txt", "265")):
        assert f"exists, and was not trained for {size} entries on this input" in run(name, size).error
    assert run("b.txt", "265", "--overwrite").exit_code == 0
    assert Tokenizer(tmp_path / "x-tokenizer").vocab_size == 265
