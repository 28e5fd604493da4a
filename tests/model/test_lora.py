"""LoRA: every layout trains as one process does, the base stays as it is, and the adapters compute what peft's compute."""

import pytest
import torch

from flagscale_like.arch import is_adapter
from flagscale_like.data.pretrain import build_datasets, micro_batches
from flagscale_like.model.build import named_shards
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import build_engine, run_ranks, tiny_config, train_steps

LORA = {"rank": 4, "alpha": 8}
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
        sums = {n: p.double().sum().item() for n, p in after.items() if engine.spec.table[n].cut is None}
        return found, same, moved, sums, engine.state_bytes()


@pytest.mark.parametrize("name", CASES)
def test_a_layout_trains_adapters_as_one_process_does(name):
    ranks, changes = CASES[name]
    options = {"lora": LORA, **changes}
    config = tiny_config("unused", **options)
    one = {**options, "parallel": {}, "train__recompute": "none"}
    ((expected, *_),) = run_ranks(1, steps_of, tiny_config("unused", **one))
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
