"""Hugging Face folder -> native checkpoint -> Hugging Face folder: bit for bit; and what is not whole is refused."""

import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export, import_folder
from flagscale_like.checkpoint.hf_folder import INDEX, HfFolder
from flagscale_like.checkpoint.manifest import check_file, find_checkpoint, read_manifest
from flagscale_like.errors import CheckpointError, ConversionError
from tests.commands import command
from tests.families import tiny
from tests.harness import REPOSITORY


def tensors(folder):
    """All tensors of a folder but those that carry no weights."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name: tensor for name, tensor in found.items() if "inv_freq" not in name}


def assert_same_tensors(a, b):
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    different = [
        name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    ]
    assert not different


@pytest.mark.parametrize("name", tiny.ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_import_then_export_gives_every_bit_back(name, dtype, tmp_path):
    source = tiny.make(name, tmp_path, dtype)
    import_folder(source, tmp_path / "native")
    export(CheckpointReader(tmp_path / "native"), tmp_path / "again", dtype="stored")
    assert_same_tensors(source, tmp_path / "again")
    assert HfFolder(tmp_path / "again").arch == HfFolder(source).arch
    written, read = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", source))
    shared = {"bos_token_id", "eos_token_id", "pad_token_id", "hidden_size", "vocab_size", "tie_word_embeddings"}
    assert {key: written.get(key) for key in shared} == {key: read.get(key) for key in shared}
    if name in tiny.SHIPPED:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_several_processes_write_the_same_tensors_in_files_of_bounded_size(tmp_path):
    source = tiny.make("qwen2", tmp_path, torch.bfloat16)
    import_folder(source, tmp_path / "native", workers=2, max_file_bytes=40_000)
    files = [record for record in read_manifest(tmp_path / "native") if record.name.endswith(".safetensors")]
    assert len(files) > 2
    assert all(check_file(tmp_path / "native", record) is None for record in files)
    export(CheckpointReader(tmp_path / "native"), tmp_path / "again", workers=2, max_file_bytes=40_000)
    assert_same_tensors(source, tmp_path / "again")
    index = json.loads((tmp_path / "again" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors(source).values())
    assert all(f.stat().st_size < 50_000 for f in (tmp_path / "again").glob("*.safetensors"))
    HfFolder(tmp_path / "again")


@pytest.mark.parametrize("name", ["aquila", "baichuan-7b", "baichuan2-7b"])
def test_a_custom_family_written_as_llama_loads_in_plain_transformers_with_the_same_logits(name, tmp_path):
    source = tiny.make(name, tmp_path)
    import_folder(source, tmp_path / "native")
    export(CheckpointReader(tmp_path / "native"), tmp_path / "llama", family="llama", dtype="fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", trust_remote_code=False)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        logits = model.eval()(tiny.ids()).logits
    assert torch.allclose(logits, tiny.reference_logits(source, tiny.ids()), atol=1e-4)


@pytest.mark.parametrize("name", ["baichuan-13b", "qwen2", "qwen3", "mistral"])
def test_a_model_whose_maths_is_not_llamas_is_not_written_as_llama(name, tmp_path):
    import_folder(tiny.make(name, tmp_path), tmp_path / "native")
    with pytest.raises(ConversionError, match="cannot be written as llama"):
        export(CheckpointReader(tmp_path / "native"), tmp_path / "llama", family="llama")
    assert not (tmp_path / "llama").exists()


def rewrite(folder, change):
    """Save the tensors of a folder's one file anew, changed."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(Q), f"1 tensors are missing: {re.escape(Q)}"),
        (lambda held: held.update({"extra.weight": torch.ones(1)}), "1 tensors are not known: extra.weight"),
        (
            lambda held: held.update({Q: torch.ones(47, 48)}),
            re.escape(f"{Q} has shape [47, 48], config.json makes it [48, 48]"),
        ),
        (lambda held: held.update({Q: torch.ones(48, 48, dtype=torch.int64)}), "is int64; supported: float32"),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_a_tensor_that_config_json_does_not_describe_is_refused(change, message, tmp_path):
    folder = tiny.make("llama", tmp_path)
    rewrite(folder, change)
    with pytest.raises(ConversionError, match=message):
        import_folder(folder, tmp_path / "native")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_an_output_matrix_that_differs_from_the_embedding_it_is_said_to_be_tied_to_is_refused(tmp_path):
    folder = tiny.make("smollm2", tmp_path)
    rewrite(folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    import_folder(folder, tmp_path / "native")
    rewrite(folder, lambda held: held["lm_head.weight"].mul_(2))
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        HfFolder(folder)


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path):
    folder = tiny.make("llama", tmp_path)
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(
        ConversionError, match=rf"model\.safetensors: truncated: {size - 10} bytes, .* describes {size}"
    ):
        HfFolder(folder)
    os.truncate(path, 4)
    with pytest.raises(ConversionError, match="not a safetensors file, or truncated: 4 bytes"):
        HfFolder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]},
        {"shape": [1]},
        7,
    ],
)
def test_a_hostile_header_is_refused(entry, tmp_path):
    folder = tiny.make("llama", tmp_path)
    header = json.dumps({"x": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(ConversionError, match=r"model\.safetensors: (its safetensors header is damaged|truncated)"):
        HfFolder(folder)


@pytest.fixture
def sharded(tmp_path):
    """A folder in several files, with its index."""
    import_folder(tiny.make("llama", tmp_path), tmp_path / "native")
    export(CheckpointReader(tmp_path / "native"), tmp_path / "sharded", max_file_bytes=40_000)
    return tmp_path / "sharded"


def test_an_index_that_names_a_missing_file_is_refused(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ConversionError, match=f"names {gone.name}, which is missing"):
        HfFolder(sharded)


def test_an_index_that_lies_or_leaves_the_folder_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    for value, message in (
        (files[0], r"holds model\.norm\.weight; it does not"),
        ("../../etc/passwd", "names a file outside the folder"),
    ):
        index["weight_map"]["model.norm.weight"] = value
        (sharded / INDEX).write_text(json.dumps(index))
        with pytest.raises(ConversionError, match=message):
            HfFolder(sharded)
    (sharded / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(ConversionError, match=r"index\.json: damaged"):
        HfFolder(sharded)


@contextmanager
def files_up_to(size):
    """No file of this process may grow past `size` bytes: the kernel refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_interrupted_conversion_leaves_no_folder(tmp_path):
    source = tiny.make("llama", tmp_path)
    import_folder(source, tmp_path / "native")
    half = (source / "model.safetensors").stat().st_size // 2
    for convert in (
        lambda: import_folder(source, tmp_path / "other"),
        lambda: export(CheckpointReader(tmp_path / "native"), tmp_path / "again", dtype="stored"),
    ):
        with files_up_to(half), pytest.raises(ConversionError, match=r"could not be written: .*File too large"):
            convert()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "native"]


# Where a file would grow past the limit the kernel kills the process, which cannot catch it: no Python code runs then.
IMPORT_IN_FILES_UP_TO = """
import resource, signal, sys
from pathlib import Path
from flagscale_like.checkpoint.hf import import_folder

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
import_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_can_be_repeated(tmp_path):
    source, out = tiny.make("llama", tmp_path), tmp_path / "native"
    half = (source / "model.safetensors").stat().st_size // 2
    command = [sys.executable, "-c", IMPORT_IN_FILES_UP_TO, str(source), str(out), str(half)]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=120).returncode == -signal.SIGXFSZ
    (left,) = [path for path in tmp_path.iterdir() if path != source]
    assert left.name.startswith(".tmp-")
    assert next(left.glob("*.safetensors")).stat().st_size == half
    with pytest.raises(CheckpointError, match=r"no checkpoint there"):
        find_checkpoint(left)
    import_folder(source, out)
    CheckpointReader(out)


def test_nothing_is_overwritten(tmp_path):
    source = tiny.make("llama", tmp_path)
    with pytest.raises(ConversionError, match="exists; choose another folder"):
        import_folder(source, source)
    import_folder(source, tmp_path / "native")
    with pytest.raises(ConversionError, match="exists; choose another folder"):
        export(CheckpointReader(tmp_path / "native"), source)


def test_a_checkpoint_of_other_shapes_than_its_state_says_is_not_exported(tmp_path):
    import_folder(tiny.make("llama", tmp_path), tmp_path / "native")
    state = json.loads((tmp_path / "native" / "state.json").read_text())
    state["model"]["ffn_hidden_size"] = 81
    (tmp_path / "native" / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight has shape \(160, 48\), llama needs \(162, 48\)"):
        export(CheckpointReader(tmp_path / "native"), tmp_path / "again")


def test_the_command_line_imports_exports_verifies_and_says_what_is_wrong(tmp_path):
    source = tiny.make("baichuan2-13b", tmp_path)
    native, out = str(tmp_path / "native"), tmp_path / "again"
    imported = command("convert", "import", "--hf", str(source), "--out", native, apart=True)
    assert imported.returncode == 0, imported.stderr
    assert "baichuan2, " in imported.stdout
    exported = command("convert", "export", "--checkpoint", native, "--out", str(out), "--dtype", "fp32", apart=True)
    assert exported.returncode == 0, exported.stderr
    assert "not verified against other code: transformers has no model class for baichuan" in exported.stdout
    assert "logits from" in exported.stdout
    assert_same_tensors(source, out)
    shutil.rmtree(out)
    refused = command("convert", "export", "--checkpoint", native, "--out", str(out), "--as", "llama")
    assert refused.returncode == 13
    assert refused.stderr.startswith("error: a model with alibi cannot be written as llama")


def test_the_command_line_verifies_an_export_as_llama_with_transformers(tmp_path):
    import_folder(tiny.make("baichuan2-7b", tmp_path), tmp_path / "native")
    words = ["--checkpoint", str(tmp_path / "native"), "--out", str(tmp_path / "llama"), "--as", "llama"]
    exported = command("convert", "export", *words, apart=True)
    assert exported.returncode == 0, exported.stderr
    assert "verified: transformers' logits differ" in exported.stdout
