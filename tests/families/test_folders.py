"""Folders as they are found beside transformers: which file counts, defaults, names of wrappers, quantized weights."""

import json
import random
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.errors import ConversionError
from flagscale_like.families import FAMILIES, read_config
from flagscale_like.families.features import NOT_EXPRESSED
from flagscale_like.families.settings import Settings
from flagscale_like.families.weight_map import Direct
from tests.families import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("folders"))


def renamed(folder, out, change):
    """A copy of a folder whose tensors have other names or values."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    save_file({name: tensor for pair in tensors.items() for name, tensor in change(*pair)}, out / "model.safetensors")
    return out


def test_beside_an_index_the_single_file_is_read_as_transformers_does(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(HfFolder(folder).hf_tensor("model.norm.weight"), tensors["model.norm.weight"])


def test_a_missing_window_of_mistral_is_transformers_default_and_null_is_none(tmp_path):
    folder = tiny.make("mistral", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    for given, window in (({"sliding_window": 7}, 7), ({"sliding_window": None}, None), ({}, 4096)):
        changed = {key: value for key, value in values.items() if key != "sliding_window"} | given
        (folder / "config.json").write_text(json.dumps(changed))
        assert read_config(folder)[1].sliding_window == window


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda n, t: [(f"_orig_mod.{n}", t)], "the names begin with '_orig_mod.'"),
        (lambda n, t: [(f"base_model.model.{n}", t)], "the names begin with 'base_model.model.'"),
        (
            lambda n, t: [(n, t.to(torch.float8_e4m3fn)), (f"{n}_scale_inv", t[:1])] if "proj" in n else [(n, t)],
            "is float8_e4m3fn; supported: float32, bfloat16, float16. Of a quantized model",
        ),
    ],
    ids=["torch.compile", "peft", "FP8"],
)
def test_names_and_types_that_others_write_are_refused_with_what_they_are(change, part, llama, tmp_path):
    folder = renamed(llama, tmp_path / "x", change)
    with pytest.raises(ConversionError) as error:
        HfFolder(folder)
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_names_without_their_prefix_are_read(llama, tmp_path):
    """As transformers writes a decoder that it saved by itself."""
    bare = HfFolder(renamed(llama, tmp_path / "x", lambda n, t: [(n.removeprefix("model."), t)]))
    whole = HfFolder(llama)
    assert bare.keys() == whole.keys()
    for key in whole.keys():
        assert torch.equal(bare.full(key), whole.full(key)), key


def shapes(count, seed):
    """Models of any shape that this project trains, with each field at unusual values too."""
    source = random.Random(seed)
    for _ in range(count):
        heads = source.choice([2, 4, 6])
        kind = source.choice(["rope", "rope", "alibi", "nlpe"])
        position = {"kind": kind, "base": source.choice([10000.0, 5e5])}
        if kind == "nlpe":
            position["threshold"] = 16
        layers = source.choice([1, 3])
        yield ModelArch(
            num_layers=layers,
            hidden_size=heads * 8,
            num_attention_heads=heads,
            num_query_groups=source.choice([heads, 2]),
            head_dim=source.choice([8, 8, 16]),
            ffn_hidden_size=40,
            experts=experts(source, layers) if source.random() < 0.5 else None,
            vocab_size=source.choice([100, 64_000, 125_696, 130]),
            max_position_embeddings=source.choice([0, 512, 4096]),
            position=position,
            norm_eps=source.choice([1e-5, 1e-6]),
            tie_embeddings=(tied := source.random() < 0.3),
            qkv_bias=source.random() < 0.4,
            qk_norm=(normed := source.random() < 0.3),
            qk_norm_over="projection" if normed and source.random() < 0.5 else "head",
            norm_head=not tied and source.random() < 0.3,
            sliding_window=source.choice([None, None, 64]) if kind != "nlpe" else None,
        )


def experts(source, layers, *, sigmoid=0.3):
    """Experts of any kind, each field at unusual values too."""
    score = "sigmoid" if source.random() < sigmoid else "softmax"
    top_k, shared = source.choice([1, 2, 3]), source.choice([0, 0, 24, 48, 30])
    groups = source.choice([1, 1, 4])
    return {
        "count": 8,
        "top_k": top_k,
        "ffn_hidden_size": 24,
        "shared_ffn_hidden_size": shared,
        "shared_gate": bool(shared) and source.random() < 0.5,
        "score": score,
        "normalize": top_k > 1 and (score == "sigmoid" or source.random() < 0.6),
        "scale": source.choice([1.0, 1.0, 2.5]),
        "groups": groups,
        "top_groups": source.choice([2, 3]) if groups > 1 else 1,
        "group_score": source.choice(["max", "top2"]) if groups > 1 else "top2",
        "balance": source.choice(["batch", "sequence", "none"]),
        "coefficient": source.choice([0.0, 0.001]),
        "bias": score == "sigmoid" and source.random() < 0.7,
        "z_loss": source.choice([0.0, 0.001]),
        "dense_layers": source.choice([[], [], [0], list(range(layers)), [layers - 1]]),
    }


def latent_shapes(count, seed):
    """Models with latent attention."""
    source = random.Random(seed)
    for _ in range(count):
        layers = source.choice([1, 3])
        yarn = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale_all_dim": 0.7}
        yield ModelArch(
            num_layers=layers,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=40,
            vocab_size=130,
            max_position_embeddings=source.choice([0, 512]),
            position={"base": source.choice([10000.0, 5e5]), "scaling": source.choice([None, yarn])},
            norm_eps=source.choice([1e-6, 1e-6, 1e-5]),
            tie_embeddings=source.random() < 0.3,
            experts=experts(source, layers, sigmoid=0.5) if source.random() < 0.9 else None,
            latent_attention={
                "q_lora_rank": source.choice([None, 12]),
                "kv_lora_rank": source.choice([8, 20]),
                "qk_nope_head_dim": source.choice([6, 16]),
                "qk_rope_head_dim": source.choice([4, 8]),
                "v_head_dim": source.choice([6, 10]),
            },
        )


def comparable(arch):
    """What a config.json has to bring back. The width of dense FFNs is nothing where there are none."""
    values = arch.model_dump(exclude={*NOT_EXPRESSED, "max_position_embeddings"})
    if arch.experts is not None:
        for name in ("balance", "coefficient", "bias_rate", "z_loss"):
            del values["experts"][name]
        if not arch.experts.dense_layers:
            del values["ffn_hidden_size"]
    return values


def test_every_field_of_a_model_comes_back_from_config_json_or_the_family_refuses_it():
    """Held against the reader, not against the check in hf_config: the two could be wrong together."""
    written = dict.fromkeys(FAMILIES, 0)
    for arch in (*shapes(3000, seed=3), *latent_shapes(2000, seed=4)):
        for name, family in FAMILIES.items():
            try:
                values = json.loads(json.dumps(family.hf_config(arch)))
            except ConversionError as error:
                assert len(str(error).splitlines()) == 1  # noqa: PT017
                continue
            found = family.read(Settings(values, "config.json"))
            assert comparable(found) == comparable(arch)
            assert arch.max_position_embeddings in (0, found.max_position_embeddings)
            written[name] += 1
    assert min(written.values()) > 0, written


def test_a_head_size_that_qwen2_does_not_have_is_refused_by_name():
    shape: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 40,
        "vocab_size": 100,
    }
    arch = ModelArch(**shape, head_dim=16, qkv_bias=True)
    with pytest.raises(
        ConversionError, match="qwen2 cannot express the model: .* model.head_dim 16 as 8; choose another"
    ):
        FAMILIES["qwen2"].hf_config(arch)


@pytest.mark.parametrize("name", ["qwen2", "baichuan2-7b", "deepseek_v2"])
def test_rows_of_a_matrix_are_read_without_the_others(name, tmp_path, monkeypatch):
    folder = HfFolder(tiny.make(name, tmp_path))
    names = []
    tensor = HfFolder.hf_tensor
    monkeypatch.setattr(
        HfFolder, "hf_tensor", lambda self, name, **more: (names.append(name), tensor(self, name, **more))[1]
    )
    for rule in folder.rules:
        assert rule.row_sources(folder.arch) is not None
        whole, rows = folder.part(rule), rule.shape[0]
        for first, stop in ((0, rows // 2), (rows // 2, rows), (rows // 3, rows // 3 + 1)):
            assert torch.equal(folder.rows(rule, first, stop), whole[first:stop])
        if type(rule).__name__ == "GatedMLP":
            names.clear()
            folder.rows(rule, 0, rows // 4)
            assert names == [rule.hf[0]]  # of gate and up, the gate alone


def test_a_rule_that_does_more_than_rearrange_rows_is_applied_to_the_whole_tensor(llama):
    class Scaled(Direct):
        def to_core(self, tensors, arch):
            return tensors[0] * 2

    class Transposed(Direct):
        def to_core(self, tensors, arch):
            return tensors[0].T

    folder = HfFolder(llama)
    for kind in (Scaled, Transposed):
        rule = kind("decoder.layers.0.mlp.linear_fc2.weight", (48, 80), ("model.layers.0.mlp.down_proj.weight",))
        assert rule.row_sources(folder.arch) is None
        assert torch.equal(folder.rows(rule, 3, 5), folder.part(rule)[3:5])
