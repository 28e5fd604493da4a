"""The index of a checkpoint: a rank opens the files that it needs, and a damaged index costs time and nothing else."""

import json
import os
import resource
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flagscale_like.checkpoint.format import CheckpointReader, finish_folder, specs_of, write_fragments
from flagscale_like.checkpoint.fragments import Fragment, elements_within
from flagscale_like.checkpoint.manifest import (
    INDEX,
    Checksum,
    newest_whole,
    read_manifest,
    read_records,
    verify_files,
    write_json,
    write_manifest,
)
from flagscale_like.checkpoint.reshard import reshard
from flagscale_like.cli import app
from flagscale_like.errors import CheckpointError
from tests.checkpoint.test_fragments import divisions, elements, shapes


def save(folder, files):
    """A checkpoint of files, each a list of (fragment, {kind: tensor})."""
    folder.mkdir(parents=True)
    written = []
    for number, held in enumerate(files):
        tensors = [(f"{i}.{kind}", t) for i, (_, kinds) in enumerate(held) for kind, t in kinds.items()]
        tensors.append(("rng.default", torch.tensor([number])))
        fragments = [fragment for fragment, _ in held]
        path = folder / f"rank_{number:05d}.safetensors"
        written.append(write_fragments(path, fragments, (t for _, t in tensors), specs_of(tensors)))
    finish_folder(folder, written, [write_json(folder / "state.json", {"step": 1})])
    return folder


def without_index(folder):
    """As an earlier version saved it."""
    write_manifest(folder, read_manifest(folder))
    (folder / INDEX).unlink()


def seal(folder):
    """A manifest whose checksum of the index fits."""
    checksum = Checksum(sha256=False)
    checksum.update((folder / INDEX).read_bytes())
    write_manifest(folder, read_manifest(folder), checksum.record(INDEX))


SHAPES = {"a": (6, 4), "b": (8,)}
WHOLE = {key: torch.arange(prod(shape)).float().view(shape) for key, shape in SHAPES.items()}


def cut(key, offset, shape, start, stop):
    fragment = Fragment(key, SHAPES[key], offset, shape, start, stop)
    return fragment, {"param": elements(WHOLE[key], fragment).clone(), "exp_avg": torch.ones(stop - start)}


@pytest.fixture
def folder(tmp_path):
    """Three files: a by columns and then by flat ranges, b in two halves."""
    files = [
        [cut("a", (0, 0), (6, 2), 0, 7), cut("b", (0,), (8,), 0, 4)],
        [cut("a", (0, 0), (6, 2), 7, 12), cut("b", (0,), (8,), 4, 8)],
        [cut("a", (0, 2), (6, 2), 0, 12)],
    ]
    return save(tmp_path / "step_00000001", files)


def assert_whole(reader):
    assert all(torch.equal(reader.full(key), tensor) for key, tensor in WHOLE.items())


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_the_files_opened_are_those_that_hold_an_element_that_is_wanted(data, tmp_path_factory):
    tensors = {}
    for key in data.draw(st.sampled_from([("w",), ("w", "x")])):
        shape = data.draw(shapes())
        tensors[key] = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    files = [[] for _ in range(4)]
    for key, tensor in tensors.items():
        for fragment in data.draw(divisions(tensor.shape)):
            if fragment.numel:
                fragment = replace(fragment, key=key)
                files[data.draw(st.integers(0, 3))].append((fragment, {"param": elements(tensor, fragment).clone()}))
    saved = save(tmp_path_factory.mktemp("saved") / "c", files)
    targets = [t for t in data.draw(divisions(tensors["w"].shape)) if t.numel]
    for number, index in enumerate(("with", "without")):
        if index == "without":
            without_index(saved)
        for target in targets:
            reader = CheckpointReader(saved)
            assert len(reader.opened) == 4 * number
            out = torch.full((target.numel,), -1.0)
            reader.read("param", target, out)
            assert torch.equal(out, elements(tensors["w"], target))
            if index == "with":
                ours = {
                    f"rank_{n:05d}.safetensors"
                    for n, held in enumerate(files)
                    for fragment, _ in held
                    if fragment.key == "w" and share(fragment, target)
                }
                assert reader.opened == ours


def share(a, b):
    """How many elements two fragments share, counted one by one."""
    numbers = torch.arange(prod(a.global_shape)).view(a.global_shape)
    return len(np.intersect1d(elements(numbers, a), elements(numbers, b)))


def test_a_rank_finds_its_own_tensors_in_its_own_file(folder):
    reader = CheckpointReader(folder)
    assert reader.rank_tensor(1, "rng.default").item() == 1
    assert reader.rank_tensor(3, "rng.default") is None
    assert reader.opened == {"rank_00001.safetensors"}
    assert reader.shapes() == SHAPES
    assert reader.dtype("a", "exp_avg") == torch.float32


def test_a_folder_without_an_index_still_loads(folder):
    without_index(folder)
    reader = CheckpointReader(folder)
    assert reader.notes == ()
    assert_whole(reader)


def test_more_files_are_read_than_a_process_may_open(tmp_path):
    shape = (300, 2)
    weight = torch.arange(600.0).view(shape)
    files = [
        [(Fragment("w", shape, (0, 0), shape, 2 * n, 2 * n + 2), {"param": weight[n].clone()})] for n in range(300)
    ]
    folder = save(tmp_path / "c", files)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        reader = CheckpointReader(folder)
        assert torch.equal(reader.full("w"), weight)
        assert torch.equal(reader.full("w"), weight)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(reader.opened) == 300


def change(arrays=None, **names):
    """Damage that rewrites the index with other arrays or names, and a checksum that fits."""

    def damage(folder):
        held = load_file(folder / INDEX)
        with safe_open(folder / INDEX, framework="pt") as file:
            metadata = file.metadata()
        if arrays:
            arrays(held)
        for name, value in names.items():
            metadata[name] = json.dumps(value)
        save_file(held, folder / INDEX, metadata=metadata)
        seal(folder)

    return damage


def put(name, at, value):
    def arrays(held):
        held[name][at] = value

    return change(arrays)


def cast(name, dtype):
    return change(lambda held: held.update({name: held[name].to(dtype)}))


def flip_a_bit(folder):
    data = bytearray((folder / INDEX).read_bytes())
    data[-5] ^= 1
    (folder / INDEX).write_bytes(data)


def replaced(data):
    def damage(folder):
        (folder / INDEX).write_bytes(data)
        seal(folder)

    return damage


# Rows of the good index: a's box (0, 0) [0, 7) and [7, 12), a's box (0, 2) [0, 12), b [0, 4) and [4, 8).
DAMAGE = {
    "a flipped bit": (flip_a_bit, "checksum"),
    "a truncated file": (lambda f: os.truncate(f / INDEX, 100), "100 bytes, the manifest says"),
    "a missing file": (lambda f: (f / INDEX).unlink(), "No such file"),
    "a pickle": (replaced(b"\x80\x04K\x01."), "not a safetensors file"),
    "a safetensors file of something else": (
        lambda f: (save_file({"x": torch.ones(1)}, f / INDEX), seal(f)),
        "no index",
    ),
    "json without end": (change(keys=None, files="x" * 9), "no index"),
    "a list for a name": (change(keys=[[[1], [6, 4]], ["b", [8]]]), "a name in it is no text"),
    "a negative size": (change(keys=[["a", [6, -4]], ["b", [8]]]), "a size in it is no natural number"),
    "a tensor without a shape": (change(keys=[["a", [6, 4]], ["b", []]]), "a tensor has no shape"),
    "a tensor too many": (change(keys=[["a", [6, 4]], ["b", [8]], ["c", [8]]]), "a tensor without boxes"),
    "a tensor named twice": (change(keys=[["a", [6, 4]], ["a", [8]]]), "its tensors are not in order"),
    "an unknown dtype": (change(forms=[[["param", "F99"]]]), "a dtype in it is not known"),
    "files that the manifest does not name": (
        change(files=[f"rank_{i:05d}.safetensors" for i in (0, 1, 3)]),
        "it is of other files than the manifest",
    ),
    "floats": (cast("start", torch.float64), "start has the dtype float64"),
    "fewer stops than starts": (
        change(lambda held: held.update({"stop": held["stop"][:4].clone()})),
        "stop has the dtype int64 and the shape [4]",
    ),
    "a box outside its tensor": (put("offset", (1, 1), 3), "a box of a leaves its tensor"),
    "a box that overflows": (put("offset", (1, 1), 2**63 - 1), "a box of a leaves its tensor"),
    "a fragment outside its box": (put("stop", 2, 13), "a fragment of a leaves its tensor"),
    "an empty fragment": (put("stop", 0, 0), "a fragment of a leaves its tensor"),
    "elements listed twice": (put("start", 1, 6), "elements of a are listed twice"),
    "a file number that is none": (put("file", 0, 3), "a number of a file or of a form is out of range"),
    "a form number that is none": (put("form", 0, -1), "a number of a file or of a form is out of range"),
    "a negative place": (put("place", 0, -1), "a fragment's number is negative"),
    "counts that go back": (put("box_rows", 1, 3), "a tensor without boxes, or a box without fragments"),
    "a box that begins behind the end": (put("key_boxes", 1, 9), "a tensor without boxes, or a box without fragments"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_index_is_said_and_the_headers_are_read_instead(name, folder):
    damage, reason = DAMAGE[name]
    damage(folder)
    reader = CheckpointReader(folder)
    (note,) = reader.notes
    assert note.startswith(f"{folder}: the index is damaged ({INDEX}: ")
    assert reason in note
    assert note.endswith("the headers of all files are read instead")
    assert len(reader.opened) == 3
    assert_whole(reader)


def test_a_damaged_index_is_named_by_verify_and_makes_no_checkpoint_unusable(folder):
    assert verify_files(folder, processes=1) == []
    flip_a_bit(folder)
    (problem,) = verify_files(folder, processes=2)
    assert problem.startswith(f"{INDEX}: checksum")
    assert newest_whole(folder.parent, processes=1) == (folder, [])
    with pytest.raises(CheckpointError, match=f"1 of 5 files are damaged: {INDEX}: checksum"):
        CliRunner().invoke(app, ["ckpt", "verify", str(folder)], catch_exceptions=False)
    shown = CliRunner().invoke(app, ["ckpt", "show", str(folder)], catch_exceptions=False).output
    assert "the headers of all files are read instead" in " ".join(shown.split())
    reshard(folder, folder.parent / "again", files=2, weights_only=False, sha256=True, processes=1)
    assert verify_files(folder.parent / "again", processes=1) == []
    assert len(read_records(folder.parent / "again")[1].sha256 or "") == 64
    assert_whole(CheckpointReader(folder.parent / "again"))


LIES = {
    "another place": put("place", 2, 1),
    "another file": put("file", 4, 0),
    "another range": put("stop", 0, 6),
    "another form": change(forms=[[["exp_avg", "F32"], ["param", "BF16"]]]),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_a_files_header_does_not_confirm_is_refused(name, folder):
    LIES[name](folder)
    reader = CheckpointReader(folder)
    with pytest.raises(CheckpointError, match=r"rank_0000. is damaged|is not the one that the index names") as caught:
        assert_whole(reader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", ["with", "without"])
def test_boxes_that_overlap_are_refused(index, tmp_path):
    halves = [[cut("a", (0, 0), (6, 3), 0, 18)], [cut("a", (0, 2), (6, 2), 0, 12)]]
    folder = save(tmp_path / "c", halves)
    if index == "without":
        without_index(folder)
        with pytest.raises(CheckpointError, match="elements of a are listed twice"):
            CheckpointReader(folder)
    else:
        reader = CheckpointReader(folder)
        with pytest.raises(CheckpointError, match="elements of a are listed twice"):
            reader.full("a")


def test_a_tensor_that_two_files_give_different_shapes_is_not_saved(tmp_path):
    other = Fragment("b", (9,), (8,), (1,), 0, 1)
    with pytest.raises(ValueError, match=r"b has two shapes: \(8,\) and \(9,\)"):
        save(tmp_path / "c", [[cut("b", (0,), (8,), 0, 8)], [(other, {"param": torch.ones(1)})]])


@pytest.fixture
def frozen(tmp_path):
    """a is frozen in bf16; b is trained in fp32."""
    weight = Fragment("a", (6, 4), (0, 0), (6, 4), 0, 24)
    files = [
        [(weight, {"param": WHOLE["a"].flatten().bfloat16()}), cut("b", (0,), (8,), 0, 4)],
        [cut("b", (0,), (8,), 4, 8)],
    ]
    return save(tmp_path / "frozen", files)


@pytest.mark.parametrize("index", ["with", "without"])
def test_each_tensor_has_its_own_kinds_and_dtype(index, frozen):
    if index == "without":
        without_index(frozen)
    reader = CheckpointReader(frozen)
    assert reader.has("param")
    assert not reader.has("exp_avg")
    assert reader.has("exp_avg", ["b"])
    assert not reader.has("exp_avg", ["a", "b"])
    assert not reader.has("exp_avg_sq", ["b"])
    assert (reader.dtype("a"), reader.dtype("b")) == (torch.bfloat16, torch.float32)
    out = torch.empty(24)
    reader.read("param", Fragment("a", (6, 4), (0, 0), (6, 4), 0, 24), out)
    assert torch.equal(out.view(6, 4), WHOLE["a"])
    for call in (
        lambda: reader.full("a", "exp_avg"),
        lambda: reader.read("exp_avg", Fragment("a", (6, 4), (0, 0), (6, 4), 0, 24), out),
        lambda: reader.has("param", ["c"]),
    ):
        with pytest.raises(CheckpointError, match=r"holds no exp_avg of a|0 of 24 elements were saved|holds no c"):
            call()


def test_reshard_copies_of_each_tensor_the_kinds_it_has(frozen, tmp_path):
    reshard(frozen, tmp_path / "again", files=3, weights_only=False, sha256=False, processes=1)
    reader = CheckpointReader(tmp_path / "again")
    assert not reader.has("exp_avg", ["a"])
    assert torch.equal(reader.full("b", "exp_avg"), torch.ones(8))
    assert reader.full("a").dtype == torch.bfloat16
    assert torch.equal(reader.full("a").float(), WHOLE["a"])
    reshard(frozen, tmp_path / "weights", files=1, weights_only=True, sha256=False, processes=1)
    assert not CheckpointReader(tmp_path / "weights").has("exp_avg", ["b"])


def test_reshard_refuses_a_tensor_of_which_some_elements_alone_have_moments(tmp_path):
    first, second = cut("b", (0,), (8,), 0, 4), cut("b", (0,), (8,), 4, 8)
    del second[1]["exp_avg"]
    folder = save(tmp_path / "c", [[first], [second]])
    with pytest.raises(CheckpointError, match="b: only some of its elements have exp_avg"):
        reshard(folder, tmp_path / "again", files=1, weights_only=False, sha256=False, processes=1)
    assert not (tmp_path / "again").exists()


def test_rows_beyond_the_saved_vocabulary_are_zero(tmp_path):
    key = "output_layer.weight"
    weight = torch.arange(24.0).view(6, 4)
    held = [(Fragment(key, (6, 4), (0, 0), (6, 4), 0, 24), {"param": weight.flatten().clone()})]
    reader = CheckpointReader(save(tmp_path / "c", [held]))
    target = Fragment(key, (10, 4), (5, 0), (5, 4), 0, 20)
    out = torch.full((20,), -1.0)
    reader.read("param", target, out)
    assert elements_within(target, (6, 4)) == 4
    assert torch.equal(out, torch.cat([weight[5], torch.zeros(16)]))
