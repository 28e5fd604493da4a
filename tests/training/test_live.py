"""The live line: in a terminal it follows the steps below the log; elsewhere there are plain lines only."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from flagscale_like.training.live import LiveLine, draws
from flagscale_like.training.parts import Report
from tests.harness import tiny_config


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


class Silent(Report):
    """Says and writes nothing."""

    def say(self, text): ...

    def numbers(self, step, values): ...

    def event(self, step, consumed, event): ...


SILENT = Silent()


def step(number, loss, *, last=False):
    return SimpleNamespace(
        consumed=8 * number, plan=SimpleNamespace(step=number, last=last), facts=SimpleNamespace(loss=loss)
    )


def test_a_terminal_shows_progress_loss_and_time_left_below_the_log(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("flagscale_like.training.live.time.monotonic", lambda: clock[0])
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, soft_wrap=True)
    live = LiveLine(tiny_config(tmp_path, train__steps=4), console)
    live.begin(SILENT)
    live.after(step(1, 7.5), SILENT)
    clock[0] += 0.01  # too soon to draw again
    live.after(step(2, 6.5), SILENT)
    console.print("a line of log")
    clock[0] += 1.0
    live.after(step(3, 5.5), SILENT)
    clock[0] += 0.01
    live.after(step(4, 4.5, last=True), SILENT)
    live.close(None)
    shown = file.getvalue()
    for words in ("step 1/4", "loss 7.5000  eta 0:", "a line of log", "step 3/4", "75%", "loss 5.5000", "step 4/4"):
        assert words in shown
    assert "loss 6.5000" not in shown
    assert shown.endswith("\x1b[2K")  # the line is gone, and the log stays
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is there


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}], ids=str)
def test_where_nobody_reads_a_terminal_nothing_is_drawn(variables, tmp_path, monkeypatch):
    assert draws(Console(file=io.StringIO(), force_terminal=True))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True)
    assert not draws(console)
    live = LiveLine(tiny_config(tmp_path), console)
    live.begin(SILENT)
    live.after(step(1, 7.5), SILENT)
    live.close(None)
    assert file.getvalue() == ""


def test_a_pipe_and_the_other_ranks_have_no_line():
    assert not draws(Console(file=io.StringIO()))
    assert not draws(None)
