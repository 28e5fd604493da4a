"""Upcycling: the mixture of experts computes what the dense model does, and trains; what does not fit is refused."""

import json
from typing import Any

import pytest
import torch

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.upcycle import Upcycling, upcycle
from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConversionError
from flagscale_like.model.spec import ModelSpec
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.metrics import read_metrics
from tests.commands import run_commands
from tests.families import tiny
from tests.harness import run_ranks, tiny_config

# dense model -> the options, and the family that the mixture of experts exports as
UPCYCLED: dict[str, tuple[dict[str, Any], str]] = {
    "aquila": ({"experts": 4, "top_k": 2}, "mixtral"),
    "mistral": ({"experts": 4, "top_k": 3, "shared": True, "dense_layers": 1}, "mistral"),
    "baichuan-13b": ({"experts": 8, "top_k": 4, "split": 2}, "baichuan"),
    "baichuan2-7b": ({"experts": 8, "top_k": 4, "split": 4, "shared": True}, "baichuan2"),
    "qwen3": ({"experts": 4, "top_k": 2, "dense_layers": 1}, "qwen3_moe"),
}


def logits(sources):
    """fp32 logits of each model, in one process."""
    found = []
    with parallel_context(Parallel()) as ctx, torch.no_grad():
        for source in sources:
            spec = ModelSpec(arch=source.arch, seq_length=24, micro_batch_size=2)
            model = Engine.build(spec, ctx, source=source).model.eval()
            found.append(model(tiny.ids(), None, None)[..., : tiny.SHAPE["vocab_size"]].numpy())
    return found


def test_without_noise_the_logits_are_the_dense_models(tmp_path):
    sources = []
    for name, (options, family) in UPCYCLED.items():
        dense = HfFolder(tiny.make(name, tmp_path))
        arch = upcycle(dense, tmp_path / f"{name}-experts", Upcycling(**options), max_file_bytes=200_000)
        assert (arch.family, arch.experts.count, arch.experts.top_k) == (family, options["experts"], options["top_k"])
        assert arch.experts.ffn_hidden_size == 80 // options.get("split", 1)
        sources += [dense, CheckpointReader(tmp_path / f"{name}-experts")]
    upcycle(sources[0], tmp_path / "noisy", Upcycling(experts=4, top_k=2, noise=0.02))
    (found,) = run_ranks(1, logits, [*sources, CheckpointReader(tmp_path / "noisy")])
    *found, noisy = map(torch.from_numpy, found)
    for name, dense, mixture in zip(UPCYCLED, found[::2], found[1::2], strict=True):
        assert (mixture - dense).abs().max() < 2e-5 * dense.abs().max(), name
    changed = (noisy - found[0]).abs().max() / found[0].abs().max()
    assert 1e-3 < changed < 0.3


def test_experts_differ_by_their_noise_alone_and_a_seed_gives_the_same_ones(tmp_path):
    dense = HfFolder(tiny.make("llama", tmp_path))
    key = "decoder.layers.0.mlp.experts.linear_fc2.weight"
    found = {}
    for name, seed in {"a": 0, "again": 0, "other": 1}.items():
        upcycle(dense, tmp_path / name, Upcycling(experts=4, top_k=2, noise=0.1, seed=seed), workers=2)
        found[name] = CheckpointReader(tmp_path / name).full(key)
    assert torch.equal(found["a"], found["again"])
    assert not torch.equal(found["a"], found["other"])
    whole = dense.full("decoder.layers.0.mlp.linear_fc2.weight")
    noise = found["a"] - whole
    assert not torch.equal(found["a"][0], found["a"][1])
    assert noise.std() / whole.std() == pytest.approx(0.1, rel=0.05)


def train(config):
    with parallel_context(config.parallel) as ctx:
        pretrain(config, ctx)


def test_an_upcycled_checkpoint_trains_and_exports_and_a_dense_one_is_refused(tmp_path):
    """From a run's checkpoint, on experts over two ranks, to a folder of Mixtral."""
    run_ranks(1, train, tiny_config(tmp_path / "dense", train__steps=2, checkpoint__interval=2))
    native, again = str(tmp_path / "experts"), str(tmp_path / "folder")
    line = ["convert", "upcycle", "--checkpoint", str(tmp_path / "dense"), "--out", native]
    ((made,),) = run_commands([[*line, "--experts", "4", "--top-k", "2"]])
    assert made.exit_code == 0, made.error
    assert "4 experts a layer, 2 a token" in made.printed
    assert "its logits are the dense model's; it exports as mixtral" in made.printed
    experts = {"count": 4, "top_k": 2, "ffn_hidden_size": 96, "balance": "sequence"}
    load = {"checkpoint__load": native, "train__steps": 2, "model__experts": experts}
    run_ranks(2, train, tiny_config(tmp_path / "run", parallel={"ep": 2}, checkpoint__interval=2, **load))
    ((exported,),) = run_commands(
        [["convert", "export", "--checkpoint", str(tmp_path / "run"), "--out", again, "--as", "mixtral"]]
    )
    assert exported.exit_code == 0, exported.error
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "mixtral"
    first = [record["lm loss"] for record in read_metrics(tmp_path / "dense") if "lm loss" in record]
    then = [record["lm loss"] for record in read_metrics(tmp_path / "run") if "lm loss" in record]
    assert then[0] < first[0]  # it goes on from what was learned

    dense = str(tmp_path / "dense" / "checkpoints")
    for given, more, message in (
        (dense, {"model__experts": experts}, r"is of a dense model.*convert upcycle --experts 4 --top-k 2"),
        (native, {}, "is of a mixture of 4 experts, and the configuration of a dense model: leave out the group model"),
    ):
        with pytest.raises(AssertionError, match=message):
            run_ranks(1, train, tiny_config(tmp_path / "refused", checkpoint__load=given, train__steps=2, **more))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4, "top_k": 1}, "--top-k 1 would change what the model computes"),
        ({"experts": 6, "top_k": 4, "split": 4}, r"--experts \(6\) must be divisible by --split \(4\)"),
        ({"experts": 8, "top_k": 2, "split": 4}, r"--top-k \(2\) must be divisible by --split \(4\)"),
        ({"experts": 6, "top_k": 3, "split": 3}, r"ffn_hidden_size \(80\) must be divisible by --split \(3\)"),
        ({"experts": 2, "top_k": 4}, r"experts.top_k \(4\) must be at most experts.count \(2\)"),
        ({"experts": 4, "top_k": 2, "dense_layers": 3}, "dense_layers names layer 2, and the last of num_layers"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(options, message, tmp_path):
    dense = HfFolder(tiny.make("llama", tmp_path))
    with pytest.raises(ConversionError, match=message):
        upcycle(dense, tmp_path / "out", Upcycling(**options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_mixture_of_experts_is_not_upcycled(tmp_path):
    with pytest.raises(ConversionError, match=r"has experts already \(4 a layer\): give a dense one"):
        upcycle(HfFolder(tiny.make("mixtral", tmp_path)), tmp_path / "out", Upcycling(experts=4, top_k=2))
    assert not (tmp_path / "out").exists()
