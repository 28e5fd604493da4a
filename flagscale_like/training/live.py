"""The live line of a run in a terminal: progress, loss and time left, below the log."""

from __future__ import annotations

import datetime
import os
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from flagscale_like.config import RunConfig
from flagscale_like.figures import fixed
from flagscale_like.training.parts import Part, Report, Step
from flagscale_like.training.step_log import Pace

SHORTEST_S = 0.1  # between two drawings


def draws(console: Console | None) -> bool:
    """Whether a live line can be drawn: on a terminal that is read by a person. Elsewhere the log has plain lines only."""
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        return False
    return not (os.environ.get("NO_COLOR") or os.environ.get("CI"))


class LiveLine(Part):
    """Draws the line, on rank 0, after each step. Where it cannot be drawn, it does nothing.

    Args:
        console: that the log is written to; None on the other ranks.
    """

    def __init__(self, config: RunConfig, console: Console | None) -> None:
        self.steps, self.pace, self._drawn = config.train.steps, Pace(config), 0.0
        self._bar: Progress | None = None
        if draws(console):
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TaskProgressColumn())
            words = TextColumn("{task.description}")
            # Nothing is drawn between two steps: no thread, and nothing that a process which ends at once leaves behind.
            self._bar = Progress(*columns, words, console=console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task("", total=self.steps)

    def begin(self, report: Report) -> None:
        if self._bar is not None:
            self._bar.start()
            self._bar.console.show_cursor(True)

    def after(self, step: Step, report: Report) -> None:
        if self._bar is None:
            return
        self.pace.note(step.consumed)
        now = time.monotonic()
        if now - self._drawn < SHORTEST_S and not step.plan.last:
            return
        seconds = now - self._drawn if self._drawn else 0.0
        self._drawn = now
        left = datetime.timedelta(seconds=round(self.pace.seconds_left(step.plan.step, seconds)))
        text = f"loss {fixed(step.facts.loss)}  eta {left}"
        self._bar.update(self._task, completed=step.plan.step, description=text, refresh=True)

    def close(self, error: BaseException | None) -> None:
        if self._bar is not None:
            self._bar.stop()
