"""The planner's weights, gradients and optimizer states are the built model's, to the byte, on every rank."""

import pytest

from flagscale_like.config import RunConfig
from flagscale_like.planner.layout import Layout
from flagscale_like.planner.memory import buffer_of, chunk_parameters, shard_numel, state_bytes
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import build_engine, run_ranks, tiny_config

LAYOUTS = {
    "one process": (1, {}),
    "tied": (1, {"model__tie_embeddings": True}),
    "bf16": (1, {"train__precision": "bf16"}),
    "qkv bias and qk norm": (2, {"parallel": {"tp": 2}, "model__qkv_bias": True, "model__qk_norm": True}),
    "tp2 sp": (2, {"parallel": {"tp": 2, "sp": True}}),
    "pp2 tied": (2, {"parallel": {"pp": 2}, "model__tie_embeddings": True}),
    "pp2 vpp2 bf16": (2, {"parallel": {"pp": 2, "vpp": 2}, "train__precision": "bf16"}),
    "pp2 uneven": (2, {"parallel": {"pp": 2, "first_stage_layers": 1}}),
    "dp2 bf16": (2, {"train__precision": "bf16"}),
    "cp2 bf16": (2, {"parallel": {"cp": 2}, "train__precision": "bf16"}),
    "dp3": (3, {"train__global_batch_size": 9}),
    "tp2 pp2": (4, {"parallel": {"tp": 2, "pp": 2}}),
    "dp2 pp2 tied bf16": (
        4,
        {"parallel": {"pp": 2}, "model__tie_embeddings": True, "train__precision": "bf16"},
    ),
    "cp2 x dp2": (4, {"parallel": {"cp": 2}}),
    "odd head size and vocabulary": (2, {"model__head_dim": 20, "model__vocab_size": 301}),
}

EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 48}
SHARED = {**EXPERTS, "shared_ffn_hidden_size": 36, "shared_gate": True, "dense_layers": 1}
BIAS = {**EXPERTS, "score": "sigmoid", "bias_rate": 0.01, "ffn_hidden_size": 44}
SP = {"tp": 2, "sp": True}
# name -> (ranks, experts, layout); all in bf16 but the first.
EXPERT_LAYOUTS = {
    "one process, fp32": (1, BIAS, {}),
    "one process": (1, SHARED, {}),
    "dp2": (2, BIAS, {}),
    "ep2": (2, SHARED, {"ep": 2}),
    "tp2 sp": (2, SHARED, SP),
    "tp2 sp ep2": (2, BIAS, {**SP, "ep": 2}),
    "cp2 ep2": (2, BIAS, {"cp": 2, "ep": 2}),
    "ep4": (4, BIAS, {"ep": 4}),
    "dp2 ep2": (4, SHARED, {"ep": 2}),
    "tp2 sp dp2 ep2": (4, SHARED, {**SP, "ep": 2}),
    "tp2 sp dp2 ep4": (4, BIAS, {**SP, "ep": 4}),
    "pp2 ep2": (4, SHARED, {"pp": 2, "ep": 2}),
    "pp2 vpp2 ep2": (4, BIAS, {"pp": 2, "vpp": 2, "ep": 2}),
}


def built(config: RunConfig) -> tuple:
    """Of this rank: stage, rank in the stage, elements of each parameter a chunk, (weight, gradient, optimizer) bytes."""
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        buffers = [buffer for chunk in engine.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        weights, gradients = (sum(getattr(b, name).nbytes for b in buffers) for name in ("param_data", "grad_data"))
        weights += sum(p.nbytes for model in engine.models for p in model.parameters() if not p.requires_grad)
        return (
            ctx.pp_rank,
            ctx.rank % (ctx.world_size // config.parallel.pp),
            [[p.numel() for p in model.parameters()] for model in engine.models],
            (weights, gradients, engine.state_bytes() - weights - gradients),
        )


def built_all(configs: list[RunConfig]) -> list[tuple]:
    return [built(config) for config in configs]


def check(config: RunConfig, layout: Layout, found: tuple) -> None:
    stage, rank, numels, states = found
    held = [chunk_parameters(config.model, layout, stage, chunk) for chunk in range(layout.vpp)]
    assert [[shard_numel(parameter, layout) for parameter in chunk] for chunk in held] == numels
    assert state_bytes(config.model, layout, stage, precision=config.train.precision, rank=rank) == states


@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_states_equal_the_built_ones_on_every_rank(name, tmp_path):
    ranks, changes = LAYOUTS[name]
    config = tiny_config(tmp_path, **changes)
    for found in run_ranks(ranks, built, config):
        check(config, Layout.of(config, ranks), found)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_planned_states_of_experts_equal_the_built_ones_on_every_rank(ranks, tmp_path):
    cases = {name: case[1:] for name, case in EXPERT_LAYOUTS.items() if case[0] == ranks}
    configs = [
        tiny_config(
            tmp_path,
            parallel=parallel,
            model__experts=experts,
            train__precision="fp32" if "fp32" in name else "bf16",
        )
        for name, (experts, parallel) in cases.items()
    ]
    for results in run_ranks(ranks, built_all, configs):
        for config, found in zip(configs, results, strict=True):
            check(config, Layout.of(config, ranks), found)


def test_a_bucket_closes_when_it_is_full_and_ends_where_every_rank_gets_the_same():
    buffer = buffer_of([100, 70, 10], 3, bucket_numel=100)
    assert buffer.spans == ((0, 10), (64, 134), (384, 484))
    assert buffer.buckets == ((0, 384), (384, 768))
    assert sum(buffer.owned(rank)[0] for rank in range(3)) == 180
