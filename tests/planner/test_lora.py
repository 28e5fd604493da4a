"""The planner with LoRA: states to the byte, activations, FLOPs, and what it plans to be faster and smaller."""

from dataclasses import replace

import pytest

from flagscale_like.cluster import parse_cluster
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.memory import saved_activation_bytes, state_bytes
from flagscale_like.planner.search import Goal, evaluate
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import build_engine, run_ranks, tiny_config
from tests.planner.test_activations import step_peak

LORA = {"rank": 8, "alpha": 16}
EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 48, "shared_ffn_hidden_size": 32, "dense_layers": 1}
CASES = {
    "one process": (1, {}),
    "tp2 sp, dora": (2, {"parallel": {"tp": 2, "sp": True}, "lora": {**LORA, "dora": True}}),
    "pp2 vpp2, attention": (
        2,
        {"parallel": {"pp": 2, "vpp": 2}, "lora": {**LORA, "targets": ["linear_qkv", "linear_proj"]}},
    ),
    "dp2, dropout, one matrix": (2, {"lora": {**LORA, "targets": ["linear_fc2"], "dropout": 0.1}}),
    "experts": (1, {"model__experts": EXPERTS}),
    "experts, dora and dropout": (1, {"model__experts": EXPERTS, "lora": {**LORA, "dora": True, "dropout": 0.1}}),
    "experts' down products": (1, {"model__experts": EXPERTS, "lora": {**LORA, "targets": ["linear_fc2"]}}),
    "tied, selective": (1, {"model__tie_embeddings": True, "train__recompute": "selective"}),
}


def measured(config):
    """(stage, rank in the stage, bytes of weights, gradients and optimizer states, peak of the activations)."""
    peak = step_peak(config)
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        buffers = [buffer for chunk in engine.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
        frozen = sum(p.nbytes for model in engine.models for p in model.parameters() if not p.requires_grad)
        weights = frozen + sum(buffer.param_data.nbytes for buffer in buffers)
        return (
            ctx.pp_rank,
            ctx.rank % (ctx.world_size // config.parallel.pp),
            (weights, gradients, engine.state_bytes() - weights - gradients),
            peak[1],
        )


@pytest.mark.parametrize("name", CASES)
def test_planned_bytes_are_those_of_the_built_model(name, tmp_path):
    ranks, changes = CASES[name]
    config = tiny_config(tmp_path, train__precision="bf16", train__micro_batch_size=2, **{"lora": LORA, **changes})
    layout, goal = Layout.of(config, ranks), Goal.of(config, cuda=False)
    for stage, rank, states, peak in run_ranks(ranks, measured, config):
        assert states == state_bytes(config.model, layout, stage, precision="bf16", rank=rank, lora=config.lora)
        planned = saved_activation_bytes(config.model, layout, stage, seq_length=32, precision="bf16", ops=goal.ops)
        assert planned == pytest.approx(peak, rel=0.05), f"stage {stage}"


def test_states_are_at_most_2_percent_of_full_training_and_the_step_is_faster(tmp_path):
    shape = {"hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32, "num_query_groups": 32}
    config = tiny_config(
        tmp_path, train__precision="bf16", train__seq_length=2048, **{f"model__{k}": v for k, v in shape.items()}
    )
    adapted = config.model_copy(update={"lora": tiny_config(tmp_path, lora=LORA).lora})
    layout, cluster = Layout.of(config, 1), parse_cluster("1xH100")
    full, lora = (evaluate(Goal.of(c, cuda=True), layout, cluster) for c in (config, adapted))
    own, whole = (plan.memory[0].gradients + plan.memory[0].optimizer for plan in (lora, full))
    assert own < 0.02 * whole
    assert 0.6 < lora.time.seconds / full.time.seconds < 0.85
    flops = adapted.flops_per_token()
    assert flops == pytest.approx(Shape.of(config.model, 1, adapted.lora).model_flops(1, 2048))
    assert 0.66 < flops / config.flops_per_token() < 0.70
    assert replace(Goal.of(adapted, cuda=True).ops, lora=None) == Goal.of(config, cuda=True).ops
