"""A rank is killed at every moment of a save: the run goes on from a whole checkpoint, bit for bit."""

from pathlib import Path

import pytest

from flagscale_like.checkpoint.manifest import TEMPORARY, read_latest, step_folders, verify_files
from tests import faults
from tests.harness import run_ranks, tiny_config

WHO = [
    ("in mid-step", 0),
    ("in mid-step", 1),
    ("during staging", 1),
    ("during a shard's write", 0),
    ("during a shard's write", 1),
    *((moment, 0) for moment in list(faults.MOMENTS)[3:]),  # rank 0 alone publishes
]
OPTIONS = {"checkpoint__interval": 2, "parallel": {"pp": 2}}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("never_stopped") / "run", **OPTIONS)
    run_ranks(2, faults.train_run, config)
    return Path(config.run_dir)


EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 48, "score": "sigmoid", "bias_rate": 0.1}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parallel": {"cp": 2}}, id="cp2"),
        pytest.param({"parallel": {"ep": 2}, "model__experts": EXPERTS, "train__precision": "bf16"}, id="ep2"),
    ],
)
def test_other_layouts_go_on_after_a_kill_in_a_write(changes, tmp_path):
    whole, killed = (tiny_config(tmp_path / name, **{**OPTIONS, **changes}) for name in ("never stopped", "killed"))
    run_ranks(2, faults.train_run, whole)
    with pytest.raises(AssertionError, match="rank 1: died"):
        run_ranks(2, faults.die, killed, 1, "during a shard's write")
    run_ranks(2, faults.train_run, killed)
    assert faults.resumed_from(tmp_path / "killed") == 2
    assert faults.losses(tmp_path / "killed") == faults.losses(tmp_path / "never stopped")
    final = "checkpoints/step_00000006"
    assert faults.rank_files(tmp_path / "killed" / final) == faults.rank_files(tmp_path / "never stopped" / final)


@pytest.mark.parametrize(("moment", "rank"), WHO)
def test_a_rank_killed(moment, rank, never_stopped, tmp_path):
    config = tiny_config(tmp_path / "run", **OPTIONS)
    root = tmp_path / "run" / "checkpoints"
    with pytest.raises(AssertionError, match=f"rank {rank}: died"):
        run_ranks(2, faults.die, config, rank, moment)

    whole = [folder.name for folder in step_folders(root)]
    assert all(verify_files(folder, processes=1) == [] for folder in step_folders(root))
    assert read_latest(root) is None or read_latest(root).name in whole  # never a pointer to what is not there
    published = moment in ("before the latest pointer moves", "after the latest pointer moved")
    if moment != "in mid-step":
        assert whole[0] == ("step_00000004" if published else "step_00000002")
    if moment in ("during a shard's write", "before the index", "before the manifest", "after the manifest"):
        assert [p.name for p in root.glob(f"{TEMPORARY}step_00000004-*")]  # recognisably unfinished
    if moment == "before the latest pointer moves":
        assert read_latest(root).name == "step_00000002"

    run_ranks(2, faults.train_run, config)
    assert faults.resumed_from(tmp_path / "run") == int(whole[0][5:])
    assert not list(root.glob(f"{TEMPORARY}*"))
    assert faults.losses(tmp_path / "run") == faults.losses(never_stopped)
    final = "checkpoints/step_00000006"
    assert faults.rank_files(tmp_path / "run" / final) == faults.rank_files(never_stopped / final)
    assert read_latest(root).name == "step_00000006"
