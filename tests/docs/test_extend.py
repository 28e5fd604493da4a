"""The pages under "Extend" are right: the code on them is executed as it stands, and used in real runs."""

import importlib
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from flagscale_like import families
from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export, import_folder
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConversionError
from flagscale_like.families.family import features
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests.families import tiny
from tests.harness import REPOSITORY, run_ranks


def text_of(page):
    return (REPOSITORY / "docs" / page).read_text(encoding="utf-8")


def blocks(page, kind="python"):
    """The code blocks of a page, in order."""
    return re.findall(rf"```{kind}\n(.*?)```", text_of(page), flags=re.DOTALL)


# A family


def install(site, package, source, entries):
    """Write an installed package of one module, with the entry points of its pyproject.toml."""
    site.mkdir(exist_ok=True)
    (site / f"{package}.py").write_text(source)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)


def page_entries():
    """The entry points of the page's TOML, as an installer writes them."""
    (toml,) = blocks("add-a-family.md", "toml")
    group, lines = re.fullmatch(r'\[project\.entry-points\."(.*?)"\]\n(.*)', toml, flags=re.DOTALL).groups()
    return f"[{group}]\n" + lines.replace('"', "")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder for installed packages, on the path; families are looked for again."""
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(folder)
    for name in ("larch", "other"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    families.families.cache_clear()
    yield folder
    families.families.cache_clear()


@pytest.fixture
def larch(site):
    """The page's package, installed."""
    install(site, "larch", "".join(blocks("add-a-family.md")), page_entries())
    importlib.invalidate_caches()
    return importlib.import_module("larch")


def plant(llama, out):
    """A Llama folder's weights under Larch's names, written without Larch's rules. Returns the tensors."""
    tensors = load_file(llama / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    names = {
        "larch.tokens.weight": "model.embed_tokens.weight",
        "larch.final.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    planted = {}
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"larch.blocks.{i}.", f"model.layers.{i}."
        names |= {
            ours + "before_attention.weight": theirs + "input_layernorm.weight",
            ours + "before_mlp.weight": theirs + "post_attention_layernorm.weight",
            ours + "attention.out.weight": theirs + "self_attn.o_proj.weight",
            **{f"{ours}mlp.{x}_proj.weight": f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
        }
        kvq = [tensors[f"{theirs}self_attn.{x}_proj.weight"] for x in "kvq"]
        planted[ours + "attention.kvq.weight"] = torch.cat(kvq)
    planted |= {ours: tensors[theirs] for ours, theirs in names.items()}
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in planted.items()}, out / "model.safetensors")
    larch = {"model_type": "larch", "architectures": ["LarchForCausalLM"], "parallel_residual": False}
    (out / "config.json").write_text(json.dumps(config | larch))
    return planted


def logits_of(site, folder, ids):
    """The native model's logits of a folder of an installed family, [b, s, v]."""
    sys.path.insert(0, str(site))
    with parallel_context(Parallel()) as ctx, torch.no_grad():
        source = HfFolder(folder)
        spec = ModelSpec(arch=source.arch, seq_length=ids.shape[1])
        model = Engine.build(spec, ctx, source=source).model.eval()
        return source.family.name, model(ids, None, None)[..., : source.arch.vocab_size].numpy()


def test_the_pages_family_is_imported_exported_bit_for_bit_and_computes_what_llama_does(larch, site, tmp_path):
    llama = tiny.make("llama3", tmp_path)
    planted = plant(llama, tmp_path / "larch")
    arch = import_folder(tmp_path / "larch", tmp_path / "native", workers=2)
    assert (arch.family, arch.num_query_groups, arch.num_attention_heads) == ("larch", 2, 6)
    export(CheckpointReader(tmp_path / "native"), tmp_path / "out", dtype="stored", workers=2)
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == planted.keys()
    for name, tensor in planted.items():
        assert torch.equal(found[name], tensor), name
    assert HfFolder(tmp_path / "out").arch == arch
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LarchForCausalLM"]
    ((name, logits),) = run_ranks(1, logits_of, site, tmp_path / "out", tiny.ids())
    expected = tiny.reference_logits(llama, tiny.ids())
    assert name == "larch"
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4 < expected.abs().max()
    # The same weights as Llama.
    export(CheckpointReader(tmp_path / "native"), tmp_path / "as-llama", dtype="stored", family="llama")
    assert all(
        torch.equal(tensor, load_file(llama / "model.safetensors")[name])
        for name, tensor in load_file(tmp_path / "as-llama" / "model.safetensors").items()
    )


def test_the_pages_family_refuses_what_it_cannot_compute(larch, tmp_path):
    plant(tiny.make("llama", tmp_path), tmp_path / "larch")
    config = json.loads((tmp_path / "larch" / "config.json").read_text())
    (tmp_path / "larch" / "config.json").write_text(json.dumps(config | {"parallel_residual": True}))
    with pytest.raises(ConversionError, match=r"config\.json: parallel_residual is True, supported: False"):
        HfFolder(tmp_path / "larch")
    arch = HfFolder(tmp_path / "llama").arch
    with pytest.raises(ConversionError, match="with qkv_bias cannot be written as larch"):
        families.find_family("larch").hf_config(arch.model_copy(update={"qkv_bias": True}))


def test_the_family_page_has_every_feature_and_every_rule():
    page = text_of("add-a-family.md")
    shape = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96, "vocab_size": 9}
    every = {"qkv_bias": True, "qk_norm": True, "norm_head": True, "sliding_window": 4, "num_query_groups": 2}
    names = features(ModelArch(**shape, **every)) | {"alibi", "tie_embeddings"}
    (listed,) = re.findall(r"in the words\nof `features` .*?: (.*?)\. An", page, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == names
    rules = vars(importlib.import_module("flagscale_like.families.weight_map")).values()
    known = {rule.__name__ for rule in rules if isinstance(rule, type) and issubclass(rule, families.family.Rule)}
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == known


def test_a_family_that_cannot_be_told_apart_or_imported_is_refused_in_one_line(larch, site):
    def refusal(source, entry):
        for path in site.glob("other*"):
            path.unlink() if path.is_file() else [*map(type(path).unlink, path.iterdir()), path.rmdir()]
        sys.modules.pop("other", None)
        install(site, "other", source, f"[flagscale_like.families]\n{entry}\n")
        importlib.invalidate_caches()
        families.families.cache_clear()
        with pytest.raises(ConversionError) as found:
            families.find_family("llama")
        return str(found.value)

    made = "import dataclasses, larch\nFOUND = dataclasses.replace(larch.LARCH, {})\n"
    assert refusal("raise OSError('lost\\nmore')", "fir = other:FOUND") == (
        "package other cannot be imported (OSError: lost): mend or uninstall it"
    )
    assert refusal("FOUND = 3", "fir = other:FOUND") == "package other: other:FOUND is no Family"
    assert refusal(made.format("name='oak'"), "fir = other:FOUND") == (
        "package other: other:FOUND is named 'oak', its entry point 'fir'"
    )
    assert refusal(made.format("name='llama'"), "llama = other:FOUND") == (
        "package other gives a family named llama, which is built in: rename it"
    )
    assert refusal(made.format("name='fir', model_type='qwen2'"), "fir = other:FOUND") == (
        "package other gives the family fir the model_type 'qwen2', which is that of qwen2: choose another"
    )
    assert refusal(made.format("name='oak', architectures=()"), "oak = other:FOUND") == (
        "package other gives the family oak the model_type 'larch', which is that of larch: choose another"
    )
    assert refusal(made.format("name='larch'"), "larch = other:FOUND") == (
        "package larch and package other both give a family named larch: uninstall one"
    )
