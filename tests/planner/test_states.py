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
    "odd head size and vocabulary": (2, {"model__head_dim": 20, "model__vocab_size": 301}),
}


def built(config: RunConfig) -> tuple:
    """Of this rank: stage, rank among the replicas, named parameters a chunk, (weight, gradient, optimizer) bytes."""
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        buffers = [buffer for chunk in engine.chunks for buffer in chunk.buffers]
        weights, gradients = (sum(getattr(b, name).nbytes for b in buffers) for name in ("param_data", "grad_data"))
        return (
            ctx.pp_rank,
            ctx.replica_rank,
            [[p.numel() for p in model.parameters()] for model in engine.models],
            (weights, gradients, engine.state_bytes() - weights - gradients),
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_states_equal_the_built_ones_on_every_rank(name, tmp_path):
    ranks, changes = LAYOUTS[name]
    config = tiny_config(tmp_path, **changes)
    layout = Layout.of(config, ranks)
    for stage, dp_rank, numels, found in run_ranks(ranks, built, config):
        held = [chunk_parameters(config.model, layout, stage, chunk) for chunk in range(layout.vpp)]
        planned = [[shard_numel(parameter, layout.tp) for parameter in chunk] for chunk in held]
        assert planned == numels
        assert state_bytes(config.model, layout, stage, precision=config.train.precision, dp_rank=dp_rank) == found


def test_a_bucket_closes_when_it_is_full_and_ends_where_every_rank_gets_the_same():
    buffer = buffer_of([100, 70, 10], 3, bucket_numel=100)
    assert buffer.spans == ((0, 10), (64, 134), (384, 484))
    assert buffer.buckets == ((0, 384), (384, 768))
    assert sum(buffer.owned(3, rank)[0] for rank in range(3)) == 180
