"""The command line. Each command imports its modules when it runs, so that --help does not load torch."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from pathlib import Path

# Each module adds its commands to the application; --help lists them in this order.
# isort: off
from flagscale_like.cli import init, train, report, plan, rehearse, bench, data, groups, convert, model  # noqa: F401
from flagscale_like.cli import generate, serve, embed, score, ckpt, doctor  # noqa: F401

# isort: on
from flagscale_like.cli.base import app
from flagscale_like.errors import PeerLostError, PlatformError, UserError
from flagscale_like.json_files import DISK_ERRORS, write_json


def main() -> None:
    """Run the command line. A UserError is printed as one line and sets the exit code; other exceptions show a traceback."""
    try:
        app()
    except UserError as error:
        _end(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            _fail(error)
            raise
        problem = PlatformError(f"a file cannot be written: {error}")
        for note in getattr(error, "__notes__", ()):
            problem.add_note(note)
        _end(problem)
    except Exception as error:
        _fail(error)
        raise


def _end(error: UserError) -> None:
    """Print the error, a line for each of its notes (what else went wrong while the run was closed), and end the process."""
    rank = _wait_for_others(error)
    where = f" (rank {rank})" if rank else ""
    lines = [f"error{where}: {line}" for line in (str(error), *getattr(error, "__notes__", ()))]
    print("\n".join(lines), file=sys.stderr, flush=True)
    _tell_launcher(str(error), "\n".join(lines))
    sys.stdout.flush()
    # sys.exit would destroy the process groups, which waits for ranks that are inside a collective.
    os._exit(error.exit_code)


def _fail(error: Exception) -> None:
    """Before the traceback of a bug is shown."""
    _wait_for_others(error)
    _tell_launcher(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def _wait_for_others(error: Exception) -> int:
    """Let the rank speak that has the cause; returns this rank.

    Usually rank 0 prints the same error, and a lost rank prints the cause. After the first failure torchrun ends the other
    ranks, within this time, so that the error is printed once.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank or isinstance(error, PeerLostError):
        time.sleep(2.0)
    return rank


def _tell_launcher(message: str, text: str) -> None:
    """Write the error where torchrun looks for it, so that its own summary has the line in place of a traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # the error itself is printed
            write_json(Path(path), {"message": {"message": message, "extraInfo": details}})
