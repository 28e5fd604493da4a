"""RunLock: one trainer for each run folder. RUN_DIR/lock says whose it is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from flagscale_like.errors import ConfigError
from flagscale_like.json_files import BAD_JSON

BEAT_S = 10.0  # between two signs of life
SILENT_S = 60.0  # a holder on another host that gave none for so long is gone


class RunLock:
    """Holds a run folder while the `with` block runs. Rank 0 takes it for all ranks.

    The holder writes its host, process and start into the file, and touches the file while it lives. A lock of a process on
    this host that has ended is taken over at once. Of another host only the file is seen: its lock is taken over once it has
    not been touched for `SILENT_S`. Clocks are not compared: silence is measured by this host's own.

    Args:
        path: the file; its folder exists.
        say: called with a line before it waits.

    Raises:
        ConfigError: on entry, another process holds the folder.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self.path, self.say = Path(path), say
        self._mine = uuid.uuid4().hex
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        while not self._create():
            holder = self._read()
            if holder is not None and not self._is_gone(holder):
                raise ConfigError(
                    f"{self.path.parent} is in use: process {holder.get('pid')} on {holder.get('host')} trains it since "
                    f"{holder.get('since')}. Stop that process, or give this run a run_dir of its own"
                )
            self._remove(holder)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        holder = self._read()
        if holder is not None and holder.get("id") == self._mine:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the file, whole, if there is none: a link to a finished file is made or refused in one operation."""
        process = psutil.Process()
        record = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "id": self._mine,
        }
        draft = self.path.with_name(f"{self.path.name}.{self._mine}")
        draft.write_text(json.dumps(record) + "\n", encoding="utf-8")
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return self._create_exclusively(record)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _create_exclusively(self, record: dict[str, Any]) -> bool:
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        """What the file says; None if there is none, an empty record if it cannot be read."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except BAD_JSON:
            return {}
        return found if isinstance(found, dict) else {}

    def _is_gone(self, holder: dict[str, Any]) -> bool:
        """Whether the holder has ended. One on another host is watched until it gives a sign or is silent for SILENT_S."""
        if holder.get("host") == socket.gethostname():
            try:
                return psutil.Process(int(holder["pid"])).create_time() != holder["started"]
            except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
                return True
        self.say(
            f"{self.path}: is of process {holder.get('pid')} on {holder.get('host')}; watching for {SILENT_S:.0f} s "
            "whether it still lives"
        )
        before, until = self._touched(), time.monotonic() + SILENT_S
        while time.monotonic() < until:
            if self._touched() != before:
                return self._touched() is None  # taken away: the holder has ended
            time.sleep(0.2)
        return True

    def _touched(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _remove(self, holder: dict[str, Any] | None) -> None:
        """Take away the lock of a holder that is gone. If another process was faster, its lock is put back."""
        aside = self.path.with_name(f"{self.path.name}.{self._mine}.gone")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if RunLock(aside)._read() != holder:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the folder's own writers say what is wrong with it
                os.utime(self.path)
