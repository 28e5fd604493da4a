"""What a file is: decided by its content and its name, and refused where neither says it."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from flagscale_like.data.formats import FileFormat, format_of
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.readers import Piece, PieceReader, ReadOptions, find_inputs, read_documents
from flagscale_like.data.table import DocumentTable
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.errors import DataError
from tests.commands import invoke

TEXTS = [f'document {i}, with brackets {{[{i}]}} and a quote " 三' for i in range(12)]
RECORDS = [{"text": text, "meta": {"text": f"other {i}", "n": i}} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
ARRAY = json.dumps(RECORDS, indent=2, ensure_ascii=False)
PACKED = {
    None: lambda data: data,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def texts(path, **options):
    return [document.text for document in read_documents([path], **options)]


@pytest.mark.parametrize("compression", PACKED)
@pytest.mark.parametrize(
    ("name", "data", "content"),
    [
        ("mega.json", LINES, "json lines"),
        ("mega.json", ARRAY, "json array"),
        ("mega.jsonl", LINES, "json lines"),
        ("MEGA.NDJSON", LINES, "json lines"),
        ("no_suffix", LINES, "json lines"),
        ("part-0001", ARRAY, "json array"),
        ("mega.jsonl", ARRAY, "json array"),
        ("\ufeffmark.json", "\ufeff" + LINES, "json lines"),
        ("\ufeffmark.json", "\ufeff" + ARRAY, "json array"),
    ],
)
def test_records_are_known_by_content_and_name(name, data, content, compression, tmp_path):
    suffix = {"gzip": ".gz", "zstd": ".zst", "bz2": ".bz2", "xz": ".xz", None: ""}[compression]
    for path in {tmp_path / name, tmp_path / (name + suffix)}:  # the magic tells, and a name that agrees
        path.write_bytes(PACKED[compression](data.encode()))
        assert format_of(path) == FileFormat(content, compression)
        assert texts(path) == TEXTS
        assert texts(path, key="meta.text") == [f"other {i}" for i in range(12)]


def test_text_is_known_by_its_name(tmp_path):
    for name in ("a.txt", "b.html", "c.py", "d.csv"):
        (tmp_path / name).write_text("plain text\n")
        assert texts(tmp_path / name) == ["plain text\n"]
    (tmp_path / "e.py").write_text(LINES)  # a program may look like anything
    assert texts(tmp_path / "e.py") == [LINES]


def test_parquet_is_known_by_its_content(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "data")
    assert texts(tmp_path / "data") == TEXTS


@pytest.mark.parametrize(
    ("name", "data", "part"),
    [
        ("x.dat", b"some text\n", "its name and its content do not say what it is: taken are JSON lines"),
        ("x", b"some text\n", "do not say what it is"),
        ("x.pdf", b"%PDF-1.7\n\0\1", "do not say what it is"),
        ("x.json", b'{\n "text": "one"\n}\n', "is one JSON object over several lines"),
        ("x.txt", LINES.encode(), "is named as text, and its lines are JSON objects: rename it to .jsonl"),
        ("x.jsonl.gz", LINES.encode(), "is named .gz, and its content is not gzip"),
        ("x.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_what_is_not_known_or_contradicts_its_name_is_refused(name, data, part, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        texts(tmp_path / name)
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_field_that_no_record_has_is_refused_with_the_fields_that_there_are(tmp_path):
    (tmp_path / "x.json").write_text(LINES)
    with pytest.raises(DataError, match=r"x.json:1: no JSON object with a 'body' field \(its fields: text, meta\)"):
        texts(tmp_path / "x.json", key="body")
    with pytest.raises(DataError, match="no JSON object with a 'meta.body' field"):
        texts(tmp_path / "x.json", key="meta.body")
    (tmp_path / "y.txt").write_text("text")
    with pytest.raises(DataError, match="y.txt: is text, and has no field 'body': leave out --key"):
        texts(tmp_path / "y.txt", key="body")


def test_an_array_is_read_record_by_record_with_their_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a"},\n\n {"text": "b\\nb"},\n{"no": 1}, 7,\n"x" ,{"text": "c"}]\n')
    found = list(PieceReader(Piece(str(path)), ReadOptions()))
    assert [(f.line, getattr(f, "text", None)) for f in found] == [
        (1, "a"),
        (3, "b\nb"),
        (4, None),
        (4, None),
        (5, None),
        (5, "c"),
    ]
    path.write_text('[{"text": "a"}, {"text": "b"')
    *good, bad = PieceReader(Piece(str(path)), ReadOptions())
    assert [document.text for document in good] == ["a"]
    assert str(bad).startswith(f"{path}:1: the array cannot be read from here on")
    path.write_text(json.dumps([{"text": "x" * 300_000}, {"text": "y"}]))
    assert [len(text) for text in texts(path)] == [300_000, 1]
    (bad,) = PieceReader(Piece(str(path)), ReadOptions(max_document_bytes=100_000))
    assert "a record has more than max_document_bytes (100,000)" in str(bad)


def test_brackets_in_a_name_that_exists_are_no_glob(tmp_path):
    (tmp_path / "part[1].txt").write_text("one")
    (tmp_path / "part1.txt").write_text("two")
    assert find_inputs([str(tmp_path / "part[1].txt")]) == [tmp_path / "part[1].txt"]
    assert find_inputs([str(tmp_path / "part[0-9].txt")]) == [tmp_path / "part1.txt"]


def test_what_is_left_out_of_a_folder_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.pdf").write_text("two")
    assert find_inputs([str(tmp_path)]) == [tmp_path / "a.txt"]
    assert "1 files of other names (.pdf) are left out" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_read_and_written_down(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.json"
    with open(name, "wb") as file:
        file.write(LINES.encode())
    tokenizer = train_bpe(TEXTS, 300, tmp_path / "tok")
    (path,) = find_inputs([os.fsdecode(name)])
    for workers in (1, 2):
        report = preprocess([path], tokenizer.folder, tmp_path / f"out{workers}", workers=workers, shard_bytes=200)
        assert report.documents == 12
        assert DocumentTable(str(tmp_path / f"out{workers}")).place(1) == (f"{tmp_path}/caf\\xe9.json", 2)


def test_the_command_reads_twelve_documents_and_replaces_nothing_by_itself(tmp_path):
    (tmp_path / "mega.json").write_text(LINES)
    tokenizer = train_bpe(TEXTS, 300, tmp_path / "tok").folder
    words = ["preprocess", str(tmp_path / "mega.json"), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]
    first = invoke(words)
    assert first.exit_code == 0, first.error
    assert "12 documents" in first.printed
    assert invoke(words).error == (
        f"error: {tmp_path}/out.idx: exists: choose another prefix, or replace it with --overwrite"
    )
    again = invoke([*words, "--key", "meta.text", "--overwrite"])
    assert again.exit_code == 0, again.error
    assert "body" in invoke([*words, "--key", "body", "--overwrite"]).error
    for wrong in (["--train-tokenizer", "-3"], ["--workers", "0"]):
        assert invoke([*words, *wrong]).exit_code == 2
