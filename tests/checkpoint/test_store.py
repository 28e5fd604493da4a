"""Saving and loading on other layouts, and what a checkpoint must not be mistaken for."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flagscale_like.checkpoint.format import CheckpointReader, read_manifest
from flagscale_like.errors import CheckpointError
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.loop import start, train
from flagscale_like.training.metrics import read_metrics
from tests.harness import cli, run_ranks, tiny_config, write_yaml

KINDS = ("param", "exp_avg", "exp_avg_sq")


def train_run(config) -> None:
    with parallel_context(config.parallel) as ctx:
        train(config, ctx)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Every global tensor of a checkpoint, the padding of the vocabulary cut off."""
    reader = CheckpointReader(folder)
    return {f"{key}/{kind}": reader.full(key, kind)[:250] for key in reader.keys() for kind in KINDS}


def loss_curve(run_dir: Path) -> list[float]:
    return [r["lm loss"] for r in read_metrics(run_dir) if "lm loss" in r]


@pytest.fixture(scope="module")
def saved_on_tp2_pp2(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("tp2pp2") / "run", parallel={"tp": 2, "sp": True, "pp": 2})
    run_ranks(4, train_run, config)
    return Path(config.run_dir)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, {}), (2, {"pp": 2, "vpp": 2}), (4, {"tp": 2})],
    ids=["1", "pp2vpp2", "tp2dp2"],
)
def test_a_checkpoint_of_tp2_pp2_goes_on_elsewhere_as_the_uninterrupted_run(saved_on_tp2_pp2, tmp_path, ranks, layout):
    run_dir = tmp_path / "run"
    shutil.copytree(saved_on_tp2_pp2, run_dir, ignore=shutil.ignore_patterns("step_00000006", "tensorboard"))
    run_ranks(ranks, train_run, tiny_config(run_dir, parallel=layout))
    assert loss_curve(run_dir)[3:] == [pytest.approx(x, rel=1e-5) for x in loss_curve(saved_on_tp2_pp2)[3:]]


def resave(config) -> None:
    """Load on this layout and save again, without a step between."""
    with parallel_context(config.parallel) as ctx:
        run, _ = start(config, ctx)
        run.store.root = Path(config.run_dir) / "again"
        if ctx.is_main:
            run.store.root.mkdir()
        ctx.barrier()
        run.save()


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, {}), (4, {"pp": 2, "vpp": 2}), (2, {"tp": 2}), (3, {})],
    ids=["1", "pp2vpp2dp2", "tp2", "dp3"],
)
def test_weights_and_moments_pass_through_another_layout_bit_for_bit(saved_on_tp2_pp2, tmp_path, ranks, layout):
    run_dir = tmp_path / "run"
    shutil.copytree(saved_on_tp2_pp2, run_dir, ignore=shutil.ignore_patterns("tensorboard"))
    batch = 6 if ranks == 3 else 8
    run_ranks(ranks, resave, tiny_config(run_dir, parallel=layout, train__global_batch_size=batch))
    before = state(saved_on_tp2_pp2 / "checkpoints" / "step_00000006")
    after = state(run_dir / "again" / "step_00000006")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def run_copy(saved_on_tp2_pp2, tmp_path):
    shutil.copytree(saved_on_tp2_pp2, tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["truncated", "missing", "a flipped bit"])
@pytest.mark.parametrize("file", ["rank_00003.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_found(run_copy, how, file):
    newest = run_copy / "checkpoints" / "step_00000006"
    if (file, how) == ("manifest.json", "a flipped bit"):
        text = (newest / file).read_text()
        digit = next(c for c in json.loads(text)["files"][0]["xxh3"])
        (newest / file).write_text(
            text.replace(json.loads(text)["files"][0]["xxh3"], "0123456789abcdef" if digit else "")
        )
    else:
        damage(newest / file, how)
    result = cli("ckpt", "verify", str(newest))
    assert result.returncode == CheckpointError.exit_code == 12
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_run_falls_back_to_the_newest_good_checkpoint_and_says_why(run_copy):
    damage(run_copy / "checkpoints" / "step_00000006" / "rank_00001.safetensors", "a flipped bit")
    path = write_yaml(tiny_config(run_copy), run_copy / "run.yaml")
    result = cli("train", str(path))
    assert result.returncode == 0, result.stderr
    assert "rejected checkpoint step_00000006: rank_00001.safetensors: checksum" in result.stdout
    assert "resuming from step 3" in result.stdout


def test_another_architecture_is_refused_by_name_and_both_values(run_copy):
    path = write_yaml(tiny_config(run_copy, model__ffn_hidden_size=128), run_copy / "run.yaml")
    before = {p: p.read_bytes() for p in (run_copy / "checkpoints").rglob("*") if p.is_file()}
    result = cli("train", str(path))
    assert result.returncode == 12
    assert "model.ffn_hidden_size: 96 saved, 128 configured" in result.stderr
    assert {p: p.read_bytes() for p in (run_copy / "checkpoints").rglob("*") if p.is_file()} == before


def test_a_manifest_that_names_a_file_outside_is_refused(run_copy):
    folder = run_copy / "checkpoints" / "step_00000006"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["name"] = "../../config.yaml"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_manifest(folder)


def test_old_checkpoints_are_pruned_and_the_pointer_follows(tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint={"interval": 1, "keep": 2})
    run_ranks(1, train_run, config)
    root = Path(config.run_dir) / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000005", "step_00000006"]
    assert json.loads((root / "latest").read_text()) == "step_00000006"
