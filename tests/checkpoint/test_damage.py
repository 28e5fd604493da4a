"""Damaged and hostile checkpoints: found by checksum or by parsing, named, never executed, nothing overwritten."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from flagscale_like.checkpoint import manifest
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.manifest import check_file, read_manifest, read_records, verify_files
from flagscale_like.checkpoint.store import CheckpointStore
from flagscale_like.cli import app
from flagscale_like.config import Checkpoint, Parallel
from flagscale_like.errors import CheckpointError
from flagscale_like.runtime.parallel import parallel_context
from tests import faults
from tests.harness import run_ranks, tiny_config

SHARD = "rank_00001.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of two ranks."""
    config = tiny_config(tmp_path_factory.mktemp("good") / "run", train__steps=2, checkpoint__interval=1)
    run_ranks(2, faults.train_run, config)
    return Path(config.run_dir) / "checkpoints" / "step_00000002"


def test_a_run_saves_an_index_that_agrees_with_the_headers(good, tmp_path):
    reader = CheckpointReader(good)
    assert (reader.notes, reader.opened) == ((), frozenset())
    folder = shutil.copytree(good, tmp_path / good.name)
    manifest.write_manifest(folder, read_manifest(folder))
    headers = CheckpointReader(folder)
    assert headers.opened == {"rank_00000.safetensors", SHARD}
    assert reader.shapes() == headers.shapes()
    for key in reader.keys():
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(reader.full(key, kind), headers.full(key, kind))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(folder):
    a, b = folder / "rank_00000.safetensors", folder / SHARD
    a.rename(folder / "aside")
    b.rename(a)
    (folder / "aside").rename(b)


DAMAGE = {
    "a flipped bit": (lambda f: flip_a_bit(f / SHARD), "rank_00001.safetensors: checksum"),
    "a truncated shard": (lambda f: os.truncate(f / SHARD, 1000), "rank_00001.safetensors: 1000 bytes"),
    "a missing shard": (lambda f: (f / SHARD).unlink(), "rank_00001.safetensors: No such file"),
    "swapped shards": (swap, "rank_0000"),
    "a flipped bit in the state": (lambda f: flip_a_bit(f / "state.json"), "state.json: checksum"),
    "a missing manifest": (lambda f: (f / "manifest.json").unlink(), "not a checkpoint, or an unfinished one"),
    "another step's files": (
        lambda f: shutil.copytree(f.parent / "step_00000001", f, dirs_exist_ok=True),
        "is of step 1: rename it to step_00000001",
    ),
    "half a manifest": (lambda f: os.truncate(f / "manifest.json", 40), "manifest.json is damaged"),
}


def judge(roots):
    """newest_good of each root, on the ranks together."""
    with parallel_context(Parallel()) as ctx:
        return [CheckpointStore(root, ctx, Checkpoint()).newest_good() for root in roots]


def test_every_damage_is_found_and_the_newest_good_checkpoint_is_chosen(good, tmp_path):
    roots = [tmp_path / name for name in DAMAGE]
    for root, (damage, _) in zip(roots, DAMAGE.values(), strict=True):
        shutil.copytree(good.parent, root)
        damage(root / "step_00000002")
    results = run_ranks(2, judge, roots)
    assert results[0] == results[1]  # the ranks agree
    for root, (_, reason), (chosen, rejected) in zip(roots, DAMAGE.values(), results[0], strict=True):
        assert chosen == root / "step_00000001"
        assert len(rejected) == 1
        assert rejected[0].startswith("step_00000002: ")
        assert reason in rejected[0]


def test_verify_names_every_damaged_file_with_several_processes(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / good.name)
    assert verify_files(folder, processes=2) == []
    renamed = folder.rename(tmp_path / "step_00000009")
    assert str(CliRunner().invoke(app, ["ckpt", "verify", str(renamed)]).exception).endswith(
        "step_00000009: is of step 2: rename it to step_00000002"
    )
    renamed.rename(folder)
    flip_a_bit(folder / SHARD)
    os.truncate(folder / "state.json", 3)
    problems = verify_files(folder, processes=2)
    assert len(problems) == 2
    assert problems[0].startswith(f"{SHARD}: checksum")
    assert problems[1].startswith("state.json: 3 bytes")


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_overwrites_nothing(good, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(good.parent, root)
    for folder in root.glob("step_*"):
        flip_a_bit(folder / SHARD)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    ((_, error),) = run_ranks(1, faults.train_and_listen, tiny_config(tmp_path / "run", train__steps=4))
    assert error.startswith(f"CheckpointError: {root}: none of its 2 checkpoints is whole (step_00000002: {SHARD}")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_run_does_not_begin_with_damaged_weights(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / good.name)
    flip_a_bit(folder / SHARD)
    config = tiny_config(tmp_path / "run", checkpoint__load=str(folder))
    ((_, error),) = run_ranks(1, faults.train_and_listen, config)
    assert error.startswith(f"CheckpointError: {folder}: is not whole: {SHARD}: checksum ")


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def seal(folder):
    """A manifest whose checksums fit, as an attacker would write it."""
    files, index = read_records(folder)
    records = []
    for record in [*files, index] if index else files:
        checksum = manifest.Checksum(sha256=False)
        checksum.update((folder / record.name).read_bytes())
        records.append(checksum.record(record.name))
    manifest.write_manifest(folder, records[: len(files)], records[-1] if index else None)
    assert verify_files(folder, processes=1) == []


def pickled(folder, name, trace):
    (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    seal(folder)


def torch_saved(folder, name, trace):
    torch.save({"model": Bomb(trace)}, folder / name)
    seal(folder)


def lying_header(folder, name, trace):
    fragment = ["decoder.final_layernorm.weight", [64], [0], [64], 0, 64]
    values = torch.zeros(8)
    tensors = {"0.param": values, "0.exp_avg": values.clone(), "0.exp_avg_sq": values.clone()}
    save_file(tensors, folder / name, metadata={"fragments": json.dumps([fragment])})
    seal(folder)


def a_moment_too_short(folder, name, trace):
    fragment = ["decoder.final_layernorm.weight", [64], [0], [64], 0, 64]
    tensors = {"0.param": torch.zeros(64), "0.exp_avg": torch.zeros(8), "0.exp_avg_sq": torch.zeros(64)}
    save_file(tensors, folder / name, metadata={"fragments": json.dumps([fragment])})
    seal(folder)


def listed_twice(folder, name, trace):
    fragment = ["x", [64], [0], [64], 0, 32]
    tensors = {f"{i}.param": torch.zeros(32) for i in range(2)}
    save_file(tensors, folder / name, metadata={"fragments": json.dumps([fragment] * 2)})
    seal(folder)


def no_shape(folder, name, trace):
    save_file({"0.param": torch.zeros(1)}, folder / name, metadata={"fragments": '[["x", [], [], [], 0, 1]]'})
    seal(folder)


def a_list_for_a_name(folder, name, trace):
    save_file({"0.param": torch.zeros(1)}, folder / name, metadata={"fragments": "[[[1], [1], [0], [1], 0, 1]]"})
    seal(folder)


def deep_json(folder, name, trace):
    (folder / "state.json").write_text("[" * 200_000)
    seal(folder)


def another_version(folder, name, trace):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"format": 1', '"format": 99'))


def dotted_name(folder, name, trace):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(SHARD, f"../{SHARD}"))


# attack -> what is said where the headers of all files are read; and, if it differs, where the index is
HOSTILE = {
    "a pickle in place of a shard": (pickled, f"{SHARD} is damaged"),
    "a torch.save file in place of a shard": (torch_saved, f"{SHARD} is damaged"),
    "a header that lies": (lying_header, "is not as long as its tensor"),
    "a moment shorter than its weight": (a_moment_too_short, "is not as long as its tensors"),
    "elements listed twice": (listed_twice, "elements of x are listed twice", "is not the one that the index names"),
    "a tensor without a shape": (no_shape, "fragment 0 has no name or no shape"),
    "a list in place of a name": (a_list_for_a_name, "fragment 0 has no name or no shape"),
    "json without end": (deep_json, "state.json is damaged"),
    "another format version": (another_version, "checkpoint format 99, this version reads 1"),
    "a name outside the folder": (dotted_name, "names a file outside the checkpoint: '../rank_00001"),
}


def read_everything(folder):
    reader = CheckpointReader(folder)
    for key in reader.keys():
        reader.full(key)


@pytest.mark.parametrize("index", ["with an index", "without an index"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_not_executed(name, index, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / good.name)
    if index == "without an index":
        manifest.write_manifest(folder, read_manifest(folder))
        (folder / manifest.INDEX).unlink()
    trace = tmp_path / "executed"
    attack, *reasons = HOSTILE[name]
    attack(folder, SHARD, trace)
    with pytest.raises(CheckpointError) as caught:
        (CheckpointReader if index == "without an index" else read_everything)(folder)
    assert reasons[-1 if index == "with an index" else 0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 12
    assert not trace.exists()
    if index == "without an index":
        with pytest.raises(CheckpointError):
            CliRunner().invoke(app, ["ckpt", "show", str(folder)], catch_exceptions=False)
    with pytest.raises(CheckpointError):
        CliRunner().invoke(
            app,
            ["convert", "export", "--checkpoint", str(folder), "--out", str(tmp_path / "hf")],
            catch_exceptions=False,
        )
    assert not trace.exists()


def test_a_forged_file_with_the_same_size_needs_the_right_sha256(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / good.name)
    (record,) = [r for r in read_manifest(folder) if r.name == SHARD]
    assert check_file(folder, record) is None
    forged = manifest.FileRecord(record.name, record.size_bytes, record.xxh3, "0" * 64)
    assert "sha256" in check_file(folder, forged)


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        CliRunner().invoke(app, ["ckpt", "verify", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        CliRunner().invoke(app, ["ckpt", "list", str(tmp_path)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model__ffn_hidden_size": 128}, "model.ffn_hidden_size: 96 saved, 128 configured"),
        ({"model__vocab_size": 300}, "model.vocab_size: 250 saved, 300 configured"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_overwritten(change, reason, good, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(good.parent, root)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ((_, error),) = run_ranks(1, faults.train_and_listen, tiny_config(tmp_path / "run", train__steps=4, **change))
    assert error == f"CheckpointError: {root}/step_00000002: is of another model: {reason}"
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
