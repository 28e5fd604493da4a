"""Runs rows in processes of their own, and goes on in a fresh one where a row loses the device, dies or hangs."""

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WORKER = Path(__file__).resolve().with_name("worker.py")
GRACE_SECONDS = 5.0  # that a row may take after the end of the time


class Supervisor:
    """Computes the rows `keys` in their order until the time `until` (as time.time()).

    `emit(result)` gets each result as it comes, a failure among them. `limits` has the most seconds of each row. `order` has
    what the worker needs besides: device, parts, configs, wide. Rows that the time does not reach are left in `keys`.
    """

    def __init__(self, keys: list[str], limits: dict[str, float], order: dict, until: float, emit: Callable) -> None:
        self.keys, self.limits, self.order, self.until, self.emit = list(keys), limits, order, until, emit
        self.starts = 0

    def run(self) -> None:
        barren = 0  # processes in a row that began no row
        while self.keys and time.time() < self.until:
            before = len(self.keys)
            ending = self._one_process()
            barren = 0 if len(self.keys) < before else barren + 1
            if barren == 2:  # it cannot even be imported
                for key in self.keys:
                    self.emit({"kind": "failure", "name": key, "error": f"no process could compute it: {ending}"})
                self.keys.clear()
            elif self.keys and time.time() < self.until:
                self.emit({"kind": "note", "text": f"{ending}: a fresh process takes the other {len(self.keys)} rows"})

    def _one_process(self):
        """Let one process compute rows. Returns why it ended."""
        read, write = os.pipe()
        order = self.order | {"keys": self.keys, "until": self.until}
        if order["seed"] is not None:
            order["seed"] += self.starts
        self.starts += 1
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(write)], stdin=subprocess.PIPE, stdout=sys.stderr, pass_fds=(write,)
        )
        os.close(write)
        try:
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
        except BrokenPipeError:  # it ended before it read: its exit status says so below
            pass
        try:
            with os.fdopen(read, "rb", buffering=0) as pipe:
                return self._follow(process, pipe)
        finally:
            process.kill()
            process.wait()

    def _follow(self, process, pipe):
        """Read the process's lines until it ends, loses the device, or a row takes too long."""
        current, started, rest = None, time.time(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                limit = self.limits[current] if current else 180.0  # to import
                left = min(started + limit, self.until + GRACE_SECONDS) - time.time()
                if left <= 0 or not selector.select(left):
                    out_of_time = time.time() >= self.until
                    why = "the time is up" if out_of_time else f"it took more than {limit:.0f} s"
                    return self._give_up(current, why)
                data = pipe.read(1 << 16)
                if not data:
                    status = process.wait()
                    return self._give_up(current, f"its process ended with status {status}") if current else (
                        f"a process ended with status {status}")  # fmt: skip
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if "start" in event:
                        current, started = event["start"], time.time()
                    elif "row" in event:
                        self.emit(event["result"])
                    elif "done" in event:
                        self.keys.remove(event["done"])
                        current, started = None, time.time()
                    elif "lost" in event:
                        self.keys.remove(event["lost"])
                        return f"{event['lost']} lost the device ({event['error']})"

    def _give_up(self, key, why):
        if key is not None:
            self.keys.remove(key)
            self.emit({"kind": "failure", "name": key, "error": why})
        return f"{key}: {why}" if key else why
