"""The pages under "Extend" are right: the code on them is executed as it stands, and used in real runs."""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flagscale_like import families
from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export, import_folder
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.data.batch import Batch
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConversionError, required
from flagscale_like.families.features import EXPERT_FEATURES, features
from flagscale_like.json_files import read_records
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.reduction import NamedSum
from flagscale_like.training.metrics import read_metrics
from flagscale_like.training.parts import Part
from tests.families import tiny
from tests.harness import REPOSITORY, run_ranks, tiny_config, write_yaml


def text_of(page):
    return (REPOSITORY / "docs" / page).read_text(encoding="utf-8")


def blocks(page, kind="python"):
    """The code blocks of a page, in order."""
    return re.findall(rf"```{kind}\n(.*?)```", text_of(page), flags=re.DOTALL)


def execute(page):
    """What the page's Python blocks define, executed in order as one module."""
    found = {}
    exec(compile("".join(blocks(page)), page, "exec"), found)
    return found


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
    shape: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "vocab_size": 9,
    }
    every = {"qkv_bias": True, "qk_norm": True, "norm_head": True, "sliding_window": 4, "num_query_groups": 2}
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    others = (
        {"qk_norm": True, "qk_norm_over": "projection", "tie_embeddings": True},
        {"latent_attention": latent, "experts": {"count": 4, "top_k": 2, "ffn_hidden_size": 8}},
    )
    names = set(EXPERT_FEATURES) | {"alibi"}
    names |= set().union(*(features(ModelArch(**shape, **more)) for more in (every, *others)))
    (listed,) = re.findall(r"in the words\nof `features` .*?: (.*?)\. An", page, flags=re.DOTALL)
    assert set(re.findall(r"`([\w ]+)`", " ".join(listed.split()))) == names
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


# An objective

LAYOUTS = {
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "pp4": (4, {"pp": 4}),
}


def batches_of(step):
    """Two micro-batches of two rows, whose sources are 0 and 1."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(2):
        rows = torch.randint(0, 250, (2, 33), generator=generator)
        mask = (torch.rand(2, 32, generator=generator) < 0.9).float()
        yield Batch(tokens=rows[:, :-1], labels=rows[:, 1:], loss_mask=mask, source=torch.tensor([0, 1]))


def train_the_pages_objective(config, weights):
    """What three of the page's steps return; this rank's stage, the methods that were called, and the samples."""
    page, called = execute("add-an-objective.md"), set()
    samples = []

    class Watched(page["WeightedNextToken"]):
        def inputs(self, batch):
            called.add("inputs")
            return super().inputs(batch)

        def loss(self, output, batch):
            called.add("loss")
            found = super().loss(output, batch)
            samples.append(found.samples["loss"].tolist())
            return found

    page["WeightedNextToken"] = Watched
    with parallel_context(config.parallel) as ctx:
        spec = dataclasses.replace(ModelSpec.of(config), micro_batch_size=2)
        engine, add_up = Engine.build(spec, ctx, optimizer=config.optimizer), NamedSum(ctx)
        steps = [
            page["train_step"](engine, page["weighted"](batches_of(step), torch.tensor(weights)), 2, add_up)
            for step in range(3)
        ]
        return steps, ctx.pp_rank, called, samples


def train_next_token(config):
    """The losses of the same three steps without weights."""
    with parallel_context(config.parallel) as ctx:
        spec = dataclasses.replace(ModelSpec.of(config), micro_batch_size=2)
        engine, add_up, found = Engine.build(spec, ctx, optimizer=config.optimizer), NamedSum(ctx), []
        for step in range(3):
            outputs = engine.forward_backward(batches_of(step), NextToken(), 2)
            sums = add_up({"grad-square": outputs.grad_square, **outputs.sums})
            engine.update(clip=1.0, grad_norm=sums["grad-square"] ** 0.5)
            found.append(sums["total"] / sums["count"])
        return found


WEIGHTS = [0.5, 2.0]


@pytest.fixture(scope="module")
def weighted_on_one_process():
    ((steps, _, called, samples),) = run_ranks(1, train_the_pages_objective, tiny_config("."), WEIGHTS)
    assert called == {"inputs", "loss"}
    # The first step's loss by hand, from what each row's tokens lost.
    counts = sum(float(batch.loss_mask.sum()) for batch in batches_of(0))
    rows = [row for pair in samples[:2] for row in pair]
    assert steps[0]["loss"] == pytest.approx(sum(r * w for r, w in zip(rows, WEIGHTS * 2, strict=True)) / counts)
    assert steps[0]["plain"] == pytest.approx(sum(rows) / counts)
    return steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pages_objective_trains_alike_on_every_layout_and_runs_where_the_page_says(layout, weighted_on_one_process):
    ranks, parallel = LAYOUTS[layout]
    stages = parallel.get("pp", 1)
    results = run_ranks(ranks, train_the_pages_objective, tiny_config(".", parallel=parallel), WEIGHTS)
    for steps, stage, called, _ in results:
        assert steps == [pytest.approx(step, rel=1e-5) for step in weighted_on_one_process]
        assert ("inputs" in called) == (stage in (0, stages - 1))
        assert ("loss" in called) == (stage == stages - 1)


def test_with_equal_weights_the_pages_objective_is_next_token_prediction(weighted_on_one_process):
    ((steps, *_),) = run_ranks(1, train_the_pages_objective, tiny_config("."), [1.0, 1.0])
    (plain,) = run_ranks(1, train_next_token, tiny_config("."))
    assert [step["loss"] for step in steps] == [step["plain"] for step in steps] == pytest.approx(plain, rel=1e-6)
    # The weights are in the gradient too: the second step differs.
    assert weighted_on_one_process[1]["plain"] != pytest.approx(plain[1], rel=1e-6)


# A part


def run_main(config_file, *overrides):
    """The page's program."""
    execute("add-a-part.md")["main"](str(config_file), *overrides)


def parts_found(run_dir):
    """What HardSamples left behind: (step, its total) of every step, and (step, kind, value, action) of every event."""
    records = [(r["step"], r["hard-samples/total"]) for r in read_metrics(run_dir) if "hard-samples/total" in r]
    events = [(e["step"], e["kind"], e["value"], e["action"]) for e in read_records(run_dir / "events.jsonl")]
    return records, events


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The page's program on one rank: six steps, saved at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("part")
    run_ranks(1, run_main, write_yaml(tiny_config(folder / "run"), folder / "run.yaml"))
    return folder / "run"


def test_the_pages_part_counts_judges_and_keeps_its_state(watched):
    totals, events = parts_found(watched)
    assert [step for step, _ in totals] == [1, 2, 3, 4, 5, 6]
    counts = [after - before for before, after in itertools.pairwise([0, *(total for _, total in totals)])]
    assert 0 < sum(counts) < 48
    # More than 0.4 of 8 samples are 4: those steps have an event, and their update was not made.
    found = [(step, count / 8) for (step, _), count in zip(totals, counts, strict=True) if count >= 4]
    assert found
    assert events == [(step, "hard-samples", value, "skip") for step, value in found]
    skipped = [r["skipped-steps"] for r in read_metrics(watched) if "skipped-steps" in r]
    assert skipped[-1] == len(found) < 6
    state = json.loads((watched / "checkpoints/step_00000006/state.json").read_text())
    assert state["hard samples"] == {"total": totals[-1][1]}


@pytest.mark.parametrize(("ranks", "layout"), [(2, {}), (2, {"pp": 2}), (2, {"tp": 2})], ids=["dp2", "pp2", "tp2"])
def test_the_pages_part_finds_the_same_on_two_ranks_also_after_a_resume(watched, ranks, layout, tmp_path):
    config = write_yaml(tiny_config(tmp_path / "run", parallel=layout), tmp_path / "run.yaml")
    if layout.get("pp"):
        ignored = shutil.ignore_patterns("step_00000006", "tensorboard", "latest")
        shutil.copytree(watched, tmp_path / "run", ignore=ignored)
    run_ranks(ranks, run_main, config)
    assert parts_found(tmp_path / "run") == parts_found(watched)


def named(name):
    """A part of that name."""
    return type("Named", (Part,), {"name": name})()


def refused_names(config):
    """What a start says to parts whose state would overwrite another's."""
    said = []
    for name in ("guard", "consumed_samples"):
        with parallel_context(config.parallel) as ctx:
            try:
                pretrain(config, ctx, parts=lambda engine, name=name: [named(name)])
                said.append("nothing")
            except AssertionError as error:
                said.append(str(error))
    return said


def test_a_part_whose_state_would_overwrite_another_ends_the_start(tmp_path):
    (((guard, run)),) = run_ranks(1, refused_names, tiny_config(tmp_path / "run"))
    assert guard.startswith("two parts share a name")
    assert run == "a part is named as what the run saves: {'consumed_samples'}"


def test_the_part_page_has_every_method():
    described = re.findall(r"^\| `(\w+)\(", text_of("add-a-part.md"), flags=re.MULTILINE)
    methods = [name for name, value in vars(Part).items() if callable(value)]
    assert [*described, "state", "load"] == methods


# A kernel

KERNELS = REPOSITORY / "kernels"
OPERATOR, CHECK, COMPILED, ROW = 0, 1, 2, 3  # the blocks of the page


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    """The page's module, as it would be in the package."""
    import flagscale_kernels

    path = tmp_path_factory.mktemp("kernel") / "relu_squared.py"
    path.write_text(blocks("add-a-kernel.md")[OPERATOR])
    name = "flagscale_kernels.relu_squared"
    spec = required(importlib.util.spec_from_file_location(name, path), "spec")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(REPOSITORY / "tests" / "kernels")
        patch.syspath_prepend(KERNELS / "benchmarks")
        spec.loader.exec_module(module)
        for function in ("relu_squared", "relu_squared_reference"):
            patch.setattr(flagscale_kernels, function, getattr(module, function), raising=False)
        importlib.import_module("interpreter_fixes").install()
        yield module


def parametrized(test):
    """The keyword arguments of each case of a test function."""
    marks = [mark.args for mark in test.pytestmark if mark.name == "parametrize"]
    for values in itertools.product(*(values for _, values in marks)):
        yield dict(zip((name for name, _ in marks), values, strict=True))


def test_the_pages_kernel_passes_the_pages_test(operator):
    found = {}
    exec(blocks("add-a-kernel.md")[CHECK], found)
    test = found["test_output_and_gradient_are_as_good_as_pytorch"]
    cases = list(parametrized(test))
    assert len(cases) == 12
    for case in cases:
        test(**case)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_pages_kernel_leaves_its_input_takes_strides_and_refuses_integers(operator, backend):
    x = torch.randn(6, 4).t().requires_grad_()
    before = x.detach().clone()
    y = operator.relu_squared(x, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(x, before)
    torch.testing.assert_close(y, before.clamp_min(0) ** 2)
    torch.testing.assert_close(dx, 2 * before.clamp_min(0))
    assert operator.relu_squared(torch.empty(0, 8), backend=backend).shape == (0, 8)
    with pytest.raises(ValueError, match=r"x\.dtype \(torch\.int64\) must be one of"):
        operator.relu_squared(torch.ones(3, dtype=torch.int64), backend=backend)
    torch.library.opcheck(
        torch.ops.flagscale_kernels.relu_squared.default, (torch.randn(3, 4, requires_grad=True), backend)
    )


def test_the_pages_row_of_the_benchmark_computes_one_thing(operator):
    import flagscale_kernels

    workloads = importlib.import_module("workloads")
    found = []
    names = {"tiny": True, "found": found, "Workload": workloads.Workload, "fk": flagscale_kernels}
    names |= {
        "rand": torch.randn,
        "both": lambda n, forward, backward: {"forward": forward * n, "backward": backward * n},
    }
    exec(blocks("add-a-kernel.md")[ROW], names)
    (row,) = found
    tensors = row.tensors()
    torch.testing.assert_close(row.ours(*tensors), row.reference(*tensors))
    assert row.traffic_bytes == {"forward": 4 * 8 * 64, "backward": 6 * 8 * 64}


COMPILE = """
    import importlib.util, json, sys
    sys.path.insert(0, {benchmarks!r})
    import resources
    spec = importlib.util.spec_from_file_location("flagscale_kernels.relu_squared", {module!r})
    resources.MODULES["relu_squared"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(resources.MODULES["relu_squared"])
    exec({block!r}, vars(resources))
    resources.cases = lambda quick: [("relu_squared", lambda: resources.relu_squared(resources.torch.bfloat16))]
    print(json.dumps(resources.collect(quick=True, archs=(90,))))
"""


def test_the_pages_kernel_compiles_and_does_not_spill(operator):
    # A process of its own: this one interprets.
    code = textwrap.dedent(COMPILE).format(
        benchmarks=str(KERNELS / "benchmarks"), module=operator.__file__, block=blocks("add-a-kernel.md")[COMPILED]
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["kernel"] for row in rows] == ["_relu_squared_forward_kernel", "_relu_squared_backward_kernel"]
    assert all(row["stack"] == 0 and row["fits"] for row in rows)


@pytest.mark.parametrize("page", ["add-a-family", "add-an-objective", "add-a-part", "add-a-kernel"])
def test_the_files_that_a_page_names_exist(page):
    prose = re.sub(r"```.*?```", "", text_of(f"{page}.md"), flags=re.DOTALL)
    named = set(re.findall(r"`((?:[\w-]+/)+[\w-]+\.py)`", prose))
    assert named
    for name in named - {"kernels/flagscale_kernels/relu_squared.py", "tests/kernels/test_relu_squared.py"}:
        assert any((root / name).is_file() for root in (REPOSITORY, REPOSITORY / "flagscale_like")), name
