"""LoRA adapters to and from peft, merged into their base, and on the command line."""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flagscale_like.checkpoint.adapters import AdaptedWeights, MergedWeights, open_base
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf_folder import HfFolder, fragment_of
from flagscale_like.checkpoint.manifest import find_checkpoint
from flagscale_like.checkpoint.peft_folder import PeftFolder, export_adapter, import_adapter
from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConversionError
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests import faults
from tests.commands import run_commands
from tests.families import tiny
from tests.harness import run_ranks, tiny_config

LORA = {"rank": 4, "alpha": 12}
FAMILIES = {
    "llama3": {"rslora": True},
    "qwen2": {"dora": True, "alpha": 3.5},
    "qwen3": {"targets": ["linear_fc2", "linear_qkv"]},
}


def adapted_run(folder, run_dir, **lora):
    """Three steps of LoRA on a tiny folder; returns its checkpoint."""
    config = tiny_config(
        run_dir,
        model=HfFolder(folder).arch.model_dump(),
        lora={**LORA, **lora},
        checkpoint__init_from_hf=str(folder),
        train__steps=3,
        optimizer__lr=0.05,
    )
    run_ranks(1, faults.train_run, config)
    return find_checkpoint(Path(run_dir))


def native_logits(sources):
    """Of the tiny models' tokens, for each source of weights."""
    torch.set_num_threads(1)
    found = []
    with parallel_context(Parallel()) as ctx, torch.no_grad():
        for source in sources:
            spec = ModelSpec(arch=source.arch, lora=getattr(source, "lora", None))
            model = Engine.build(spec, ctx, source=source).model.eval()
            found.append(model(tiny.ids(), None, None)[..., : source.arch.vocab_size].numpy())
    return found


def logits_of(*sources):
    (found,) = run_ranks(1, native_logits, sources)
    return [torch.from_numpy(logits) for logits in found]


@torch.no_grad()
def peft_logits(base, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).eval()(tiny.ids()).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_the_same_from_the_export_and_the_merged_model_does_too(name, tmp_path):
    base = tiny.make(name, tmp_path)
    reader = CheckpointReader(adapted_run(base, tmp_path / "run", **FAMILIES[name]))
    export_adapter(reader, tmp_path / "adapter", base_name=str(base), dtype=torch.float32, tokenizer=None)
    adapted = AdaptedWeights(open_base(reader, None, way_out=""), reader)
    ours, merged = logits_of(adapted, MergedWeights(adapted))
    plain = tiny.reference_logits(base, tiny.ids())
    assert (ours - plain).abs().max() > 0.05
    near = 1e-5 * ours.abs().max().item()
    assert peft_logits(base, tmp_path / "adapter") == pytest.approx(ours, abs=near)
    assert merged == pytest.approx(ours, abs=near)
    again = PeftFolder(tmp_path / "adapter", adapted.arch)  # the A's that the export repeated are one A again
    assert again.lora == adapted.lora.model_copy(update={"targets": again.lora.targets})
    assert all(torch.equal(again.full(key), reader.full(key)) for key in reader.keys())


def merged_logits(adapted, merged):
    """native_logits of both; the most elements of a tensor that merging asked its base for."""
    asked = [0]

    def listen(method):
        def listening(*arguments, **options):
            found = method(*arguments, **options)
            (out,) = (found,) if found is not None else (arguments[2],)
            asked.append(out.numel())
            return found

        return listening

    ours = native_logits([adapted])
    merged.base.full, merged.base.read = listen(merged.base.full), listen(merged.base.read)
    return *ours, *native_logits([merged]), max(asked)


def test_adapters_of_experts_are_merged_one_expert_at_a_time(tmp_path):
    base = tiny.make("mixtral", tmp_path)
    reader = CheckpointReader(adapted_run(base, tmp_path / "run", dora=True))
    adapted = AdaptedWeights(open_base(reader, None, way_out=""), reader)
    merged = MergedWeights(adapted)
    shapes = {key: merged.global_shape(key) for key in merged.keys()}
    count = adapted.arch.experts.count
    assert max(shapes.values(), key=math.prod)[0] == count  # the largest tensors are stacked experts
    ((ours, theirs, most),) = run_ranks(1, merged_logits, adapted, merged)
    assert abs(ours - tiny.reference_logits(base, tiny.ids()).numpy()).max() > 0.05
    assert theirs == pytest.approx(ours, abs=1e-5 * float(abs(ours).max()))
    assert most == max(math.prod(shape[-2:]) for shape in shapes.values())
    for key in (key for key in shapes if len(shapes[key]) == 3):
        experts = [fragment_of(rule, shapes[key]) for rule in merged.base.rules if rule.core == key]
        assert len(experts) == count
        parts = [torch.empty(shapes[key][1:]) for _ in experts]
        for expert, part in zip(experts, parts, strict=True):
            merged.read("param", expert, part.view(-1))
        assert torch.equal(torch.stack(parts), merged.full(key, dtype=torch.float32))


def foreign(base, folder, **options):
    """An adapter that peft made: every part of a matrix has its own A."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
    model.save_pretrained(folder)
    return folder


EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"target_modules": EVERYTHING, "use_dora": True}, 9),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"], "use_rslora": True}, 6),
        ({"target_modules": ["down_proj"], "layers_to_transform": [1]}, 3),
    ],
    ids=["everything with DoRA", "q, v and o", "one layer"],
)
def test_an_adapter_of_peft_is_imported_exactly(options, rank, tmp_path):
    base = tiny.make("llama3", tmp_path)
    folder = foreign(base, tmp_path / "peft", **options)
    lora = import_adapter(folder, HfFolder(base), tmp_path / "native")
    assert lora.rank == rank
    reader = CheckpointReader(tmp_path / "native")
    adapted = AdaptedWeights(open_base(reader, None, way_out=""), reader)
    expected = peft_logits(base, folder)
    assert (expected - tiny.reference_logits(base, tiny.ids())).abs().max() > 0.05
    ours, merged = logits_of(adapted, MergedWeights(adapted))
    assert ours == pytest.approx(expected, abs=2e-5)
    assert merged == pytest.approx(expected, abs=2e-5)
    export_adapter(reader, tmp_path / "back", base_name=None, dtype=torch.float32, tokenizer=None)
    assert peft_logits(base, tmp_path / "back") == pytest.approx(expected, abs=2e-5)


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: change_config(f, rank_pattern={"q_proj": 8}),
            "rank_pattern is .*, which native adapters do not compute",
        ),
        (lambda f: change_config(f, modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\], which native"),
        (lambda f: change_config(f, bias="all"), "bias is 'all', which native"),
        (lambda f: change_config(f, peft_type="VERA"), "peft_type is 'VERA', supported: 'LORA'"),
        (lambda f: change_config(f, init_lora_weights="pissa"), "init_lora_weights 'pissa' changes the base's weights"),
        (lambda f: change_config(f, r=8), r"A is \[3, 48\] and B \[48, 3\], rank 8 of a matrix of 48 x 48"),
        (
            lambda f: change_tensors(f, lambda t: {"x.lora_A.weight": torch.ones(3, 3), **t}),
            "no layer matrix of llama has x",
        ),
        (lambda f: change_tensors(f, lambda t: dict(list(t.items())[1:])), "has one of lora_A and lora_B, not both"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: cannot be read"),
    ],
)
def test_what_cannot_be_imported_is_refused(change, message, tmp_path):
    base = tiny.make("llama3", tmp_path)
    folder = foreign(base, tmp_path / "peft", target_modules=["q_proj"])
    change(folder)
    with pytest.raises(ConversionError, match=message):
        import_adapter(folder, HfFolder(base), tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_the_command_line_exports_imports_evaluates_and_says_what_is_wrong(tmp_path):
    base = tiny.make("llama3", tmp_path)
    adapted_run(base, tmp_path / "run")
    foreign(base, tmp_path / "peft", target_modules=EVERYTHING)
    other = tiny.make("llama", tmp_path)
    tokens = tmp_path / "text.txt"
    tokens.write_text("")
    (found,) = run_commands(
        [
            ["convert", "export", "--checkpoint", "run", "--out", "merged", "--merge", "--dtype", "fp32"],
            ["convert", "export", "--checkpoint", "run", "--out", "merged16", "--merge"],
            ["convert", "export", "--checkpoint", "run", "--out", "adapter", "--adapter"],
            ["convert", "export", "--checkpoint", "run", "--out", "adapter16", "--adapter", "--dtype", "bf16"],
            ["convert", "import", "--hf", str(base), "--adapter", "peft", "--out", "native"],
            ["convert", "export", "--checkpoint", "native", "--out", "both", "--merge", "--dtype", "fp32"],
            ["convert", "export", "--checkpoint", "run", "--out", "x"],
            ["convert", "export", "--checkpoint", "run", "--out", "x", "--merge", "--base", str(other)],
            ["convert", "export", "--checkpoint", "run", "--out", "x", "--merge", "--base", "nowhere"],
            ["ckpt", "list", "run"],
            ["ckpt", "verify", "run"],
            ["ckpt", "show", "run"],
        ],
        tmp_path,
    )
    merged, merged16, adapter, adapter16, imported, both, neither, wrong, nowhere, listed, verified, shown = found
    for outcome in (merged, merged16, adapter, adapter16, imported, both, listed, verified, shown):
        assert outcome.exit_code == 0, outcome.error
    assert "verified: transformers' logits differ" in merged.printed
    change = float(merged.printed.partition("changed the logits by ")[2].split()[0])
    assert change < 1e-5 < float(merged16.printed.partition("changed the logits by ")[2].split()[0])
    assert "verified: peft's logits differ from the native model's" in adapter.printed
    assert "verified: peft's logits differ from the native model's" in adapter16.printed
    assert "adapters of rank 9 and alpha 15 for linear_qkv, linear_proj, linear_fc1, linear_fc2" in imported.printed
    assert "verified: transformers' logits differ" in both.printed
    assert neither.exit_code == 10
    assert "give --merge for the whole model, or --adapter" in neither.error
    assert wrong.exit_code == 12
    assert "is another base than the one that the adapters" in wrong.error
    assert "the base of its adapters is not at nowhere" in nowhere.error
    assert "adapters" in listed.printed
    assert "base:" in shown.printed
