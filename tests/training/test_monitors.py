"""Monitors: what they find, on every layout alike, and that a run with them resumes and goes back bit for bit."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from flagscale_like.config import Spike
from flagscale_like.data.synthetic import SyntheticDataset
from flagscale_like.engine.engine import Engine
from flagscale_like.json_files import read_records
from flagscale_like.training.metrics import read_metrics
from flagscale_like.training.monitors import (
    LayerMonitor,
    SpikeMonitor,
    StepMonitors,
    adam_update,
    evenly_spaced,
)
from tests import faults
from tests.harness import run_ranks, tiny_config

EVERYTHING = {"layers": {"interval": 1}, "effective_rank": {"interval": 1, "layers": 9}}


def quiet(monitor, values):
    return [event for value in values for event in monitor.judge(value)]


def test_a_value_six_sigma_above_the_window_is_a_spike_and_hides_no_second_one():
    monitor = SpikeMonitor("loss", Spike(window=32, action="skip"))
    assert quiet(monitor, [5 + 0.1 * (-1) ** i for i in range(40)]) == []
    assert quiet(monitor, [5.5]) == []  # five sigma
    (event,) = quiet(monitor, [50.0])
    assert (event.kind, event.value, event.action) == ("loss", 50.0, "skip")
    assert 5.5 < event.limit < 6.5
    assert "monitors.loss.action is skip" in event.message
    assert len(quiet(monitor, [50.0])) == 1  # the first one entered the window as its limit


def test_a_level_that_stays_up_is_accepted_in_the_end():
    monitor = SpikeMonitor("loss", Spike(window=32))
    assert quiet(monitor, [2 + 0.01 * math.sin(i) for i in range(32)]) == []
    spikes = quiet(monitor, [4 + 0.01 * math.sin(i) for i in range(64)])
    assert 0 < len(spikes) < 40
    assert quiet(monitor, [4 + 0.01 * math.sin(i) for i in range(32)]) == []


def test_a_spike_at_step_1_is_found_by_the_absolute_limit_alone():
    assert quiet(SpikeMonitor("grad_norm", Spike()), [1e9]) == []
    (event,) = quiet(SpikeMonitor("grad_norm", Spike(limit=100)), [1e9])
    assert event.limit == 100
    assert "monitors.grad_norm.limit" in event.message


def test_values_that_are_not_finite_and_a_constant_are_no_spikes():
    assert quiet(SpikeMonitor("loss", Spike(window=8)), [3.0] * 20 + [3.01, math.nan, math.inf]) == []


def test_layers_watched_are_evenly_spaced():
    assert evenly_spaced(60, 8) == [0, 8, 17, 25, 34, 42, 51, 59]
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert evenly_spaced(5, 1) == [0]


# On every layout


def readings(run_dir):
    """Per step: what the monitors measured."""
    return [
        {k: v for k, v in r.items() if k.startswith(("layer-", "effective-rank/"))}
        for r in read_metrics(Path(run_dir))
        if any(k.startswith("layer-") for k in r)
    ]


@pytest.fixture(scope="module")
def on_one_process(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("one") / "run", train__steps=3, monitors=EVERYTHING)
    run_ranks(1, faults.train_run, config)
    return readings(config.run_dir)


def test_all_parts_of_the_model_are_measured(on_one_process):
    assert len(on_one_process) == 3
    names = set(on_one_process[0])
    units = [*(f"layers.{i}" for i in range(4)), "embedding", "final_layernorm", "output_layer"]
    assert {f"layer-grad-norm/{unit}" for unit in units} <= names
    assert {f"layer-update-to-weight/{unit}" for unit in units} <= names
    matrices = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    for kind in ("weights", "gradients"):
        assert {f"effective-rank/{kind}/layers.{i}.{m}" for i in range(4) for m in matrices} <= names
    assert {f"effective-rank/activations/layers.{i}" for i in range(4)} <= names
    assert all(1 < value <= 64 for name, value in on_one_process[0].items() if name.startswith("effective-rank/"))
    total = math.sqrt(sum(v**2 for name, v in on_one_process[0].items() if name.startswith("layer-grad-norm/")))
    assert total > 0


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(4, {"tp": 2, "sp": True, "pp": 2}, id="tp2 sp pp2"),
        pytest.param(4, {"pp": 2, "vpp": 2}, id="pp2 vpp2 dp2"),
        pytest.param(2, {"cp": 2}, id="cp2"),
        pytest.param(2, {"tp": 2}, id="tp2", marks=pytest.mark.soak),
    ],
)
def test_layouts_measure_what_one_process_measures(ranks, layout, on_one_process, tmp_path):
    config = tiny_config(tmp_path / "run", train__steps=3, monitors=EVERYTHING, parallel=layout)
    run_ranks(ranks, faults.train_run, config)
    found = readings(config.run_dir)
    assert len(found) == 3
    for expected, here in zip(on_one_process, found, strict=True):
        assert here.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("effective-rank/activations") and "vpp" in layout:
                assert 1 < here[name] <= 64  # each data-parallel rank gives tokens of its own
            else:
                assert here[name] == pytest.approx(value, rel=2e-3), name


def layer_norms_add_up(config):
    """(the gradient norm of the step, the root of the sum of the layers' squares, the largest error of adam_update)."""
    found = {}

    class Spy(LayerMonitor):
        def note_gradients(self):
            self.before = [shard.main.detach().clone() for shard in self.shards]
            super().note_gradients()

        def measure(self, *, updated):
            found["error"] = max(
                float((adam_update(s) - (s.main.detach() - b)).abs().max()) for s, b in zip(self.shards, self.before)
            )
            found["change"] = max(float((s.main.detach() - b).abs().max()) for s, b in zip(self.shards, self.before))
            return super().measure(updated=updated)

    original = StepMonitors.__init__

    def init(self, *args):
        original(self, *args)
        self.layers.__class__ = Spy

    StepMonitors.__init__ = init
    faults.train_run(config)
    return found


def test_the_layers_gradient_norms_add_up_and_updates_are_what_the_optimizer_did(tmp_path):
    changes = {"optimizer__lr": 1e-3, "optimizer__warmup_steps": 0, "model__tie_embeddings": True, "train__steps": 3}
    changes["optimizer__clip_grad"] = 0.5
    config = tiny_config(tmp_path / "run", monitors=EVERYTHING, parallel={"tp": 2, "sp": True}, **changes)
    for found in run_ranks(2, layer_norms_add_up, config):
        assert found["change"] > 1e-4
        assert found["error"] < 1e-6
    norms = [r["grad-norm"] for r in read_metrics(tmp_path / "run") if "lm loss" in r]
    for norm, measured in zip(norms, readings(tmp_path / "run"), strict=True):
        squares = [v**2 for name, v in measured.items() if name.startswith("layer-grad-norm/")]
        assert math.sqrt(sum(squares)) == pytest.approx(norm, rel=1e-5)  # before clipping
        assert norm > 0.5


# Events and actions


def spike_at(config, number):
    """Train; at one step, the loss that rank 1 reports is a hundred times what it was."""

    def scaled(call):
        outputs = call()
        outputs.sums["total"] = outputs.sums["total"] * 100
        return outputs

    if os.environ["RANK"] == "1":
        faults.at_call(Engine, "forward_backward", number, scaled)
    faults.train_run(config)


def events_of(run_dir):
    return [{k: v for k, v in r.items() if k != "time"} for r in read_records(Path(run_dir) / "events.jsonl")]


def test_a_spike_that_one_rank_saw_is_skipped_by_all_and_written_down(tmp_path):
    monitors = {"loss": {"window": 8, "action": "skip"}}
    config = tiny_config(tmp_path / "run", monitors=monitors, train__steps=8, checkpoint={"interval": 0})
    run_ranks(2, spike_at, config, 6)
    (event,) = events_of(config.run_dir)
    assert (event["step"], event["kind"], event["action"], event["consumed-samples"]) == (6, "loss", "skip", 48)
    assert event["value"] > 100
    assert event["limit"] < 50
    assert event["message"].startswith("loss ")
    last = [r for r in read_metrics(tmp_path / "run") if "lm loss" in r][-1]
    assert last["skipped-steps"] == 1


def collapse(config):
    """Train; from step 3 on, a weight matrix of layer 2 has one direction left."""

    def flatten(self, plan):
        before(self, plan)
        parameter = self.effective_ranks.parameters.get((2, "mlp.linear_fc1"))
        if plan.step == 3 and parameter is not None:
            with torch.no_grad():
                parameter.copy_(parameter[:1].expand_as(parameter))

    before, StepMonitors.before = StepMonitors.before, flatten
    return faults.train_and_listen(config)


def test_a_collapse_in_rank_stops_the_run_on_every_rank(tmp_path):
    # Of gradients and the residual stream a random model's rank is no measure.
    monitors = {"effective_rank": {"interval": 1, "of": ["weights"], "action": "stop"}}
    config = tiny_config(tmp_path / "run", monitors=monitors, parallel={"pp": 2})
    for _, error in run_ranks(2, collapse, config):
        assert error.startswith("DivergedError: step 3: loss ")
        assert "effective rank of weights/layers.2.mlp.linear_fc1 fell to " in error
    events = events_of(config.run_dir)
    assert [(event["step"], event["kind"]) for event in events] == [
        (3, "effective-rank/weights/layers.2.mlp.linear_fc1")
    ]


def test_ranks_of_the_first_steps_are_not_judged(tmp_path):
    monitors = {"effective_rank": {"interval": 1, "of": ["weights"], "action": "stop", "after": 3}}
    ((_, error),) = run_ranks(1, collapse, tiny_config(tmp_path / "run", monitors=monitors))
    assert error is None
    assert events_of(tmp_path / "run") == []


def test_a_rank_below_the_least_is_an_event_from_the_first_step_on(tmp_path):
    monitors = {"effective_rank": {"interval": 1, "of": ["weights"], "after": 99, "least": 2.0}}
    ((_, error),) = run_ranks(1, collapse, tiny_config(tmp_path / "run", monitors=monitors))
    assert error is None
    (event,) = events_of(tmp_path / "run")
    assert event["limit"] == 2.0 > event["value"]
    assert "below 2.0 (monitors.effective_rank.least)" in event["message"]


# Stability of the loop


class PoisonedDataset(SyntheticDataset):
    """Samples that a run cannot learn from, whenever it meets them."""

    poisoned = frozenset(range(32, 34))

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index in self.poisoned:
            sample["loss_mask"] = sample["loss_mask"] * float("nan")
        return sample


def train_on_poison(config):
    from flagscale_like.data.synthetic import ROWS

    ROWS["text"] = PoisonedDataset
    faults.train_run(config)


# Of step 5 (samples 32 to 39) the run goes back to step 2 or 3.
WATCHED = {"loss": {"window": 8, "action": "skip"}, "grad_norm": {"window": 8, "sigma": 1.0, "action": "skip"}}
POLICIES = {
    "skip": {"non_finite": "skip", **WATCHED, **EVERYTHING},
    "rewind": {"non_finite": "rewind", "rewind_steps": 2, **WATCHED, **EVERYTHING},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_that_skips_or_goes_back_resumes_bit_for_bit_with_every_monitor_on(policy, tmp_path):
    changes = {"monitors": POLICIES[policy], "checkpoint": {"interval": 1, "keep": 99}, "train__steps": 10}
    whole = tiny_config(tmp_path / "whole", **changes)
    run_ranks(2, train_on_poison, whole)
    # one that ends at step 7, in an orderly way, and goes on
    parted = tmp_path / "parted"
    run_ranks(2, train_on_poison, tiny_config(parted, train__exit_at_step=7, **changes))
    run_ranks(2, train_on_poison, tiny_config(parted, **changes))
    assert faults.losses(parted)[-3:] == faults.losses(whole.run_dir)[-3:]
    assert readings(parted)[-3:] == readings(whole.run_dir)[-3:]
    assert events_of(parted) == events_of(whole.run_dir)
    final = "checkpoints/step_00000010"
    assert faults.rank_files(parted / final) == faults.rank_files(Path(whole.run_dir) / final)
    saved, expected = (json.loads((Path(d) / final / "state.json").read_text()) for d in (parted, whole.run_dir))
    assert saved["monitors"] == expected["monitors"]
    assert saved["guard"] == expected["guard"]
    assert any(event["kind"] == "non_finite" for event in events_of(whole.run_dir))
