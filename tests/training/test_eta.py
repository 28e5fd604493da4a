"""The time left that a log line shows, against a clock that the test moves."""

from types import SimpleNamespace

import pytest

from flagscale_like.training import metrics
from flagscale_like.training.metrics import Reporter
from tests.harness import tiny_config

PLATFORM = SimpleNamespace(describe=lambda: "CPU")
RAMP_UP = {"start": 2, "increment": 2, "samples": 400}


@pytest.mark.parametrize("ramp_up", [None, RAMP_UP], ids=["one batch size", "ramp-up"])
@pytest.mark.parametrize("after", [10, 40, 90])
def test_after_ten_steps_the_time_left_is_right_within_a_fifth(after, ramp_up, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, train__steps=200, train__global_batch_size=16, train__ramp_up=ramp_up)
    clock, consumed, step_ends = [0.0], 0, []
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    reporter = Reporter(config, SimpleNamespace(is_main=False, platform=PLATFORM), 0)
    left = None
    for step in range(1, 201):
        batch = config.train.batch_size_at(consumed)
        clock[0] += 0.05 * batch * (1 + 0.2 * (step % 3 - 1)) + 30.0 * (step == 1)  # the first builds and compiles
        consumed += batch
        reporter.timed(consumed)
        step_ends.append(clock[0])
        if step == after:
            left = reporter.seconds_left(step)
        clock[0] += 0.5 * (step % 5 == 0 and not ramp_up)  # an evaluation
    truth = clock[0] - step_ends[after - 1]
    assert left == pytest.approx(truth, rel=0.2)


def test_a_run_that_went_back_counts_the_steps_and_not_the_samples(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    config = tiny_config(tmp_path, train__steps=100)
    reporter = Reporter(config, SimpleNamespace(is_main=False, platform=PLATFORM), 0)
    for done in range(1, 21):
        clock[0] += 1.0
        reporter.timed(8 * done)
    assert reporter.seconds_left(10) == pytest.approx(90.0)  # 20 were made, the run is back at 10
