"""Computes rows of the benchmark in this process and writes what happens to a pipe, one line of JSON each.

`supervisor.py` starts it: worker.py PIPE, with {"device", "seed", "keys", "until", ...} as JSON on the standard input. The
lines are {"start": key}, {"row": key, "result": ...}, {"done": key} and {"lost": key, "error": ...}, after which the process
ends, because no call to the device succeeds in it any more.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import devices  # noqa: E402
import plan  # noqa: E402

LOST_DEVICE = 75  # exit status


def one_line(error: BaseException) -> str:
    """The class of the error and the first line of its text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def rows_of(order, device):
    """Every row that the order may name, by its key."""
    tiny, parts = device.tiny, order["parts"]
    found = []
    if order["configs"]:
        found += plan.configs(device.name, tiny, parts, order["wide"])
    else:
        found += [*plan.checks(tiny, parts), *plan.timings(device.name, tiny, parts)]
    return {row.key: row for row in found}


def compute(row, device, say):
    """Compute one row; whatever it or the device raises becomes a result. Returns False where the device is lost."""
    say(start=row.key)
    try:
        for result in row.compute(device):
            say(row=row.key, result=result)
    except (Exception, SystemExit) as error:
        say(row=row.key, result={"kind": "failure", "name": row.key, "error": one_line(error)})
    try:
        device.settle()
    except devices.LostDeviceError as error:
        say(lost=row.key, error=one_line(error))
        return False
    say(done=row.key)
    return True


def main():
    order = json.load(sys.stdin)
    with os.fdopen(int(sys.argv[1]), "w") as pipe, contextlib.redirect_stdout(sys.stderr):

        def say(**event):
            pipe.write(json.dumps(event) + "\n")
            pipe.flush()

        seed = order["seed"]
        device = devices.CudaDevice() if seed is None else devices.StandIn(seed, order["hang_seconds"])
        rows = rows_of(order, device)
        for key in order["keys"]:
            if time.time() > order["until"]:
                break
            if not compute(rows[key], device, say):
                sys.exit(LOST_DEVICE)


if __name__ == "__main__":
    main()
