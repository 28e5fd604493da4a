"""`bench` measures what it says, and a profile is written where it was asked for."""

import gzip
import json
import math

import pytest
import yaml

from flagscale_like.config import load_config
from flagscale_like.errors import ConfigError
from flagscale_like.recipes.benchmark import compare_with_transformers, measure, sweep_points
from flagscale_like.runtime.parallel import parallel_context
from tests import faults
from tests.commands import command
from tests.harness import REPOSITORY, run_ranks, tiny_config, write_yaml


def test_a_sweep_times_every_point_and_says_why_one_cannot_run(tmp_path):
    file = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "x.yaml")
    done = command(
        *["bench", str(file), "--steps", "3", "--warmup", "1", "--sweep", "train.micro_batch_size=2,3"],
        *["--compare", "--save", "--out", str(tmp_path / "out")],
        apart=True,
    )
    assert done.returncode == 0, done.stderr
    good, bad = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert bad["point"] == "train.micro_batch_size=3"
    assert "train.global_batch_size (8) must be divisible by" in bad["error"]
    point = good["measured"]
    assert point["steps"] == 3
    assert point["step_low_s"] <= point["step_s"] <= point["step_high_s"]
    assert point["tokens_per_s_per_device"] == pytest.approx(8 * 32 / point["step_s"])
    flops = tiny_config(tmp_path).model.flops_per_token(32) * 8 * 32
    assert point["mfu"] == pytest.approx(flops / point["step_s"] / point["peak_flops"])
    assert 0 < point["mfu"] < 1
    assert point["states"] == point["planned_states"]
    assert point["checkpoint_stall_s"] > 0
    assert good["compared"]["ratio"] > 0
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000
    for words in (
        "MFU = model FLOPs / (step time x devices x",
        "peak: measured: fp32 matrix product",
        "relative to transformers",
    ):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()  # a benchmark leaves the run's folder alone


def measured(config, shares):
    """A benchmark's point for each share of offload, on this rank."""
    points = []
    for share in shares:
        changed = config.model_copy(update={"offload": config.offload.model_copy(update={"share": share})})
        with parallel_context(changed.parallel) as ctx:
            points.append(measure(changed, ctx, steps=2, warmup=1))
    return points


def test_offload_on_and_off_are_two_points_that_learn_alike(tmp_path):
    config = tiny_config(tmp_path / "run", parallel={"pp": 2}, offload={"min_tensor_bytes": 1024})
    (off, on), others = run_ranks(2, measured, config, (0.0, 1.0))
    assert others == [None, None]  # rank 0 has the points
    assert off.devices == on.devices == 2
    assert off.offload["bytes_out"] == 0 < on.offload["bytes_out"]
    assert on.loss == off.loss


def test_a_wrong_sweep_or_layout_is_one_line(tmp_path):
    file = write_yaml(tiny_config(tmp_path / "run", parallel={"pp": 2}), tmp_path / "x.yaml")
    done = command("bench", str(file), "--compare", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr.count("\n")) == (10, 1)
    assert "--compare runs in one process, this layout has 2" in done.stderr
    for wrong in ("train.steps", "=1", "a=1,,2"):
        with pytest.raises(ConfigError, match="write it as"):
            sweep_points([wrong])
    assert sweep_points(["a=1,2", "b=3"]) == [("a=1", "b=3"), ("a=2", "b=3")]
    assert sweep_points([]) == [()]


def measured_once(configs):
    """Each configuration's point, and whether a comparison with transformers is refused."""
    points = []
    for config in configs:
        with parallel_context(config.parallel) as ctx:
            points.append(measure(config, ctx, steps=1, warmup=1))
            with pytest.raises(ConfigError, match="transformers' step predicts the next token"):
                compare_with_transformers(config, ctx, rounds=1, warmup=0)
    return points


def test_objectives_on_pairs_and_groups_are_measured_on_rows_that_are_made_up(tmp_path):
    objectives = ({"kind": "dpo"}, {"kind": "reward"}, {"kind": "contrastive", "passages": 3})
    data = {"sources": [{"path": "not/there"}], "tokenizer": "t"}
    configs = [tiny_config(tmp_path, data=data, objective=one, optimizer__lr=1e-6) for one in objectives]
    (points,) = run_ranks(1, measured_once, configs)
    assert all(point.states == point.planned_states for point in points)
    assert points[0].loss == pytest.approx(math.log(2), abs=1e-3)  # the policy is still the reference


def test_a_profile_has_the_steps_asked_for_on_every_rank(tmp_path):
    config = tiny_config(tmp_path / "run", parallel={"pp": 2}, train__profile={"steps": [2, 3]}, train__steps=4)
    run_ranks(2, faults.train_run, config)
    for rank in range(2):
        with gzip.open(tmp_path / "run" / "profile" / f"rank_{rank:05d}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        updates = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
        assert len(updates) == 2
        assert any(e.get("name") == "aten::mm" for e in events)


def test_a_profile_of_no_steps_is_refused(tmp_path):
    file = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "x.yaml")
    done = command("train", str(file), "--dry-run", "train.profile.steps=[3,2]")
    assert done.returncode == 10
    assert "profile.steps (3, 2) must be a first and a last step" in done.stderr


@pytest.mark.parametrize("file", sorted((REPOSITORY / "examples" / "slices").glob("*.yaml")), ids=lambda f: f.stem)
def test_slices_load_and_are_planned_to_fit_one_80_gb_card(file):
    config = load_config(file)
    assert config.model.hidden_size >= 4096
    assert yaml.safe_load(file.read_text())["checkpoint"] == {"interval": 0}
    done = command("train", str(file), "--dry-run", "--world-size", "1", "--cluster", "1x1xA100-80")
    assert done.returncode == 0, done.stderr
