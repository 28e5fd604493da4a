"""Folders of models with experts: one by one or stacked, layers for multi-token prediction, memory, other models' weights."""

import json
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export, import_folder
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.errors import ConversionError
from flagscale_like.families import FAMILIES
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.runtime.parallel import parallel_context
from tests.commands import run_commands
from tests.families import tiny
from tests.harness import run_ranks, tiny_config


def same(a, b):
    """Whether two folders hold the same tensors, bit for bit."""
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_a_folder_whose_experts_are_stacked_gives_the_same_checkpoint(name, tmp_path):
    plain = tiny.make(name, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "stacked" / "model.safetensors"))
    import_folder(tmp_path / "stacked", tmp_path / "native")
    export(CheckpointReader(tmp_path / "native"), tmp_path / "again", dtype="stored")
    assert same(plain, tmp_path / "again")


def test_of_experts_one_is_missing_or_has_another_shape(tmp_path):
    folder = tiny.make("mixtral", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    save_file({k: t for k, t in tensors.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=f"1 tensors are missing: {name}"):
        HfFolder(folder)
    save_file({**tensors, name: tensors[name][1:].contiguous()}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=rf"{name} has shape \[79, 48\], config.json makes it \[80, 48\]"):
        HfFolder(folder)


def with_prediction_layers(folder, out, count):
    """A copy of a folder of DeepSeek-V3 that holds layers for multi-token prediction, as the published ones do."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    for index in range(count):
        more = {name.replace("layers.1.", f"layers.{2 + index}."): tensor.clone() for name, tensor in last.items()}
        more |= {f"model.layers.{2 + index}.{name}.weight": torch.ones(48) for name in ("enorm", "hnorm")}
        tensors |= more
    save_file(tensors, out / "model.safetensors")
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": count}))
    return out, len(last) + 2


def test_layers_for_multi_token_prediction_are_left_out_and_counted(tmp_path):
    plain = tiny.make("deepseek_v3", tmp_path)
    folder, tensors = with_prediction_layers(plain, tmp_path / "mtp", 1)
    ((result,),) = run_commands([["convert", "import", "--hf", str(folder), "--out", str(tmp_path / "native")]])
    assert result.exit_code == 0, result.error
    left_out = f"left out: {tensors} tensors of layer 2 behind the decoder's 2, which are for multi-token prediction"
    assert left_out in result.printed
    export(CheckpointReader(tmp_path / "native"), tmp_path / "again", dtype="stored")
    assert same(plain, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 0}))
    with pytest.raises(ConversionError, match=r"tensors are not known: model\.layers\.2\."):
        HfFolder(folder)


def test_the_command_line_verifies_an_export_with_transformers(tmp_path):
    names = ("qwen3_moe", "deepseek_v3")
    for name in names:
        import_folder(tiny.make(name, tmp_path), tmp_path / f"{name}-native")
    lines = [
        [
            "convert",
            "export",
            "--checkpoint",
            str(tmp_path / f"{name}-native"),
            "--out",
            str(tmp_path / f"{name}-again"),
        ]
        for name in names
    ]
    (results,) = run_commands(lines)
    for name, result in zip(names, results, strict=True):
        assert result.exit_code == 0, result.error
        assert "verified: transformers' logits differ" in result.printed
        folder = tmp_path / f"{name}-again"
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        held = load_file(folder / "model.safetensors")
        bias = [tensor.dtype for key, tensor in held.items() if key.endswith("e_score_correction_bias")]
        assert set(bias) == ({torch.float32} if name == "deepseek_v3" else set())


@contextmanager
def peak_of_anonymous_memory(found):
    """Put into `found` by how many bytes this process's own memory grows at most, sampled; mapped files do not count."""

    def held():
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    done, begin, most = threading.Event(), held(), [0]

    def sample():
        while not done.wait(0.001):
            most[0] = max(most[0], held() - begin)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.append(most[0])


def test_a_conversion_holds_the_matrices_of_one_expert_and_not_those_of_a_layer(tmp_path):
    config = transformers.MixtralConfig(
        **{
            **tiny.SHAPE,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
        num_key_value_heads=2,
        num_local_experts=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    layer = sum(p.numel() * 4 for name, p in model.named_parameters() if name.endswith("gate_up_proj"))
    assert layer == 64 << 20
    model.save_pretrained(tmp_path / "folder")
    del model
    found = []
    with peak_of_anonymous_memory(found):
        import_folder(tmp_path / "folder", tmp_path / "native")
    with peak_of_anonymous_memory(found):
        export(CheckpointReader(tmp_path / "native"), tmp_path / "again", dtype="stored")
    assert same(tmp_path / "folder", tmp_path / "again")
    assert max(found) < layer // 2, found


def test_a_family_with_experts_is_not_written_as_one_without_and_the_other_way_round():
    shape: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "vocab_size": 100,
    }
    mixture = ModelArch(**shape, experts={"count": 4, "top_k": 2, "ffn_hidden_size": 32})
    with pytest.raises(ConversionError, match="a model with experts cannot be written as llama"):
        FAMILIES["llama"].hf_config(mixture)
    with pytest.raises(ConversionError, match="a model without experts cannot be written as mixtral"):
        FAMILIES["mixtral"].hf_config(ModelArch(**shape))
    FAMILIES["mixtral"].hf_config(mixture)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_a_reward_model_goes_in_and_out(name, tmp_path):
    class_name, changes = tiny.MIXTURES[name]
    config = getattr(transformers, class_name)(**tiny.SHAPE, **changes, num_labels=2)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "folder")
    import_folder(tmp_path / "folder", tmp_path / "native")
    export(CheckpointReader(tmp_path / "native"), tmp_path / "again", dtype="stored")
    assert same(tmp_path / "folder", tmp_path / "again")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert loaded.score.weight.shape == (2, 48)


def train(config):
    with parallel_context(config.parallel) as ctx:
        pretrain(config, ctx)


def test_adapters_of_experts_have_no_place_in_pefts_format(tmp_path):
    folder = tiny.make("mixtral", tmp_path)
    model = HfFolder(folder).arch.model_dump(mode="json")
    settings = {"checkpoint__init_from_hf": str(folder), "checkpoint__interval": 2, "train__steps": 2}
    found = {}
    for name, targets in {"all": ["linear_qkv", "linear_fc1"], "attention": ["linear_qkv", "linear_proj"]}.items():
        lora = {"rank": 4, "targets": targets}
        run_ranks(1, train, tiny_config(tmp_path / name, model=model, lora=lora, **settings))
        paths = ["--checkpoint", str(tmp_path / name), "--out", str(tmp_path / f"{name}-peft")]
        line = ["convert", "export", "--adapter", *paths]
        ((found[name],),) = run_commands([line])
    assert "adapters of experts have no place in peft's format: merge them" in found["all"].error
    assert found["attention"].exit_code == 0, found["attention"].error
    assert "verified" in found["attention"].printed
