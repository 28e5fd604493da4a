"""Every parallel layout trains as one process does, from one checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from flagscale_like.config import RunConfig
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.metrics import read_metrics
from tests.harness import run_ranks, tiny_config

LAYOUTS = {
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2 uneven": (2, {"pp": 2, "first_stage_layers": 1}),
    "pp4": (4, {"pp": 4}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "dp2": (2, {}),
    "tp2 sp cp2": (4, {"tp": 2, "sp": True, "cp": 2}),
    "cp2 a2a": (2, {"cp": 2, "cp_kind": "a2a"}),
    "tp2 sp pp2 vpp2": (4, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
}


def train_run(config: RunConfig) -> None:
    with parallel_context(config.parallel) as ctx:
        pretrain(config, ctx)


def losses(run_dir: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    return [(r["lm loss"], r["grad-norm"]) for r in read_metrics(run_dir) if "lm loss" in r]


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """Six steps on one process, with a checkpoint at step 3: the run that all others are compared with."""
    config = tiny_config(tmp_path_factory.mktemp("one_process") / "run")
    run_ranks(1, train_run, config)
    return Path(config.run_dir)


def fork_at_step_3(source: Path, target: Path) -> Path:
    """A copy of a run as it was at its third step."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("step_00000006", "tensorboard", "latest"))
    return target


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_goes_on_from_one_process_checkpoint_with_the_same_losses_and_gradient_norms(
    name, one_process, tmp_path
):
    ranks, layout = LAYOUTS[name]
    run_dir = fork_at_step_3(one_process, tmp_path / "run")
    run_ranks(ranks, train_run, tiny_config(run_dir, parallel=layout))
    expected, found = losses(one_process), losses(run_dir)
    assert len(found) == len(expected) == 6
    assert found[3:] == [pytest.approx(pair, rel=1e-5) for pair in expected[3:]]


# More tensor-parallel ranks than KV groups, which several ranks then share.
SHARED_GROUPS = {
    "one group, tp4 sp": (4, {"tp": 4, "sp": True}, {"num_query_groups": 1, "qk_norm": True, "qkv_bias": True}),
    "two groups, tp4": (4, {"tp": 4}, {"num_query_groups": 2}),
    "alibi, tp2 sp cp2": (4, {"tp": 2, "sp": True, "cp": 2}, {"num_query_groups": 1, "position": {"kind": "alibi"}}),
}


@pytest.mark.parametrize("name", SHARED_GROUPS)
def test_ranks_that_share_a_kv_group_train_as_one_process_does(name, tmp_path):
    ranks, layout, model = SHARED_GROUPS[name]
    changes = {f"model__{key}": value for key, value in model.items()}
    one = tmp_path / "one"
    run_ranks(1, train_run, tiny_config(one, **changes))
    run_dir = fork_at_step_3(one, tmp_path / "run")
    run_ranks(ranks, train_run, tiny_config(run_dir, parallel=layout, **changes))
    assert losses(run_dir)[3:] == [pytest.approx(pair, rel=1e-5) for pair in losses(one)[3:]]
    if "cp" in layout:  # one of them also goes back to one process
        assert_goes_on_alike(one, run_dir, tmp_path, changes)


def assert_goes_on_alike(one, run_dir, tmp_path, changes):
    back = fork_at_step_3(run_dir, tmp_path / "back")
    shutil.copytree(run_dir / "checkpoints/step_00000006", back / "checkpoints/step_00000006")
    run_ranks(1, train_run, tiny_config(back, train__steps=7, **changes))
    again = fork_at_step_3(one, tmp_path / "again")
    shutil.copytree(one / "checkpoints/step_00000006", again / "checkpoints/step_00000006")
    run_ranks(1, train_run, tiny_config(again, train__steps=7, **changes))
    assert losses(back)[-1] == pytest.approx(losses(again)[-1], rel=1e-5)


def test_a_run_begun_on_cp2_is_that_of_one_process_and_goes_on_in_one_process(one_process, tmp_path):
    begun = tmp_path / "begun"
    run_ranks(2, train_run, tiny_config(begun, parallel={"cp": 2}))
    assert losses(begun) == [pytest.approx(pair, rel=1e-5) for pair in losses(one_process)]
    run_dir = fork_at_step_3(begun, tmp_path / "run")
    run_ranks(1, train_run, tiny_config(run_dir))
    assert losses(run_dir)[3:] == [pytest.approx(pair, rel=1e-5) for pair in losses(one_process)[3:]]


def test_resume_continues_the_uninterrupted_run_bit_for_bit(one_process, tmp_path):
    run_dir = fork_at_step_3(one_process, tmp_path / "run")
    run_ranks(1, train_run, tiny_config(run_dir))
    assert losses(run_dir) == losses(one_process)
    file = "checkpoints/step_00000006/rank_00000.safetensors"  # weights, moments and random state
    assert (run_dir / file).read_bytes() == (one_process / file).read_bytes()


def test_records_of_steps_after_the_checkpoint_are_written_anew(one_process, tmp_path):
    run_dir = fork_at_step_3(one_process, tmp_path / "run")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "lm loss": 123.0, "grad-norm": 1.0}) + '\n{"step": 5, "lm lo')
    run_ranks(1, train_run, tiny_config(run_dir))
    assert losses(run_dir) == losses(one_process)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_tp2_sp_pp2_in_bf16_with_recompute_goes_on_as_one_process_in_bf16(recompute, tmp_path):
    one = tiny_config(tmp_path / "one", train__precision="bf16")
    run_ranks(1, train_run, one)
    run_dir = fork_at_step_3(Path(one.run_dir), tmp_path / "run")
    layout = {"tp": 2, "sp": True, "pp": 2}
    run_ranks(4, train_run, tiny_config(run_dir, train__precision="bf16", train__recompute=recompute, parallel=layout))
    expected, found = losses(Path(one.run_dir))[3:], losses(run_dir)[3:]
    assert [loss for loss, _ in found] == [pytest.approx(loss, rel=2e-3) for loss, _ in expected]
    assert [norm for _, norm in found] == [pytest.approx(norm, rel=2e-2) for _, norm in expected]
