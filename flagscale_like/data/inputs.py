"""What `data.prepare` made its text from: said while it works, and compared with what is there at a later start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flagscale_like.json_files import BAD_JSON, write_json

Say = Callable[[str], None]

INTERVAL_S = 10.0
NAME = "inputs.json"
SHOWN = 3  # names in one line


def silent(line: str) -> None:
    """Say nothing: of the ranks that read what another one has prepared."""


class ProgressLines:
    """Says how much of an input is done, once in `interval_s` seconds at most.

    Args:
        total: bytes of the input.
        say: takes a line.
    """

    def __init__(self, total: int, say: Say, *, interval_s: float = INTERVAL_S) -> None:
        self.total, self.say, self.interval_s = total, say, interval_s
        self._done, self._last = 0, time.monotonic()

    def __call__(self, size: int) -> None:
        """`size` more bytes are done."""
        self._done += size
        now = time.monotonic()
        if now - self._last >= self.interval_s:
            self._last = now
            self.say(f"tokenized {self._done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB")


def size_of(files: Sequence[Path]) -> int:
    """Bytes of the files together."""
    return sum(file.stat().st_size for file in files)


def record_inputs(folder: Path, files: Sequence[Path]) -> None:
    """Write the names and sizes of the files into `folder`, the data folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NAME, {str(file): file.stat().st_size for file in files})


def changes_of_inputs(folder: Path, files: Sequence[Path]) -> str | None:
    """Compare the files with those that were recorded.

    Returns:
        What was added, removed or changed, in one line; None if nothing was, or nothing is on record.
    """
    try:
        before = json.loads((folder / NAME).read_text(encoding="utf-8"))
        now = {str(file): file.stat().st_size for file in files}
        words = {
            "new": sorted(now.keys() - before.keys()),
            "gone": sorted(before.keys() - now.keys()),
            "changed": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
        }
    except (OSError, *BAD_JSON, AttributeError):  # a run of an earlier version has no record
        return None
    found = [f"{len(names)} {word} ({_names(names)})" for word, names in words.items() if names]
    return ", ".join(found) or None


def _names(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
