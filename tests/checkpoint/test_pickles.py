"""Weights in PyTorch's pickles: read like safetensors, in as little memory, and what is no weight is not executed."""

import os
import subprocess
import sys
import zipfile
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.errors import ConversionError
from flagscale_like.families import find_family
from flagscale_like.json_files import write_json
from tests.families import tiny
from tests.harness import REPOSITORY


class Executed:
    """Unpickled by a reader that runs what it finds, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def folder(tmp_path):
    """Pickled weights alone."""
    out = tiny.make("llama", tmp_path)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    torch.save(tensors, out / "pytorch_model.bin")
    return out


def test_safetensors_count_where_both_are_there(folder):
    held = torch.load(folder / "pytorch_model.bin")
    assert torch.equal(HfFolder(folder).hf_tensor("model.norm.weight"), held["model.norm.weight"])
    save_file({name: tensor + 1 for name, tensor in held.items()}, folder / "model.safetensors")
    both = HfFolder(folder)
    assert torch.equal(both.hf_tensor("model.norm.weight"), held["model.norm.weight"] + 1)
    assert both.notes == []


def recompressed(path):
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)


def without_a_storage(path):
    """The archive of a pickle whose tensors lie in a member that is cut."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in held.items():
            if not name.endswith("data/0"):
                archive.writestr(name, data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: torch.save({"x": Executed(str(path.parent / "executed"))}, path),
            "holds more than tensors, which is",
        ),
        (lambda path: torch.save(Executed(str(path.parent / "executed")), path), "holds more than tensors, which is"),
        (lambda path: torch.save([torch.ones(1)], path), "holds list, not tensors by name"),
        (lambda path: torch.save({"epoch": 3}, path), "holds 'epoch', which is int, no dense tensor"),
        (
            lambda path: torch.save({"x": torch.ones(1)}, path, _use_new_zipfile_serialization=False),
            r"not an archive of PyTorch 1\.6 or later",
        ),
        (lambda path: os.truncate(path, path.stat().st_size - 100), "truncated or damaged"),
        (lambda path: path.write_bytes(b""), "not an archive"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs's pointer to the file"),
        (recompressed, "is compressed, as PyTorch writes none"),
        (without_a_storage, "damaged"),
    ],
    ids=[
        "code",
        "code alone",
        "list",
        "number",
        "legacy",
        "truncated",
        "empty",
        "pointer",
        "compressed",
        "member missing",
    ],
)
def test_what_is_no_file_of_tensors_is_refused_in_one_line_and_not_executed(damage, message, folder):
    damage(folder / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=message) as error:
        HfFolder(folder)
    assert len(str(error.value).splitlines()) == 1
    assert not (folder / "executed").exists()


def test_an_index_of_pickles_names_files_that_are_there(folder):
    held = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    names = dict.fromkeys(held, "pytorch_model-00001-of-00001.bin")
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": names})
    assert torch.equal(HfFolder(folder).hf_tensor("model.norm.weight"), held["model.norm.weight"])
    for value, message in (
        ("gone.bin", r"names gone\.bin, which is missing"),
        ("../x", "outside the folder"),
        (3, "damaged"),
    ):
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {**names, "model.norm.weight": value}})
        with pytest.raises(ConversionError, match=message):
            HfFolder(folder)


PEAK_OF_IMPORT = """
import sys
from pathlib import Path
from flagscale_like.checkpoint.hf import import_folder

def peak():  # getrusage's is the parent's, where that is higher
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
import_folder(Path(sys.argv[1]), Path(sys.argv[2]))
print((peak() - before) * 1024)
"""


def test_an_import_of_pickles_holds_the_largest_tensors_and_not_the_file(tmp_path):
    shape: dict[str, Any] = {
        "num_layers": 12,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "ffn_hidden_size": 1536,
        "vocab_size": 512,
    }
    arch, family = ModelArch(**shape), find_family("llama")
    (tmp_path / "hf").mkdir()
    write_json(tmp_path / "hf/config.json", family.hf_config(arch))
    tensors = {
        name: torch.zeros(hf_shape)
        for rule in family.rules(arch)
        for name, hf_shape in zip(rule.hf, rule.hf_shapes(arch), strict=True)
    }
    torch.save(tensors, tmp_path / "hf/pytorch_model.bin")
    size = (tmp_path / "hf/pytorch_model.bin").stat().st_size
    largest = 2 * 512 * 1536 * 4  # gate and up
    command = [sys.executable, "-c", PEAK_OF_IMPORT, str(tmp_path / "hf"), str(tmp_path / "native")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    peak = int(done.stdout)
    assert size > 150e6
    assert peak < 7 * largest < size / 3, (peak, largest, size)
