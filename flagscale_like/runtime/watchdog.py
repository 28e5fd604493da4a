"""Notices a rank that makes no progress, or cannot stop when told to; leaves every rank's stack behind; ends the job.

A thread of each rank compares the time of the rank's last sign of life with a limit. Collectives are of no use once a rank
hangs, so the ranks meet in a folder that all see: who runs out of time first asks there, every rank's thread answers with a
report, and all end. The launcher then starts them again (`--max-restarts`), and they go on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from flagscale_like.errors import HangError

POLL_S = 0.5
ANSWER_S = 5.0
QUIET_S = 10.0
REQUEST = "asked"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal is gone, as when ssh is lost
AGAIN_S = (
    1.0  # Ctrl-C this long after the first signal is a second one; torchrun passes one on that the terminal sent, too
)


class Watchdog:
    """Watches this rank while its `with` block lasts, and takes STOP_SIGNALS meanwhile.

    Args:
        folder: where the reports go; on a file system that all ranks see.
        first_timeout_s, timeout_s: longest time from a beat to the next, if that phase is slow or not; 0 sets no limit.
        grace_s: time from such a signal to the end of the block.

    Attributes:
        asked_to_stop: whether a signal came, or torchrun's agent died, which leaves its ranks running.
        kept: a sentence that says which checkpoint is there if the process ends now.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, *, first_timeout_s: float, timeout_s: float, grace_s: float
    ) -> None:
        self.folder, self.rank, self.world_size = Path(folder), rank, world_size
        self.first_timeout_s, self.timeout_s, self.grace_s = first_timeout_s, timeout_s, grace_s
        self.asked_to_stop, self.kept = False, "No checkpoint was saved"
        self._beat = (time.monotonic(), 0, "start", first_timeout_s)
        self._stop_by: float | None = None
        self._ended = threading.Event()
        self._since = time.time()
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> Watchdog:
        if self.rank == 0 and self.folder.is_dir():  # the reports of an earlier start
            at = time.strftime("%Y%m%dT%H%M%S", time.localtime(self.folder.stat().st_mtime))
            self.folder.rename(self.folder.with_name(f"{self.folder.name}-{at}"))
        # The interpreter runs signal handlers between two instructions of the main thread, which may hang inside a
        # collective. It writes the signal's number to this socket at once, and the thread reads it.
        self._wakeup, self._inlet = socket.socketpair()
        self._inlet.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._inlet.fileno(), warn_on_full_buffer=False)
        # A process that was started with nohup goes on after a lost terminal: SIGHUP stays ignored.
        watched = [s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._old_handlers = {s: signal.signal(s, self._on_signal) for s in watched}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._inlet.close()  # wakes the thread
        self._thread.join()
        self._wakeup.close()

    def beat(self, step: int, phase: str, *, slow: bool = False) -> None:
        """A sign of life: steps done, and what this rank does from now on.

        Args:
            slow: the first step, or a save that is waited for.
        """
        self._beat = (time.monotonic(), step, phase, self.first_timeout_s if slow else self.timeout_s)

    def _on_signal(self, number: int, _: object) -> None:
        self.asked_to_stop = True

    def _watch(self) -> None:
        while not self._ended.is_set():
            readable, _, _ = select.select([self._wakeup], [], [], POLL_S)
            if readable:
                self._heed(set(self._wakeup.recv(64)))
            if self._ended.is_set():
                return
            if self._agent not in (None, os.getppid()):
                print(f"rank {self.rank}: the launcher has died: saving and stopping", file=sys.stderr, flush=True)
                self._agent, self.asked_to_stop, self._stop_by = None, True, time.monotonic() + self.grace_s
            now, (last, step, phase, limit_s) = time.monotonic(), self._beat
            if self._stop_by is not None and now > self._stop_by:
                self._report()
                self._end(
                    f"asked to stop, and {self.grace_s:g} s later (resilience.grace_s) not done: "
                    f"{phase}, last step done {step}. {self.kept}",
                    128 + signal.SIGTERM,
                )
            quiet_s = now - last
            # A healthy job, whose ranks all beat, does not touch the shared folder.
            if limit_s and (quiet_s > limit_s or (quiet_s > min(limit_s / 2, QUIET_S) and self._asked())):
                self._ask()
                self._report()
                self._conclude()

    def _heed(self, numbers: set[int]) -> None:
        """The first signal asks for a stop after the step. Ctrl-C once more ends the run at once."""
        asked = sorted(numbers & set(self._old_handlers))
        if not asked:
            return
        now = time.monotonic()
        if self._stop_by is None:
            self._stop_by = now + self.grace_s
            if self.rank == 0:
                text = f"{signal.Signals(asked[0]).name}: stopping after this step, within {self.grace_s:g} s"
                if asked[0] == signal.SIGINT:
                    text += "; Ctrl-C again stops now and saves nothing"
                print(text, file=sys.stderr, flush=True)
        elif signal.SIGINT in asked and now - (self._stop_by - self.grace_s) > AGAIN_S:
            self._end(f"stopped at once. {self.kept}" if self.rank == 0 else None, 128 + signal.SIGINT)

    def _asked(self) -> bool:
        try:
            return (self.folder / REQUEST).stat().st_mtime >= self._since - 1
        except OSError:
            return False

    def _ask(self) -> None:
        with contextlib.suppress(OSError):  # the other ranks have the same limit
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / REQUEST).touch()

    def _report(self) -> None:
        last, step, phase, _ = self._beat
        path = self.folder / f"rank_{self.rank:05d}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as file:
                file.write(f"rank {self.rank}: {time.monotonic() - last:.0f} s in: {phase}, last step done {step}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            os.replace(path.with_suffix(".tmp"), path)
        except OSError as error:
            print(f"rank {self.rank}: {path}: {error.strerror}; its stack:", file=sys.stderr)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _conclude(self) -> None:
        """Wait for the other ranks' reports, say what they say, end."""
        paths = {rank: self.folder / f"rank_{rank:05d}.txt" for rank in range(self.world_size)}
        until = time.monotonic() + ANSWER_S
        while time.monotonic() < until and not all(path.exists() for path in paths.values()):
            time.sleep(0.1)
        lines = []
        for rank, path in paths.items():
            try:
                lines.append(path.read_text(encoding="utf-8").partition("\n")[0])
            except OSError:
                lines.append(f"rank {rank}: no answer")
        speaker = next((rank for rank, path in paths.items() if path.exists()), self.rank)
        message = f"a rank makes no progress; stacks in {self.folder}. " + "; ".join(lines)
        self._end(message if speaker == self.rank else None, HangError.exit_code)

    def _end(self, message: str | None, code: int) -> None:
        if message is not None:
            print(f"error (rank {self.rank}): {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # the launcher ends the others when the first is gone: let the one that speaks be heard
        os._exit(code)
