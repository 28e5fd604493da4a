"""The demo, shortened: every part of it works and its table says what happened."""

import argparse
import contextlib
import io
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export, plan_export
from flagscale_like.config import Parallel
from flagscale_like.engine.hf_check import compare_logits
from flagscale_like.errors import ConversionError
from flagscale_like.runtime.parallel import parallel_context
from tests.commands import run_commands
from tests.harness import REPOSITORY, run_ranks

STEPS = 12


def warm(*words: str) -> None:
    """What examples/demo/run.py starts as a process, on ranks that have torch and megatron-core loaded."""
    command, ranks = list(words), 1
    if "--nproc-per-node" in command:
        at = command.index("--nproc-per-node")
        ranks = int(command[at + 1])
        del command[at : at + 2]
    (found,), *_ = run_commands([command], ranks=ranks)
    assert found.exit_code == 0, found.error
    print(found.printed)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run folder of a short demo on a part of the standard library, and what the demo printed."""
    folder = tmp_path_factory.mktemp("demo")
    source = folder / "source"
    source.mkdir()
    for module in sorted(Path(argparse.__file__).parent.glob("[a-d]*.py")):
        shutil.copy(module, source)
    printed = io.StringIO()
    with contextlib.chdir(REPOSITORY), contextlib.redirect_stdout(printed):
        main = runpy.run_path("examples/demo/run.py")["main"]
        main(["--run-dir", str(folder / "run"), "--steps", str(STEPS), "--input", str(source)], run=warm)
    return folder / "run", printed.getvalue()


def test_the_demo_leaves_what_it_says(demo):
    run_dir, printed = demo
    assert {
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "tensorboard",
        "checkpoints",
        "hf",
        "data",
        "resilience.jsonl",
        "events.jsonl",
        "samples.jsonl",
        "sample_losses",
    } == {p.name for p in run_dir.iterdir()}
    for part in (
        "unigram entropy",
        "completion by transformers",
        "tp 2 + sp, pp 2, dp 1",
        "tp 1, pp 2, dp 2",
        "tokens/s",
    ):
        assert part in printed
    assert f"resuming from step {STEPS // 2}" in printed
    assert "another layout" in printed
    assert "verified: transformers' logits differ" in printed


def test_the_demo_learns(demo):
    records = [json.loads(line) for line in (demo[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [record["lm loss"] for record in records if "lm loss" in record]
    assert [r["step"] for r in records if "lm loss" in r] == sorted({r["step"] for r in records if "lm loss" in r})
    assert losses[0] == pytest.approx(8.3, abs=0.3)  # ln 4096: knows nothing
    assert losses[-1] < losses[0] - 1.0


def test_the_native_model_completes_text_as_the_exported_one(demo):
    prompt = "def main("
    ((found,),) = run_commands(
        [["generate", "--checkpoint", str(demo[0]), "--prompt", prompt, "--max-new-tokens", "8"]]
    )
    assert found.exit_code == 0, found.error
    tokenizer = AutoTokenizer.from_pretrained(demo[0] / "hf")
    model = AutoModelForCausalLM.from_pretrained(demo[0] / "hf")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=8, do_sample=False)[0]
    assert found.printed.rstrip("\n") == tokenizer.decode(out, skip_special_tokens=True).rstrip("\n")


def compare(checkpoint, folder, dtype: str) -> float:
    with parallel_context(Parallel()) as ctx:
        reader = CheckpointReader(checkpoint)
        return compare_logits(plan_export(reader, dtype=dtype), folder, ctx)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_an_export_in_several_files_computes_the_same_logits(demo, tmp_path, dtype):
    checkpoint = demo[0] / "checkpoints" / f"step_{STEPS:08d}"
    export(CheckpointReader(checkpoint), tmp_path / "hf", dtype=dtype, max_file_bytes=2_000_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    (difference,) = run_ranks(1, compare, checkpoint, tmp_path / "hf", dtype)
    assert difference < 1e-5
    with pytest.raises(ConversionError, match="exists"):
        export(CheckpointReader(checkpoint), tmp_path / "hf")


def test_an_export_with_wrong_weights_is_not_called_good(demo, tmp_path):
    checkpoint = demo[0] / "checkpoints" / f"step_{STEPS:08d}"
    export(CheckpointReader(checkpoint), tmp_path / "hf", dtype="fp32")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = torch.roll(weights[name], 1, dims=0)  # what a wrong head order would do
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="the export is not usable"):
        run_ranks(1, compare, checkpoint, tmp_path / "hf", "fp32")
