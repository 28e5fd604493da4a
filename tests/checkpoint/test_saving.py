"""Asynchronous saves: copies, order of durability, failures, saves that meet, retention."""

import builtins
import errno
import os
import resource
import shutil
import time
from pathlib import Path

import pytest

from flagscale_like.checkpoint import manifest
from flagscale_like.checkpoint.manifest import (
    TEMPORARY,
    publish,
    read_manifest,
    remove,
    remove_leftovers,
    step_folders,
    to_remove,
    verify_files,
    write_manifest,
)
from flagscale_like.config import Checkpoint
from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.harness import run_ranks, tiny_config


def slow_writer(config, seconds):
    """Train with a writer that opens its files late: the steps go on meanwhile."""

    def open_late(path, *args, **kwargs):
        if faults.opened_for_writing(path, *args, **kwargs):
            time.sleep(seconds)
        return original(path, *args, **kwargs)

    original = builtins.open

    def patch():
        builtins.open = open_late

    return faults.train_and_listen(config, patch)


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory):
    """A run that waits for every save."""
    options = {"checkpoint__interval": 2, "checkpoint__asynchronous": False}
    config = tiny_config(tmp_path_factory.mktemp("synchronous") / "run", **options)
    run_ranks(1, faults.train_run, config)
    return Path(config.run_dir) / "checkpoints"


def test_a_snapshot_does_not_see_later_updates(synchronous, tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint__interval=2)
    ((_, error),) = run_ranks(1, slow_writer, config, 0.5)
    assert error is None
    root = tmp_path / "run" / "checkpoints"
    for name in ("step_00000002", "step_00000004", "step_00000006"):
        assert faults.rank_files(root / name) == faults.rank_files(synchronous / name)
    assert faults.rank_files(root / "step_00000002") != faults.rank_files(root / "step_00000004")
    saves = [r for r in read_metrics(tmp_path / "run") if "checkpoint/stall_s" in r]
    assert [r["step"] for r in saves] == [2, 4, 6]
    assert all(r["checkpoint/write_s"] > 0.5 for r in saves)


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_a_save_that_is_due_while_one_is_under_way_waits_or_is_skipped_and_says_so(when_busy, tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint__interval=1, checkpoint__when_busy=when_busy)
    ((said, error),) = run_ranks(1, slow_writer, config, 0.4)
    assert error is None
    steps = [int(folder.name[5:]) for folder in step_folders(tmp_path / "run" / "checkpoints")]
    if when_busy == "wait":
        assert steps == [6, 5, 4, 3, 2, 1]
        assert any("waits for the one under way" in line for line in said)
    else:
        assert steps[0] == 6
        assert 1 in steps
        assert len(steps) < 6
        assert any("save skipped: one is still under way" in line for line in said)


def failing_writer(config, error):
    """Train on two ranks; the first file of rank 1 cannot be opened."""

    def fail(call):
        raise OSError(error, os.strerror(error))

    def patch():
        if os.environ["RANK"] == "1":
            faults.at_call(builtins, "open", 1, fail, when=faults.opened_for_writing)

    return faults.train_and_listen(config, patch)


@pytest.mark.parametrize(("on_error", "error"), [("stop", errno.ENOSPC), ("continue", errno.EACCES)])
def test_a_failed_write_surfaces_at_the_next_step_on_all_ranks(on_error, error, tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint__interval=2, checkpoint__on_error=on_error)
    results = run_ranks(2, failing_writer, config, error)
    root = tmp_path / "run" / "checkpoints"
    text = f"rank 1: [Errno {error}] {os.strerror(error)}; earlier checkpoints are untouched"
    saved = [folder.name for folder in step_folders(root)]
    if on_error == "stop":
        assert all(e == f"CheckpointError: {root}/step_00000002: could not be saved: {text}" for _, e in results)
        assert saved == []
        assert [step for step, *_ in faults.losses(tmp_path / "run")] in ([1, 2, 3], [1, 2, 3, 4])
    else:
        assert [e for _, e in results] == [None, None]
        assert any(f"step 2 | not saved: {text}" in line for line in results[0][0])
        assert saved == ["step_00000006", "step_00000004"]
    assert not list(root.glob(".tmp-*"))


def train_with_small_files(config):
    """Train where no file may grow past 64 KiB: the kernel itself refuses the write."""
    limit = 64 << 10
    return faults.train_and_listen(config, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


def test_a_disk_that_takes_no_more_leaves_the_last_good_checkpoint(synchronous, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    kept = run_dir / "checkpoints" / "step_00000002"
    kept.symlink_to(synchronous / "step_00000002")
    before = faults.rank_files(kept)
    config = tiny_config(run_dir, checkpoint__interval=2, checkpoint__keep=1)
    ((_, error),) = run_ranks(1, train_with_small_files, config)
    assert error.startswith("CheckpointError")
    assert "File too large" in error
    assert faults.rank_files(kept) == before
    assert verify_files(kept, processes=1) == []


def test_the_latest_pointer_moves_only_after_everything_is_durable(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def note_replace(source, target):
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    root = tmp_path / "checkpoints"
    temporary = root / ".tmp-step_00000004"
    temporary.mkdir(parents=True)
    write_manifest(temporary, [manifest.write_json(temporary / "state.json", {})])
    manifest.publish(temporary, root / "step_00000004")
    assert events == [
        ("fsync", "state.json.tmp"),
        ("rename", "state.json"),
        ("fsync", "manifest.json.tmp"),
        ("rename", "manifest.json"),
        ("fsync", ".tmp-step_00000004"),
        ("rename", "step_00000004"),
        ("fsync", "checkpoints"),
        ("fsync", "latest.tmp"),
        ("rename", "latest"),
        ("fsync", "checkpoints"),
    ]


def checkpoints(root, steps):
    for step in steps:
        (root / f"step_{step:08d}").mkdir(parents=True)
        write_manifest(root / f"step_{step:08d}", [])
    return lambda step: root / f"step_{step:08d}"


def test_retention_keeps_the_newest_the_milestones_and_the_last_good_one(tmp_path):
    at = checkpoints(tmp_path, [100, 150, 200, 250, 300, 350])
    assert to_remove(tmp_path, keep=2, keep_every=0) == [at(250), at(200), at(150), at(100)]
    assert to_remove(tmp_path, keep=2, keep_every=100) == [at(250), at(150)]
    assert to_remove(tmp_path, keep=1, keep_every=0, good=at(150)) == [at(300), at(250), at(200), at(100)]
    (at(100) / "manifest.json").unlink()  # not ours to judge
    assert to_remove(tmp_path, keep=2, keep_every=0) == [at(250), at(200), at(150)]


def test_a_run_prunes_as_configured(tmp_path):
    options = {"interval": 1, "keep": 1, "keep_every": 2, "sha256": True}
    config = tiny_config(tmp_path / "run", checkpoint=options)
    run_ranks(1, faults.train_run, config)
    root = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000002", "step_00000004", "step_00000006"]
    records = read_manifest(root / "step_00000006")
    assert [len(record.sha256 or "") for record in records] == [64, 64]


def test_a_step_saved_twice_leaves_one_and_an_interrupted_exchange_the_old_one(tmp_path, monkeypatch):
    at = checkpoints(tmp_path, [3])
    (at(3) / "old").touch()
    new = tmp_path / f"{TEMPORARY}step_00000003-x"
    new.mkdir()
    rename, renames = os.replace, []

    def killed_after_the_first(source, target):
        renames.append(source)
        if len(renames) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        publish(new, at(3))
    monkeypatch.undo()
    assert not at(3).exists()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    assert (at(3) / "old").exists()

    new.mkdir()
    publish(new, at(3))
    assert not (at(3) / "old").exists()
    end = time.monotonic() + 30
    while list(tmp_path.glob(f"{TEMPORARY}*")) and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_a_checkpoint_that_somebody_else_removed_is_no_failed_save(tmp_path):
    at = checkpoints(tmp_path, [1, 2])
    shutil.rmtree(at(1))
    assert remove([at(1), at(2)]) == []
    assert not list(tmp_path.iterdir())


def test_async_is_the_name_in_yaml():
    assert Checkpoint.model_validate({"async": False}).asynchronous is False
    assert Checkpoint().model_dump()["async"] is True
