"""Planned checkpoints: sums, rates, refusals. tests/checkpoint/test_layouts.py compares plans with real saves and loads."""

from dataclasses import replace

import pytest

from flagscale_like.arch import Experts, ModelArch
from flagscale_like.errors import ConfigError
from flagscale_like.planner.layout import Layout
from flagscale_like.rehearsal.checkpoint_plan import States, bytes_of_files, plan_load, planned_index
from tests.commands import invoke
from tests.harness import tiny_config, write_yaml

ARCH = ModelArch(
    num_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=1408,
    vocab_size=32000,
)
SAVED = States(ARCH, Layout(tp=4, pp=4, dp=16, sp=True))


def test_a_checkpoint_has_every_element_once_and_a_load_reads_it_once():
    table = planned_index(SAVED)
    parameters = ARCH.parameter_count(ARCH.padded_vocab_size(4))
    sizes = bytes_of_files(table)
    assert (len(sizes), sizes.sum()) == (256, 12 * parameters)
    assert sizes.max() < 1.6 * sizes.mean()  # the ends have the embedding and the output layer as well
    plan = plan_load(table, SAVED)
    # Norms are whole on each of four tensor-parallel ranks; each of them is read, and has states.
    whole = parameters + 3 * 512 * (2 * 8 + 1)
    assert plan.states.sum() == 12 * whole
    assert plan.weights.sum() == 0  # nothing is frozen, and the weights are made from the master weights
    assert plan.files.max() == 2  # its own, and the one that has the norms


def test_a_load_on_fewer_ranks_reads_more_on_each_and_a_node_can_be_the_limit():
    table = planned_index(SAVED)
    few = plan_load(table, replace(SAVED, layout=Layout(tp=2, pp=2, dp=2, sp=True)))
    many = plan_load(table, SAVED)
    assert few.bytes.mean() > 3 * many.bytes.mean()
    assert few.files.mean() > many.files.mean()
    node = few.bytes.sum() / 1e9  # eight ranks are one node
    assert few.seconds(1000.0) == pytest.approx(node / 1000)
    assert few.seconds(1000.0, node_gb_per_s=10) == pytest.approx(node / 10)


def test_frozen_weights_are_read_by_one_of_the_ranks_that_hold_them():
    experts = Experts(count=64, top_k=2, ffn_hidden_size=64, score="sigmoid", bias_rate=0.1)
    states = replace(SAVED, arch=ARCH.model_copy(update={"experts": experts}))
    plan = plan_load(planned_index(states), states)
    assert plan.weights.sum() == 4 * 4 * 8 * 64  # on each of four tensor-parallel ranks
    assert (plan.weights > 0).sum() == 4 * 4  # too few to be shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_layers": 4},
            "the checkpoint holds decoder.layers.4.input_layernorm.weight, which the model has not: it is of another model",
        ),
        ({"num_layers": 12}, "the checkpoint holds no decoder.layers.8.input_layernorm.weight: it is of another model"),
        (
            {"ffn_hidden_size": 1024},
            r"decoder.layers.0.mlp.linear_fc1.weight has shape \(2816, 512\) in the checkpoint",
        ),
    ],
)
def test_another_model_is_refused_with_the_tensor_that_does_not_fit(change, message):
    with pytest.raises(ConfigError, match=message):
        plan_load(planned_index(SAVED), replace(SAVED, arch=ARCH.model_copy(update=change)))


def test_the_command_prints_the_plan_and_refuses_what_it_does_not_know(tmp_path):
    file = str(write_yaml(tiny_config(tmp_path / "run"), tmp_path / "x.yaml"))
    index = tmp_path / "index.safetensors"
    found = invoke(["ckpt", "plan", file, "--world-size", "2", "--load", "parallel.tp=2", "--write", str(index)])
    assert found.exit_code == 0, found.error
    assert "saved by 2 ranks (tp 1 pp 1 dp 2 mbs" in found.printed
    assert "loaded by 2 ranks (tp 2 pp 1 dp 1 mbs" in found.printed
    assert index.stat().st_size > 1000
    frozen = invoke(["ckpt", "plan", file, "train.frozen=[embedding.*]"])
    assert (frozen.exit_code, frozen.printed) == (10, "")
    assert "a checkpoint with train.frozen is not planned" in frozen.error
