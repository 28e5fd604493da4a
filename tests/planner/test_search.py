"""Ranking layouts: the order, the refusals and the messages."""

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from flagscale_like.arch import ModelArch
from flagscale_like.cluster import parse_cluster
from flagscale_like.config import Parallel, check_layout, load_config
from flagscale_like.errors import ConfigError
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.memory import needed_offload, rank_memory
from flagscale_like.planner.report import describe_ranking, ranking_rows, updated_config
from flagscale_like.planner.saved import Operators, layer_bytes
from flagscale_like.planner.search import Goal, configured_layout, evaluate, layouts, rank_layouts, uneven_ends
from tests.commands import command, invoke
from tests.harness import tiny_config, write_yaml

AQUILA2_34B = ModelArch(
    num_layers=60,
    hidden_size=6144,
    num_attention_heads=48,
    num_query_groups=8,
    ffn_hidden_size=24576,
    vocab_size=100008,
)
AQUILA2_70B = ModelArch(
    num_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_query_groups=8,
    ffn_hidden_size=28672,
    vocab_size=100008,
)


def test_aquila2_34bs_published_layout_is_first_without_interleaving_where_stages_are_equal():
    goal = Goal(arch=AQUILA2_34B, seq_length=4096, global_batch_size=1024)
    plans = rank_layouts(goal, parse_cluster("64x8xA100-40"), max_vpp=1).plans
    best = next(plan.layout for plan in plans if not plan.layout.last_stage_layers)
    assert (best.tp, best.pp, best.dp, best.sp, best.micro_batch_size) == (4, 4, 32, True, 1)
    assert best.recompute == "none"
    # The last stage has the output layer as well: with fewer layers at the ends no stage waits for it.
    assert plans[0].layout.last_stage_layers < 60 / plans[0].layout.pp


def test_aquila2_70bs_published_layout_fits_and_loses_to_less_tensor_parallel_traffic():
    """Published: tp 8, pp 4, micro-batches of 2. docs/planner.md says why tp 4 is planned to be faster."""
    goal, cluster = Goal(arch=AQUILA2_70B, seq_length=4096, global_batch_size=1056), parse_cluster("96x8xA800")
    ranking = rank_layouts(goal, cluster, max_vpp=1)
    best = ranking.plans[0]
    published = next(
        plan
        for plan in ranking.plans
        if (plan.layout.tp, plan.layout.pp, plan.layout.micro_batch_size) == (8, 4, 2)
        and plan.layout.sp
        and not plan.layout.last_stage_layers
        and plan.layout.recompute == "none"
    )
    assert 1.0 < published.time.seconds / best.time.seconds < 1.2
    assert published.time.tp > 2 * best.time.tp


def test_plans_are_sorted_fit_and_say_why_they_lost():
    goal = Goal(arch=AQUILA2_34B, seq_length=4096, global_batch_size=512)
    ranking = rank_layouts(goal, parse_cluster("8x8xH100"))
    times = [plan.time.seconds for plan in ranking.plans]
    assert times == sorted(times)
    assert all(plan.peak_bytes <= ranking.budget_bytes for plan in ranking.plans)
    assert all(plan.peak_bytes > ranking.budget_bytes for plan in ranking.misfits)
    assert ranking.why(ranking.plans[0]) == "the fastest"
    assert "slower: " in ranking.why(ranking.plans[-1])
    assert re.match(r"does not fit: stage \d needs [\d.]+ of 77.6 GiB", ranking.why(ranking.misfits[0]))
    assert describe_ranking(ranking, parse_cluster("8x8xH100"), top=3).count("\n") == 1 + 3 + len(ranking.misfits)


def test_long_rows_are_cut_over_context_parallel_ranks_and_short_ones_are_not():
    cluster = parse_cluster("4x8xH100")
    short = layouts(Goal(arch=AQUILA2_34B, seq_length=4096, global_batch_size=32), cluster)
    assert {layout.cp for layout in short} == {1}
    goal = Goal(arch=AQUILA2_34B, seq_length=131072, global_batch_size=32)
    found = list(layouts(goal, cluster, max_vpp=1))
    assert {(layout.cp, layout.cp_kind) for layout in found} >= {(1, "gather"), (4, "a2a"), (32, "gather")}
    for layout in found:
        assert layout.world_size == 32
        ends: dict[str, Any] = {
            "first_stage_layers": layout.first_stage_layers,
            "last_stage_layers": layout.last_stage_layers,
        }
        parallel = Parallel(tp=layout.tp, pp=layout.pp, sp=layout.sp, cp=layout.cp, cp_kind=layout.cp_kind, **ends)
        check_layout(AQUILA2_34B, parallel, 131072)
    layout = Layout(tp=8, pp=4, sp=True, num_microbatches=32, recompute="full")
    whole, part = (evaluate(goal, one, cluster) for one in (layout, replace(layout, pp=1, cp=4)))
    assert part.memory[0].activations < whole.memory[0].activations
    assert part.memory[0].optimizer == pytest.approx(whole.memory[0].optimizer, rel=0.1)


def test_a_plan_of_long_rows_has_a_column_for_cp_and_its_yaml_loads(tmp_path):
    config = tiny_config(tmp_path, train__seq_length=32768, train__global_batch_size=4)
    goal, cluster = Goal.of(config, cuda=True), parse_cluster("1x4xH100")
    ranking = rank_layouts(goal, cluster)
    plan = next(plan for plan in ranking.plans if plan.layout.cp_kind == "a2a")
    changed = updated_config(config, plan.layout)
    assert configured_layout(changed, 4, goal, None) == plan.layout
    assert " cp " in describe_ranking(ranking, cluster, top=40).splitlines()[1]
    assert f"cp {plan.layout.cp} a2a" in plan.layout.describe()


@pytest.mark.parametrize(
    ("layers", "pp", "ends"),
    [
        (61, 8, [(None, 5), (7, 6), (4, 3)]),
        (126, 16, [(None, 6), (7, 7)]),
        (80, 4, [(None, 17), (19, 19)]),
        (3, 2, [(None, 1)]),
        (4, 4, []),
        (4, 1, []),
    ],
)
def test_ends_of_a_pipeline_have_fewer_layers_than_the_stages_between_them(layers, pp, ends):
    assert uneven_ends(layers, pp) == ends


def test_uneven_stages_are_in_the_search_and_their_yaml_loads(tmp_path):
    config = tiny_config(tmp_path, model__num_layers=5, train__global_batch_size=16)
    goal, cluster = Goal.of(config, cuda=True), parse_cluster("1x4xH100")
    found = list(layouts(goal, cluster))
    assert {(one.pp, one.first_stage_layers, one.last_stage_layers) for one in found} == {
        (1, None, None),
        (2, None, 2),
        (2, None, 1),
    }
    plan = next(plan for plan in rank_layouts(goal, cluster).plans if plan.layout.last_stage_layers == 2)
    assert configured_layout(updated_config(config, plan.layout), 4, goal, None) == plan.layout
    assert "pp 2 last stage 2" in plan.layout.describe()
    ranking = rank_layouts(goal, cluster)
    assert any(row[2] == "2 (-/2)" for row in ranking_rows(ranking, ranking.plans))
    for layout in found:
        ends: dict[str, Any] = {
            "first_stage_layers": layout.first_stage_layers,
            "last_stage_layers": layout.last_stage_layers,
        }
        check_layout(goal.arch, Parallel(tp=layout.tp, pp=layout.pp, sp=layout.sp, **ends), goal.seq_length)


EXPERTS = {"count": 8, "top_k": 2, "ffn_hidden_size": 48, "shared_ffn_hidden_size": 96}


def test_ep_is_tried_where_it_divides_experts_and_ranks_and_tp_with_sp_alone(tmp_path):
    config = tiny_config(tmp_path, model__experts=EXPERTS)
    goal = Goal.of(config, cuda=True)
    found = list(layouts(goal, parse_cluster("1x8xH100"), max_vpp=1))
    assert {layout.ep for layout in found} == {1, 2, 4, 8}
    assert {(layout.tp, layout.sp) for layout in found} == {(1, False), (2, True)}
    for layout in found:
        parallel = Parallel(tp=layout.tp, pp=layout.pp, sp=layout.sp, ep=layout.ep)
        check_layout(config.model, parallel, goal.seq_length)
        assert (8 // layout.pp) % layout.ep == 0
        assert layout.imbalance == 1.2
    six = goal.arch.experts.model_copy(update={"count": 6})
    of_six = layouts(replace(goal, arch=goal.arch.model_copy(update={"experts": six})), parse_cluster("1x8xH100"))
    assert {layout.ep for layout in of_six} == {1, 2}


def test_a_plan_of_experts_has_a_column_for_ep_and_its_yaml_loads(tmp_path):
    config = tiny_config(tmp_path, model__experts=EXPERTS)
    cluster = parse_cluster("1x4xH100")
    goal = replace(Goal.of(config, cuda=True), imbalance=1.5)
    ranking = rank_layouts(goal, cluster)
    plan = next(plan for plan in ranking.plans if plan.layout.ep == 2 and plan.layout.tp == 2)
    assert configured_layout(updated_config(config, plan.layout), 4, goal, None) == plan.layout
    assert " ep " in describe_ranking(ranking, cluster, top=40).splitlines()[1]
    assert "ep 2" in plan.layout.describe()
    even = evaluate(goal, replace(plan.layout, imbalance=1.0), cluster)
    assert even.memory[0].activations < plan.memory[0].activations
    assert even.time.ep < plan.time.ep


def test_plan_takes_an_imbalance_of_experts_alone(tmp_path):
    file = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "x.yaml")
    done = command("plan", str(file), "--cluster", "1x4xH100", "--imbalance", "1.5")
    assert done.returncode == 10
    assert "--imbalance (1.5) is of experts, and the model has none" in done.stderr


def test_offload_makes_a_layout_fit_that_did_not():
    goal = Goal(arch=AQUILA2_34B, seq_length=4096, global_batch_size=1024)
    cluster = parse_cluster("64x8xA100-40")
    found = rank_layouts(goal, cluster, offload=True)
    helped = [plan for plan in found.plans if plan.layout.offload]
    assert helped
    plan = helped[0]
    assert evaluate(goal, plan.layout, cluster).peak_bytes <= found.budget_bytes
    assert all((share > 0) == (memory.host > 0) for share, memory in zip(plan.layout.offload, plan.memory, strict=True))
    assert evaluate(goal, replace(plan.layout, offload=()), cluster).peak_bytes > found.budget_bytes


def test_two_layers_keep_their_copies_whatever_is_offloaded():
    """model.offload lets a layer's copies go when the layer after the next begins."""
    ops, layout = Operators(rms_norm="fused", swiglu="fused", cross_entropy="fused"), Layout(pp=4, num_microbatches=16)
    numbers: dict[str, Any] = {"seq_length": 4096, "precision": "bf16", "ops": ops}
    whole = rank_memory(AQUILA2_34B, replace(layout, offload=(1.0,) * 4), 0, **numbers)
    layer = layer_bytes(Shape.of(AQUILA2_34B), layout, 4096, 2, ops)
    assert whole.offload_buffers == 2 * layer
    assert whole.host == 4 * 15 * layer
    budget = rank_memory(AQUILA2_34B, layout, 0, **numbers).total - 20 * layer
    shares = needed_offload(AQUILA2_34B, layout, budget_bytes=budget, **numbers)
    fitted = rank_memory(AQUILA2_34B, replace(layout, offload=shares), 0, **numbers)
    assert fitted.total == pytest.approx(budget)


def test_automatic_shares_without_a_device_keep_one_micro_batch(tmp_path):
    config = tiny_config(tmp_path, parallel={"pp": 4}, offload={"share": "auto"})
    layout = configured_layout(config, 4, Goal.of(config, cuda=False), None)
    assert layout.offload == pytest.approx((3 / 4, 2 / 3, 1 / 2, 0.0))


def test_a_model_that_fits_nowhere_is_refused_with_what_binds_and_what_would_do():
    goal = Goal(arch=AQUILA2_70B, seq_length=4096, global_batch_size=64)
    with pytest.raises(
        ConfigError, match=r"no layout fits 1x8xA100-40: the nearest, .* needs .* of 38.8 GiB .* would do, with"
    ):
        rank_layouts(goal, parse_cluster("1x8xA100-40"))


def test_a_batch_that_nothing_divides_is_refused_with_one_that_would_do():
    goal = Goal(arch=AQUILA2_34B, seq_length=4096, global_batch_size=7)
    with pytest.raises(ConfigError, match=r"batch of 7 over 1024 devices: train.global_batch_size 8 would do"):
        rank_layouts(goal, parse_cluster("128x8xH100"))


def test_plan_prints_a_table_and_writes_a_yaml_that_loads(tmp_path):
    file, out = (
        write_yaml(tiny_config(tmp_path / "run", train__precision="bf16"), tmp_path / "x.yaml"),
        tmp_path / "o.yaml",
    )
    done = command("plan", str(file), "--cluster", "1x4xH100", "--top", "2", "--write", str(out))
    assert done.returncode == 0, done.stderr
    assert "the fastest" in done.stdout
    assert "tokens/s/dev" in done.stdout
    written = load_config(out)
    assert 4 % written.parallel.model_parallel_size == 0
    assert yaml.safe_load(out.read_text())["model"]["num_layers"] == 4
    assert "the allocator loses 0.3% to 10% of what a step makes (2% planned" in done.stdout
    again = invoke(["plan", str(file), "--cluster", "1x4xH100", "--write", str(out)])
    assert again.exit_code == 10
    assert "is there already, and nothing is overwritten" in again.error
    lost = invoke(["plan", str(file), "--cluster", "1x4xH100", "--write", str(tmp_path / "no/o.yaml")])
    assert f"there is no folder {tmp_path}/no: make it first" in lost.error


def test_a_run_is_planned_without_the_checkpoint_that_it_starts_from(tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint={"load": str(tmp_path / "none")}, train__precision="bf16")
    file = write_yaml(config, tmp_path / "x.yaml")
    done = invoke(["plan", str(file), "--cluster", "1x4xH100", "--top", "1"])
    assert done.exit_code == 0, done.error
    assert f"{tmp_path}/none: no checkpoint there" in done.printed
    assert "planned with the YAML's own model" in done.printed
    values = yaml.safe_load(file.read_text())
    del values["model"]
    file.write_text(yaml.safe_dump(values))
    done = invoke(["plan", str(file), "--cluster", "1x4xH100"])
    assert done.exit_code == 12
    assert "to plan without it, give the group `model`" in done.error


def test_clusters_of_any_size_are_answered_at_once():
    goal = Goal(arch=AQUILA2_34B, seq_length=4096, global_batch_size=7)
    with pytest.raises(ConfigError, match=r"over 8000000000 devices: train.global_batch_size \d+ would do"):
        rank_layouts(goal, parse_cluster("1000000000x8xH100"))
    with pytest.raises(ConfigError, match=r"over 8000000000 devices: train.global_batch_size \d+ would do"):
        rank_layouts(goal, parse_cluster("1x8000000000xH100"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "1x8xH1000"], "device 'H1000' is not known, did you mean H100?"),
        (["--cluster", "eight"], "write it as NODESxDEVICESxNAME"),
    ],
)
def test_bad_clusters_are_one_line_and_exit_10(arguments, message, tmp_path):
    file = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "x.yaml")
    done = command("plan", str(file), *arguments)
    assert done.returncode == 10
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_dry_run_prints_memory_by_component_bubble_and_tokens_a_second(tmp_path):
    file = write_yaml(tiny_config(tmp_path / "run", parallel={"pp": 2}), tmp_path / "x.yaml")
    done = command("train", str(file), "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("weights", "gradients", "optimizer", "activations", "bubble 12.5%", "tokens/s/device", "valid"):
        assert word in done.stdout
    far = command("train", str(file), "--dry-run", "--world-size", "16", "train.global_batch_size=16")
    assert "give --cluster" in far.stdout


def test_an_updated_configuration_keeps_everything_but_the_layout(tmp_path):
    config = tiny_config(tmp_path, train__global_batch_size=16)
    goal = Goal.of(config, cuda=False)
    plan = rank_layouts(goal, parse_cluster("1x4xA100")).plans[-1]
    changed = updated_config(config, plan.layout)
    assert changed.model == config.model
    assert changed.parallel.tp == plan.layout.tp
    assert configured_layout(changed, 4, goal, None) == plan.layout
