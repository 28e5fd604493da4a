"""The loop: only the step is step time, a stop saves at once, a stopped run is closed, the log shows the mean loss."""

import contextlib
import errno
import gc
import io
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from flagscale_like.checkpoint.manifest import step_folders
from flagscale_like.engine.engine import Engine
from flagscale_like.json_files import read_records
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.platforms.cpu import CpuPlatform
from flagscale_like.training import clock as clock_module
from flagscale_like.training import loop, metrics
from flagscale_like.training.clock import Clock
from flagscale_like.training.metrics import loss_curve, read_metrics
from flagscale_like.training.plan import Progress, next_step
from tests import faults
from tests.harness import run_ranks, tiny_config


def test_the_plan_of_a_step_is_a_function_of_configuration_and_progress(tmp_path):
    config = tiny_config(tmp_path, train__log_interval=4, train__eval_interval=3, checkpoint={"interval": 2})
    plans = [next_step(config, 2, Progress(step=n, consumed=8 * n), first=n == 0) for n in range(7)]
    assert plans[6] is None
    assert [p.step for p in plans[:6]] == [1, 2, 3, 4, 5, 6]
    assert [p.step for p in plans[:6] if p.log] == [1, 4, 6]
    assert [p.step for p in plans[:6] if p.evaluate] == [3, 6]
    assert [p.step for p in plans[:6] if p.save] == [2, 4, 6]
    assert [p.last for p in plans[:6]] == [False] * 5 + [True]
    assert {(p.batch_size, p.micro_batches) for p in plans[:6]} == {(8, 4)}
    assert next_step(config, 2, Progress(step=2, stopping=True), first=False) is None


def test_evaluations_and_saves_between_log_lines_are_no_step_time(monkeypatch):
    """Steps of 200 ms, a log line every 10, a save of 2 s after every 9th: 200 ms a step are reported, not 22."""
    now, reported, clock = [0.0], [], Clock()
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    for step in range(1, 41):
        with clock.step():
            now[0] += 0.2
        if step % 10 == 0:
            seconds, steps = clock.pop()
            reported.append(seconds / steps)
        if step % 9 == 0:
            now[0] += 2.0
    assert reported == [pytest.approx(0.2)] * 4


def evaluates_slowly(config):
    """Train; each evaluation moves the clock on by an hour."""
    evaluate, skew, perf_counter = loop.evaluate, [0.0], clock_module.time.perf_counter

    def slow(run, split):
        evaluate(run, split)
        skew[0] += 3600.0

    loop.evaluate = slow
    clock_module.time = type("time", (), {"perf_counter": staticmethod(lambda: perf_counter() + skew[0])})
    faults.train_run(config)


def test_the_records_of_a_run_that_evaluates_hold_step_times(tmp_path):
    config = tiny_config(tmp_path / "run", train__log_interval=4, train__eval_interval=3, train__eval_steps=1)
    run_ranks(1, evaluates_slowly, config)
    times = [r["iteration-time"] for r in read_metrics(tmp_path / "run") if "iteration-time" in r]
    assert len(times) == 3
    assert max(times) < 100


def signalled_before_an_evaluation(config):
    """Train; rank 0 is told to stop inside the third step, after which an evaluation is due."""
    evaluations, evaluate = [], loop.evaluate

    def noted(run, split):
        evaluations.append(run.progress.step)
        evaluate(run, split)

    loop.evaluate = noted
    if os.environ["RANK"] == "0":
        faults.at_call(Engine, "forward_backward", 3, lambda call: (os.kill(os.getpid(), signal.SIGTERM), call())[1])
    return faults.train_and_listen(config), evaluations


def test_a_stop_at_a_step_that_evaluates_saves_and_does_not_evaluate(tmp_path):
    config = tiny_config(tmp_path / "run", train__eval_interval=3, train__eval_steps=1, checkpoint={"interval": 5})
    for (_, error), evaluations in run_ranks(2, signalled_before_an_evaluation, config):
        assert (error, evaluations) == (None, [])
    assert [folder.name for folder in step_folders(RunFolder(config.run_dir).checkpoints)] == ["step_00000003"]


def test_a_stop_of_a_run_without_checkpoints_says_that_nothing_was_saved(tmp_path):
    config = tiny_config(tmp_path / "run", train__eval_steps=1, checkpoint={"interval": 0})
    ((said, error), _) = run_ranks(1, signalled_before_an_evaluation, config)[0]
    assert error is None
    assert said[-1] == "stopped at step 3; nothing was saved, because checkpoint.interval is 0"


def poisoned(config):
    faults.poison({3}, "total")
    return faults.train_and_listen(config)


def test_a_run_that_its_guard_stops_is_closed_and_its_stop_is_no_interruption(tmp_path):
    config = tiny_config(tmp_path / "run", monitors={"non_finite": "stop"})
    ((_, error),) = run_ranks(1, poisoned, config)
    assert error.startswith("DivergedError: step 3: loss nan")
    folder = RunFolder(config.run_dir)
    assert [(e["event"], e["step"]) for e in read_records(folder.resilience)] == [("start", 0), ("stop", 3)]
    assert folder.loss_plot.is_file()
    assert any(folder.tensorboard.iterdir())
    run_ranks(1, faults.train_run, config)
    assert not any("resilience/restarts" in r for r in read_metrics(folder.root))


def train_on_a_disk_that_fills(config, limit):
    """Train; no file may grow beyond `limit` bytes once the run has begun. Returns what the run said on both streams."""

    def fill(call):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return call()

    faults.at_call(Engine, "forward_backward", 2, fill)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        said, error = faults.train_and_listen(config)
    return said, error, errors.getvalue()


def test_a_full_disk_under_records_and_plots_is_said_once_and_the_run_goes_on(tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint={"interval": 0}, train__eval_interval=2, train__eval_steps=1)
    ((said, error, errors),) = run_ranks(1, train_on_a_disk_that_fills, config, 600)
    assert error is None
    assert any(line.startswith("done: step 6 of 6") for line in said)
    warnings = [line for line in errors.splitlines() if line.startswith("warning: ")]
    names = [line.split(": ")[1].rsplit("/", 1)[1] for line in warnings]
    assert {"metrics.jsonl", "loss.png"} <= set(names)
    assert len(names) == len(set(names)), warnings
    assert "File too large: training goes on without what belongs there" in warnings[0]


def poisoned_on_a_broken_disk(config):
    """Train; the guard stops the run, and the plot of its losses cannot be written. Returns the error and its notes."""
    faults.poison({3}, "total")
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    faults.at_call(metrics, "plot_losses", 1, lambda call: (_ for _ in ()).throw(broken))
    try:
        faults.train_run(config)
    except Exception as error:
        return type(error).__name__, error.__notes__


def test_what_fails_while_a_stopped_run_is_closed_does_not_hide_what_stopped_it(tmp_path):
    config = tiny_config(tmp_path / "run", monitors={"non_finite": "stop"})
    ((name, notes),) = run_ranks(1, poisoned_on_a_broken_disk, config)
    assert name == "DivergedError"
    assert notes == ["while the run was closed: OSError: [Errno 5] Input/output error"]
    assert read_records(RunFolder(config.run_dir).resilience)[-1]["event"] == "stop"


def fails_in_step_3(config):
    def fail(call):
        raise ZeroDivisionError("a bug")

    faults.at_call(Engine, "forward_backward", 3, fail)
    with pytest.raises(ZeroDivisionError):
        faults.train_run(config)


def test_a_run_that_a_bug_ends_is_closed_and_goes_on_as_an_interrupted_one(tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint={"interval": 1, "keep": 9})
    run_ranks(1, fails_in_step_3, config)
    folder = RunFolder(config.run_dir)
    assert [e["event"] for e in read_records(folder.resilience)] == ["start"]
    assert folder.loss_plot.is_file()
    run_ranks(1, faults.train_run, config)
    assert any("resilience/restarts" in r for r in read_metrics(folder.root))


def trains_with_loader_processes(config, fails):
    """Train; returns the loader processes that are left while no garbage is collected."""
    multiprocessing.current_process().daemon = False  # the harness's ranks are, and start no processes
    gc.disable()
    if fails:
        fails_in_step_3(config)
    else:
        faults.train_run(config)
    gc.disable()
    return [child.name for child in multiprocessing.active_children()]


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_a_run_leaves_no_loader_process_behind(fails, tmp_path):
    config = tiny_config(tmp_path / "run", data__num_workers=1, train__gc_interval=0, train__eval_interval=6)
    assert run_ranks(1, trains_with_loader_processes, config, fails) == [[]]


def mean_and_last(run_dir):
    return {r["step"]: (r.get("lm loss/mean"), r["lm loss"]) for r in read_metrics(Path(run_dir)) if "lm loss" in r}


def test_the_log_shows_the_mean_since_the_last_line_also_across_a_resume(tmp_path):
    every, some, parted = (
        tiny_config(tmp_path / name, train__log_interval=n, train__steps=8)
        for name, n in (("every", 1), ("some", 4), ("parted", 4))
    )
    run_ranks(1, faults.train_run, every)
    losses = [last for _, last in mean_and_last(every.run_dir).values()]
    said = run_ranks(1, faults.train_and_listen, some)[0][0]
    found = mean_and_last(some.run_dir)
    assert found == {
        1: (losses[0], losses[0]),
        4: (pytest.approx(sum(losses[:4]) / 4), losses[3]),
        8: (pytest.approx(sum(losses[4:]) / 4), losses[7]),
    }
    assert any(f"loss {found[8][0]:.4f} (this step {losses[7]:.4f})" in line for line in said)
    half = parted.model_copy(update={"train": parted.train.model_copy(update={"exit_at_step": 6})})
    run_ranks(1, faults.train_run, half)
    run_ranks(1, faults.train_run, parted)
    again = mean_and_last(parted.run_dir)
    assert {step: again[step] for step in (1, 4, 8)} == found
    assert again[7] == (None, losses[6])  # the first step after the resume, out of turn
    assert [step for step, _ in loss_curve(read_metrics(Path(parted.run_dir)))] == [1, 4, 6, 8]
    assert loss_curve([{"step": 1, "lm loss": 2.0}, {"step": 2, "lm loss": None}]) == [(1, 2.0)]  # an older run's


def trains_elsewhere(config):
    """On a device whose random state has another size than the CPU's, as a GPU's has."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CpuPlatform, "rng_state", lambda self: torch.zeros(16, dtype=torch.uint8))
        patched.setattr(CpuPlatform, "set_rng_state", lambda self, state: None)
        return trains(config)


def trains(config):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), parallel_context(config.parallel) as ctx:
        pretrain(config, ctx)
    return printed.getvalue(), read_metrics(Path(config.run_dir))[-1]["step"]


def test_a_run_goes_on_on_another_kind_of_device(tmp_path):
    config = tiny_config(tmp_path / "run", train__exit_at_step=3)
    run_ranks(1, trains_elsewhere, config)
    ((printed, last),) = run_ranks(1, trains, tiny_config(tmp_path / "run"))
    assert last == 6
    assert "the same layout on another kind of device than cpu: dropout draws anew" in printed
