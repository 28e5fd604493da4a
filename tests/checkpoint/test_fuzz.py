"""Altered checkpoints whose checksums fit: manifest, state and headers are read or refused in a line, nothing is executed."""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest

from flagscale_like.checkpoint import manifest
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.manifest import Checksum, newest_whole, read_records, verify_files, write_manifest
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.tokenizer import train_bpe
from tests import faults
from tests.commands import invoke, run_commands
from tests.fuzz import answers, odd_bytes, odd_json
from tests.harness import run_ranks, tiny_config, write_yaml


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run of two steps with two checkpoints: (its YAML file, its folder)."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "text.txt").write_text("some words of a text\n" * 200)
    tokenizer = train_bpe(["some words of a text"], 257, folder / "tokenizer").folder
    preprocess([folder / "text.txt"], tokenizer, folder / "text")
    data = {"sources": [{"path": str(folder / "text")}], "tokenizer": str(tokenizer), "split": "1,0,0"}
    changes = {"model__vocab_size": 384, "train__exit_at_step": 2, "checkpoint__interval": 1}
    config = tiny_config(folder / "run", data=data, train__steps=4, **changes)
    run_ranks(1, faults.train_run, config)
    return write_yaml(config, folder / "run.yaml"), folder / "run"


def certify(folder: Path) -> None:
    """Write a manifest whose checksums are those of the files as they are now."""
    records, index = read_records(folder)

    def record(name):
        checksum = Checksum(sha256=False)
        checksum.update((folder / name).read_bytes())
        return checksum.record(name)

    write_manifest(folder, [record(r.name) for r in records], record(index.name) if index else None)


def read_all(folder: Path) -> None:
    """What a resume, `ckpt show` and an export read."""
    reader = CheckpointReader(folder)
    assert reader.arch
    for key in reader.keys():
        reader.full(key)
        for kind in ("exp_avg", "exp_avg_sq"):
            if reader.has(kind, [key]):
                reader.full(key, kind)


def test_a_damaged_manifest_is_no_checkpoint(good, tmp_path):
    draw, folder = random.Random(1), shutil.copytree(good[1] / "checkpoints", tmp_path / "checkpoints")
    path = folder / "step_00000002" / manifest.MANIFEST
    text = path.read_bytes()
    for turn in range(150):
        damaged = odd_bytes(text, draw) if turn % 3 == 0 else json.dumps(odd_json(json.loads(text), draw)).encode()
        path.write_bytes(damaged)
        with answers():
            verify_files(path.parent, processes=1)
        with answers():
            read_all(path.parent)
        with answers():
            chosen, _ = newest_whole(folder, processes=1)
            assert chosen is not None
            assert chosen.parent == folder


@pytest.mark.parametrize("name", ["rank_00000.safetensors", manifest.INDEX])
def test_altered_headers_with_fitting_checksums_are_read_or_refused(name, good, tmp_path):
    draw = random.Random(2)
    folder = shutil.copytree(good[1] / "checkpoints" / "step_00000002", tmp_path / "step_00000002")
    path = folder / name
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, found = json.loads(data[8 : 8 + size]), 0
    for turn in range(150):
        if turn % 3 == 0:  # also what the index and the headers hold as bytes
            path.write_bytes(odd_bytes(data, draw, last=8 + size + 400))
        else:
            text = json.dumps(odd_json(header, draw)).encode("utf-8", "surrogatepass")
            path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        certify(folder)
        with answers() as said:
            read_all(folder)
        found += bool(said) or bool(CheckpointReader(folder).notes)  # without the index, the headers are read
    assert found > 20


def test_an_altered_state_is_shown_located_and_resumed_or_refused(good, tmp_path):
    yaml, run = good
    draw = random.Random(3)
    states, lines = [], []
    state = json.loads((run / "checkpoints" / "step_00000002" / "state.json").read_text())
    for turn in range(60):
        where = tmp_path / str(turn)
        folder = where / "checkpoints" / "step_00000002"
        shutil.copytree(run / "checkpoints" / "step_00000002", folder)
        (folder / "state.json").write_text(json.dumps(odd_json(state, draw)))
        certify(folder)
        states.append(folder)
        for words in (["ckpt", "show"], ["ckpt", "list"], ["data", "locate", "--step", "1", "--run"]):
            found = invoke([*words, str(folder if words[1] == "show" else where)])
            assert "Traceback" not in found.error, found.error
        if turn < 16:
            lines.append(["train", str(yaml), f"run_dir={where}", "train.exit_at_step=3"])
    (outcomes,) = run_commands(lines)
    for folder, found in zip(states, outcomes, strict=False):
        assert "Traceback" not in found.error, (folder, found.error)
        assert found.exit_code in (0, 10, 11, 12, 14), found
