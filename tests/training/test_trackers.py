"""Experiment trackers: the real clients of Weights & Biases, offline, and of MLflow, with a store of files."""

import os
import struct
import threading
import time

import pytest
from mlflow import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record

from flagscale_like.config import Logging
from flagscale_like.errors import PlatformError
from flagscale_like.training import trackers
from flagscale_like.training.metrics import read_metrics
from flagscale_like.training.trackers import Sender, Tracker, check_trackers
from tests.commands import run_commands
from tests.harness import tiny_config, write_yaml


def records_of(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log, in blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:  # the rest of a block
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def wandb_numbers(run_dir, name):
    """(step, number of this name) that Weights & Biases has, over the files of all starts."""
    found = []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for record in records_of(path):
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if name in items:
                found.append((int(items["step"]), float(items[name])))
    return found


def test_a_stopped_and_resumed_run_is_one_run_in_both_trackers(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # of the client below
    run, store = tmp_path / "run", f"file://{tmp_path}/mlflow"
    logging = {"wandb": {"project": "tests", "mode": "offline"}, "mlflow": {"experiment": "e", "tracking_uri": store}}
    config = tiny_config(run, logging=logging, train__steps=4, train__eval_interval=4)
    path = str(write_yaml(config, tmp_path / "run.yaml"))
    lines = [["train", path, "train.exit_at_step=2"], ["train", path]]
    ((first, second),) = run_commands(lines, MLFLOW_ALLOW_FILE_STORE="true")
    assert (first.exit_code, second.exit_code) == (0, 0), first.error + second.error
    losses = [(r["step"], r["lm loss"]) for r in read_metrics(run) if "lm loss" in r]
    assert [step for step, _ in losses] == [1, 2, 3, 4]

    assert dict(wandb_numbers(run, "lm loss")) == pytest.approx(dict(losses))
    assert len({path.name for path in (run / "wandb").glob("offline-run-*/*.wandb")}) == 1  # of two starts

    client = MlflowClient(tracking_uri=store)
    (of_mlflow,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    history = client.get_metric_history(of_mlflow.info.run_id, "lm loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(dict(losses))
    assert client.get_metric_history(of_mlflow.info.run_id, "lm loss validation")[-1].step == 4
    assert of_mlflow.info.run_name == "run"
    assert of_mlflow.info.status == "FINISHED"
    assert of_mlflow.data.params["train.steps"] == "4"


def test_a_tracker_that_cannot_be_reached_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)  # without it, MLflow refuses a store of files
    logging = {"mlflow": {"experiment": "e", "tracking_uri": f"file://{tmp_path}/mlflow"}}
    path = write_yaml(tiny_config(tmp_path / "run", logging=logging, train__steps=2), tmp_path / "run.yaml")
    ((outcome,),) = run_commands([["train", str(path)]])
    assert outcome.exit_code == 0, outcome.error
    (line,) = [line for line in outcome.printed.splitlines() if "logging.mlflow" in line]
    assert line.startswith("warning: logging.mlflow: MlflowException")
    assert len([r for r in read_metrics(tmp_path / "run") if "lm loss" in r]) == 2


class Failing(Tracker):
    """A tracker that fails for a while."""

    name = "failing"

    def __init__(self, tmp_path):
        super().__init__(tiny_config(tmp_path))
        self.broken, self.sent, self.ended = False, [], None

    def open(self):
        return "here"

    def send(self, record):
        if self.broken:
            raise OSError("no network")
        self.sent.append(record[:2])

    def close(self, *, failed):
        self.ended = failed


def test_a_tracker_that_fails_is_told_once_and_tried_again_later(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "PAUSE_S", 0.0)
    tracker, said = Failing(tmp_path), []
    sender = Sender(tracker, said.append)
    sender.numbers(1, {"loss": 2.0, "not finite": float("nan"), "missing": None})
    while len(tracker.sent) < 1:
        time.sleep(0.01)
    tracker.broken = True
    for step in (2, 3):
        sender.numbers(step, {"loss": 1.0})
    while not sender._waiting.empty():
        time.sleep(0.01)
    time.sleep(0.05)
    tracker.broken = False
    sender.numbers(4, {"loss": 0.5})
    sender.close(RuntimeError("the run failed"))
    assert tracker.sent == [(1, {"loss": 2.0}), (4, {"loss": 0.5})]
    assert tracker.ended is True
    assert said[0] == "logging.failing: here"
    (warning,) = said[1:]
    assert warning.startswith("warning: logging.failing: OSError: no network. Training goes on")


def test_training_does_not_wait_for_a_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    tracker, said, let_go = Failing(tmp_path), [], threading.Event()
    tracker.send = lambda record: let_go.wait(30)
    sender = Sender(tracker, said.append)
    began = time.monotonic()
    for step in range(20):
        sender.numbers(step, {"loss": 1.0})
    assert time.monotonic() - began < 5  # a tracker that hangs takes 30 s a record
    assert any("more slowly than they come" in line for line in said)
    sender.close(None)
    let_go.set()


def test_a_client_that_is_not_installed_is_named_before_the_first_step(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match=r"pip install 'flagscale_like\[wandb\]'"):
        check_trackers(Logging.model_validate({"wandb": {"project": "p"}}))
    check_trackers(Logging())
    assert "WANDB_API_KEY" not in os.environ  # the tests above need no account
