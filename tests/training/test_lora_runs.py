"""Runs that train LoRA adapters: what they save, and from what they go on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from flagscale_like.arch import is_adapter
from flagscale_like.checkpoint.adapters import AdaptedWeights, MergedWeights, open_base
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.manifest import step_name
from flagscale_like.config import Monitors
from flagscale_like.model import build
from flagscale_like.runtime.precision import DTYPES
from flagscale_like.training.guard import Guard
from flagscale_like.training.parts import Facts, Verdict
from tests import faults
from tests.harness import run_ranks, tiny_config
from tests.training.test_layouts import fork_at_step_3, losses

LORA = {"rank": 4, "alpha": 8, "dora": True, "plus_ratio": 2.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three steps of a run without LoRA."""
    config = tiny_config(tmp_path_factory.mktemp("base") / "run", train__steps=3)
    run_ranks(1, faults.train_run, config)
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """Six steps with LoRA on one process, saved at step 3."""
    config = tiny_config(tmp_path_factory.mktemp("lora") / "run", lora=LORA, checkpoint__load=str(base))
    ((said, error),) = run_ranks(1, faults.train_and_listen, config)
    assert error is None
    return Path(config.run_dir), said


def step(run_dir, number):
    return Path(run_dir) / "checkpoints" / step_name(number)


def refused(config):
    ((_, error),) = run_ranks(1, faults.train_and_listen, config)
    assert error is not None
    return error


def test_checkpoints_hold_the_adapters_and_name_their_base(base, adapted):
    run_dir, said = adapted
    reader = CheckpointReader(step(run_dir, 6))
    assert reader.keys()
    assert all(map(is_adapter, reader.keys()))
    assert reader.has("exp_avg")
    assert reader.state["lora"]["rank"] == 4
    record = reader.state["base"]
    assert record["folder"] == str(step(base, 3))
    assert any(record["xxh3"] in line for line in said)
    assert any("trained parameters" in line for line in said)
    sizes = [sum(file.stat().st_size for file in step(folder, 3).iterdir()) for folder in (run_dir, base)]
    assert sizes[0] < sizes[1] / 4


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, {"tp": 2, "sp": True, "pp": 2}), (2, {}), (2, {"pp": 2, "vpp": 2})],
    ids=["tp2 sp pp2", "dp2", "pp2 vpp2"],
)
def test_a_run_goes_on_on_another_layout(base, adapted, ranks, layout, tmp_path):
    run_dir = fork_at_step_3(adapted[0], tmp_path / "run")
    config = tiny_config(run_dir, lora=LORA, checkpoint__load=str(base), train__recompute="full", parallel=layout)
    run_ranks(ranks, faults.train_run, config)
    expected, found = losses(adapted[0]), losses(run_dir)
    assert found[3:] == [pytest.approx(pair, rel=1e-5) for pair in expected[3:]]


def test_the_base_may_move_and_may_not_change(base, adapted, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    gone = fork_at_step_3(adapted[0], tmp_path / "gone")
    state = json.loads((step(gone, 3) / "state.json").read_text())
    other = tiny_config(tmp_path / "other", train__steps=3, train__seed=7)
    run_ranks(1, faults.train_run, other)

    def named(**changes):
        return tiny_config(
            fork_at_step_3(adapted[0], tmp_path / str(len(list(tmp_path.iterdir())))),
            lora=LORA | changes.pop("lora", {}),
            **changes,
        )

    # A checkpoint's manifest lists the checksum of its state: the folder that it names is renamed, not the record.
    base.rename(base.with_name("away"))
    try:
        assert (
            f"the base of its adapters is not at {state['base']['folder']}: name its folder with lora.base"
            in refused(named(checkpoint__load=str(base)))
        )
        config = named(lora={"base": str(moved)}, checkpoint__load=str(base))
        ((_, error),) = run_ranks(1, faults.train_and_listen, config)
        assert error is None
        assert losses(Path(config.run_dir))[3:] == losses(adapted[0])[3:]
        assert CheckpointReader(step(config.run_dir, 6)).state["base"]["folder"] == str(step(moved, 3))
        assert "is another base than the one that the adapters of" in refused(named(lora={"base": other.run_dir}))
        assert "is another base than the one that the adapters of" in refused(named(checkpoint__load=other.run_dir))
    finally:
        base.with_name("away").rename(base)


def test_what_does_not_belong_together_is_refused(base, adapted, tmp_path):
    def forked(name, **changes):
        return tiny_config(fork_at_step_3(adapted[0], tmp_path / name), **changes)

    assert "lora trains adapters beside weights: give them" in refused(tiny_config(tmp_path / "new", lora=LORA))
    assert "holds LoRA adapters: give the group lora" in refused(forked("without"))
    assert "lora.alpha: 8.0 saved, 9.0 configured" in refused(forked("alpha", lora=LORA | {"alpha": 9}))
    error = refused(tiny_config(fork_at_step_3(base, tmp_path / "full"), lora=LORA, train__steps=6))
    assert "was saved without lora" in error
    assert "holds LoRA adapters" in refused(tiny_config(tmp_path / "load", checkpoint__load=str(adapted[0])))


def test_a_new_run_takes_its_adapters_from_another_run(adapted, tmp_path):
    config = tiny_config(tmp_path / "run", lora=LORA, checkpoint__load=str(adapted[0]), train__steps=2)
    run_ranks(1, faults.train_run, config)
    assert losses(Path(config.run_dir))[0][0] < losses(adapted[0])[0][0]
    assert (
        CheckpointReader(step(config.run_dir, 2)).state["base"]["xxh3"]
        == CheckpointReader(step(adapted[0], 6)).state["base"]["xxh3"]
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_monitors_and_offload_and_exports_the_merged_model(base, precision, tmp_path):
    config = tiny_config(
        tmp_path / "run",
        lora=LORA | {"dropout": 0.1},
        checkpoint__load=str(base),
        checkpoint__export_hf=True,
        train__precision=precision,
        train__recompute="selective",
        train__steps=3,
        optimizer__initial_loss_scale=2.0**10,
        offload={"share": 0.5, "min_tensor_bytes": 1},
        monitors__layers={"interval": 1},
        monitors__effective_rank={"of": ["activations"], "interval": 1},
    )
    run_ranks(2, faults.train_run, config)
    found = losses(Path(config.run_dir))
    assert len(found) == 3
    assert all(norm > 0 for _, norm in found)
    written = (Path(config.run_dir) / "metrics.jsonl").read_text()
    assert all(name in written for name in ("layer-grad-norm/layers.0", "effective-rank/activations/layers.0"))
    reader = CheckpointReader(step(config.run_dir, 3))
    merged = MergedWeights(AdaptedWeights(open_base(reader, None, way_out=""), reader))
    exported, dtype = HfFolder(Path(config.run_dir) / "hf"), DTYPES[precision]
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    assert torch.equal(exported.full(key), merged.full(key, dtype=dtype))
    assert not torch.equal(exported.full(key), merged.base.full(key, dtype=dtype))


def without_the_hook():
    build._requires_grad = lambda module, inputs, output: output


def test_a_first_step_without_any_gradient_ends_the_run_and_says_why(base, tmp_path):
    config = tiny_config(tmp_path / "run", lora=LORA, checkpoint__load=str(base), train__recompute="full")
    ((_, error),) = run_ranks(1, faults.train_and_listen, config, without_the_hook)
    assert error.startswith("DivergedError: step 1: loss ")
    assert (
        "gradient norm 0.0: of 256 counted, no gradient reached a trained parameter; possible causes: the LoRA" in error
    )
    assert "train.recompute full passes no gradient through a layer whose input asks for none" in error


def test_a_batch_that_counts_nothing_is_not_taken_for_a_run_without_gradients():
    guard = Guard(Monitors(), suspects="; possible causes: x")
    nothing = Facts(math.nan, 0.0, 0, False, {})
    assert guard(nothing, lambda _: ()) is Verdict.SKIP
    assert "nothing of the batch counts" in guard.reason
    assert guard(Facts(0.0, 0.0, 8, False, {}), lambda _: ()) is Verdict.STOP
    assert "the loss is exactly 0" in guard.reason
    assert guard(Facts(2.0, 0.0, 8, False, {}), lambda _: ()) is Verdict.UPDATE  # not the first any more


def test_a_rank_killed_in_a_save_costs_only_that_save(base, adapted, tmp_path):
    config = tiny_config(tmp_path / "run", lora=LORA, checkpoint__load=str(base), checkpoint__interval=2)
    with pytest.raises(AssertionError, match="rank 0: died"):
        run_ranks(1, faults.die, config, 0, "during a shard's write")
    run_ranks(1, faults.train_run, config)
    assert faults.resumed_from(config.run_dir) == 2
    assert losses(Path(config.run_dir))[-1] == losses(adapted[0])[-1]
