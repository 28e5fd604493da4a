"""The time left that a log line shows, against a clock that the test moves."""

import pytest

from flagscale_like.training import step_log
from flagscale_like.training.step_log import Pace
from tests.harness import tiny_config

RAMP_UP = {"start": 2, "increment": 2, "samples": 400}


@pytest.mark.parametrize("ramp_up", [None, RAMP_UP], ids=["one batch size", "ramp-up"])
@pytest.mark.parametrize("after", [10, 40, 90])
def test_after_ten_steps_the_time_left_is_right_within_a_fifth(after, ramp_up, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, train__steps=200, train__global_batch_size=16, train__ramp_up=ramp_up)
    clock, consumed, step_ends = [0.0], 0, []
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: clock[0])
    pace = Pace(config)
    left = None
    for step in range(1, 201):
        batch = config.train.batch_size_at(consumed)
        clock[0] += 0.05 * batch * (1 + 0.2 * (step % 3 - 1)) + 30.0 * (step == 1)  # the first builds and compiles
        consumed += batch
        pace.note(consumed)
        step_ends.append(clock[0])
        if step == after:
            left = pace.seconds_left(step, 0.0)
        clock[0] += 0.5 * (step % 5 == 0 and not ramp_up)  # an evaluation
    truth = clock[0] - step_ends[after - 1]
    assert left == pytest.approx(truth, rel=0.2)


def test_a_run_that_went_back_counts_the_steps_and_not_the_samples(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: clock[0])
    config = tiny_config(tmp_path, train__steps=100)
    pace = Pace(config)
    for done in range(1, 21):
        clock[0] += 1.0
        pace.note(8 * done)
    assert pace.seconds_left(10, 0.0) == pytest.approx(90.0)  # 20 were made, the run is back at 10
