"""LoRA: every layout trains as one process does, the base stays as it is, and the adapters compute what peft's compute."""

import functools
import itertools
from typing import Any

import peft
import pytest
import torch
import transformers

from flagscale_like.arch import is_adapter
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.peft_folder import layer_rules
from flagscale_like.data.pretrain import build_datasets, micro_batches
from flagscale_like.engine.engine import Engine
from flagscale_like.model.build import named_shards
from flagscale_like.model.lora import MASKS_DRAWN, adapted
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import parallel_context  # before megatron-core

from megatron.core.tensor_parallel import get_cuda_rng_tracker  # isort: skip
from tests.families import tiny
from tests.harness import build_engine, run_ranks, tiny_config, train_steps

LORA = {"rank": 4, "alpha": 8}
EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 48, "shared_ffn_hidden_size": 32, "dense_layers": 1}
CASES = {
    "tp2": (2, {"parallel": {"tp": 2}}),
    "tp2 sp, dora, full recompute": (
        2,
        {"parallel": {"tp": 2, "sp": True}, "train__recompute": "full", "lora__dora": True},
    ),
    "pp2, selective": (2, {"parallel": {"pp": 2}, "train__recompute": "selective"}),
    "pp2 vpp2, full recompute": (2, {"parallel": {"pp": 2, "vpp": 2}, "train__recompute": "full"}),
    "pp2 uneven": (2, {"parallel": {"pp": 2, "first_stage_layers": 3}}),
    "dp2, rslora": (2, {"lora__rslora": True, "lora__plus_ratio": 4.0}),
    "ep2, experts": (2, {"parallel": {"ep": 2}, "model__experts": EXPERTS}),
    "tp2 sp ep2, experts, dora": (
        2,
        {"parallel": {"tp": 2, "sp": True, "ep": 2}, "model__experts": EXPERTS, "lora__dora": True},
    ),
}


def steps_of(config, count=3):
    """Losses and norms of some steps; whether the base kept its bits; whether copies of adapters agree; what is trained."""
    torch.set_num_threads(1)
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        before = {n: p.detach().clone() for m in engine.models for n, p in named_shards(m).items()}
        found = train_steps(engine, config, count)
        after = {n: p for m in engine.models for n, p in named_shards(m).items()}
        same = all(torch.equal(before[n], p) for n, p in after.items() if not is_adapter(n))
        moved = all(not torch.equal(before[n], p) for n, p in after.items() if is_adapter(n))
        sums = {
            n: p.double().sum().item()
            for n, p in after.items()
            if engine.spec.table[n].cut is None and not engine.spec.table[n].experts
        }
        return found, same, moved, sums, engine.state_bytes()


@functools.cache
def one_process(experts, **lora):
    """What steps_of() finds on one process, without recompute."""
    changes = {"model__experts": EXPERTS} if experts else {}
    ((found, *_),) = run_ranks(1, steps_of, tiny_config("unused", lora={**LORA, **lora}, **changes))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_layout_trains_adapters_as_one_process_does(name):
    ranks, changes = CASES[name]
    config = tiny_config("unused", **{"lora": {**LORA}, **changes})
    options: dict[str, Any] = {
        name.removeprefix("lora__"): value for name, value in changes.items() if name.startswith("lora__")
    }
    expected = one_process("model__experts" in changes, **options)
    results = run_ranks(ranks, steps_of, config)
    for found, same, moved, sums, _ in results:
        assert found == [pytest.approx(pair, rel=1e-5) for pair in expected]
        assert same
        assert moved
        assert sums == results[0][3] or config.parallel.pp > 1


def reference_of(config):
    """Losses with the adapters, without them, with them again, and of a model that never had any."""
    torch.set_num_threads(1)
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        plain = build_engine(config.model_copy(update={"lora": None}), ctx)
        train_steps(engine, config, 2)
        found = [forward_loss(engine, config)]
        with engine.adapters_off():
            found.append(forward_loss(engine, config))
        return [*found, forward_loss(engine, config), forward_loss(plain, config)]


def forward_loss(engine, config):
    data, _ = build_datasets(config, engine.ctx, train_samples=8, valid_samples=0)
    with engine.evaluation():
        outputs = engine.forward(micro_batches(data, config, engine.ctx), NextToken(), 8 // engine.ctx.dp)
    return engine.ctx.sum([float(outputs.sums["total"])])[0]


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True}], ids=["one process", "tp2 sp"])
def test_with_its_adapters_off_an_engine_is_the_model_that_it_began_with(layout):
    config = tiny_config("unused", lora={**LORA, "dora": True}, parallel=layout)
    for on, off, again, plain in run_ranks(2 if layout else 1, reference_of, config):
        assert off == plain
        assert on == again != off


def with_dropout(config, recomputes):
    """Of each kind of recompute: losses and norms of two steps, and the sums of the parameters that ranks hold alike."""
    torch.set_num_threads(1)
    found = []
    with parallel_context(config.parallel) as ctx:
        for recompute in recomputes:
            train = config.train.model_copy(update={"recompute": recompute})
            engine = build_engine(config.model_copy(update={"train": train}), ctx)
            get_cuda_rng_tracker().set_states(get_cuda_rng_tracker().get_states() | {MASKS_DRAWN: torch.tensor(0)})
            steps = train_steps(engine, config, 2)
            named = named_shards(engine.model).items()
            alike = {n: p.double().sum().item() for n, p in named if engine.spec.table[n].cut is None}
            masks = [adapter._drop(torch.ones(64)).sum().item() for _, adapter in adapted(engine.models)]
            found.append((steps, alike, masks))
    return found


@pytest.mark.parametrize("sp", [False, True], ids=["tp2", "tp2 sp"])
def test_recompute_draws_the_masks_of_dropout_again_and_ranks_share_those_of_what_they_share(sp):
    config = tiny_config("unused", lora={**LORA, "dropout": 0.5}, parallel={"tp": 2, "sp": sp})
    one, other = run_ranks(2, with_dropout, config, ["none", "full", "selective"])
    (steps, alike, masks), full, selective = one
    assert full[0] == selective[0] == [pytest.approx(pair, rel=1e-6) for pair in steps]
    assert alike == other[0][1]
    # Four matrices a layer: linear_proj, linear_qkv, linear_fc1, linear_fc2. Those cut by columns have other inputs.
    by_column = [mine for mine, theirs in zip(masks, other[0][2], strict=True) if mine == theirs]
    assert len(by_column) < len(masks) / 4 if sp else len(by_column) >= len(masks) / 2
    assert len(set(masks)) > len(masks) / 4


def five_steps(folder):
    """(ours, peft's) losses and norms, from one base, one A and one batch a step. peft's q, k, v (gate, up) share their A."""
    torch.set_num_threads(1)
    config = tiny_config(
        "unused",
        model=HfFolder(folder).arch.model_dump(),
        lora={**LORA, "rslora": True},
        checkpoint__init_from_hf=str(folder),
        optimizer__clip_grad=0.5,
    )
    options = config.optimizer
    with parallel_context(config.parallel) as ctx:
        engine = Engine.build(ModelSpec.of(config), ctx, optimizer=options, source=HfFolder(folder))
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(
            hf, peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=targets, task_type="CAUSAL_LM")
        )
        ours = named_shards(engine.model)
        for matrix, rule in layer_rules(config.model):
            first = None
            for name in rule.hf:
                part = model.base_model.model.get_submodule(name.removesuffix(".weight"))
                first = first or part.lora_A["default"]
                part.lora_A["default"] = first
            first.weight.data.copy_(ours[matrix.name.removesuffix("weight") + "lora.a"].detach())
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(
            trained,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        data, _ = build_datasets(config, ctx, train_samples=40, valid_samples=0)
        batches, theirs = micro_batches(data, config, ctx), []
        for _ in range(5):
            adam.zero_grad()
            total = 0.0
            for batch in itertools.islice(batches, 8):
                logits = model(input_ids=batch.tokens, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()) / 8
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(trained, options.clip_grad).item()
            adam.step()
            theirs.append((total, norm))
        return train_steps(engine, config, 5), theirs


def test_five_steps_are_those_of_peft_and_transformers(tmp_path):
    ((ours, theirs),) = run_ranks(1, five_steps, tiny.make("llama3", tmp_path))
    assert ours == [pytest.approx(pair, rel=2e-5) for pair in theirs]
    assert ours[-1][0] != ours[0][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"targets": ["linear_qvk"]}}, "the model has no matrix 'linear_qvk', did you mean 'linear_qkv'?"),
        ({"lora": {"targets": ["gate_proj"]}}, "the model has no matrix 'gate_proj', did you mean 'linear_fc1'?"),
        ({"lora": {"targets": ["linear_qkv", "linear_qkv"]}}, "targets lists linear_qkv twice"),
        (
            {"lora": {"rank": 65}},
            r"lora.rank \(65\) exceeds the smaller side of linear_qkv \(128 x 64\): rank 64 or less",
        ),
        ({"lora": {"alpha": 0}}, r"alpha \(0\) must be above 0"),
        ({"lora": LORA, "train__frozen": ["embedding.*"]}, "train.frozen must be empty"),
        ({"lora": LORA, "init__mup": {"base_hidden_size": 32}}, "init.mup is for weights that are drawn"),
        ({"lora": LORA, "init__salience": {}}, "init.salience is for weights that are drawn"),
        ({"lora": LORA, "monitors__effective_rank": {"of": ["weights"]}}, r"give of: \[activations\]"),
    ],
)
def test_a_configuration_that_lora_cannot_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("unused", **changes)


def test_a_head_that_the_base_does_not_have_is_trained_with_the_adapters():
    spec = ModelSpec(arch=tiny_config("unused").model, lora=tiny_config("unused", lora=LORA).lora, head="value")
    trained = [name for name in spec.table if not spec.is_frozen(name)]
    assert "output_layer.weight" in trained
    assert all(is_adapter(name) or name == "output_layer.weight" for name in trained)
