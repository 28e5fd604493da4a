"""The command line. Each command imports its modules when it runs, so that --help does not load torch."""

from __future__ import annotations

import os
import sys
import time

# Each module adds its commands to the application; --help lists them in this order.
# isort: off
from flagscale_like.cli import init, train, report, plan, bench, data, groups, convert, model, embed  # noqa: F401
from flagscale_like.cli import score, ckpt, doctor  # noqa: F401

# isort: on
from flagscale_like.cli.base import app
from flagscale_like.errors import PeerLostError, PlatformError, UserError
from flagscale_like.json_files import DISK_ERRORS


def main() -> None:
    """Run the command line. A UserError is printed as one line and sets the exit code; other exceptions show a traceback."""
    try:
        app()
    except UserError as error:
        _end(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        problem = PlatformError(f"a file cannot be written: {error}")
        for note in getattr(error, "__notes__", ()):
            problem.add_note(note)
        _end(problem)


def _end(error: UserError) -> None:
    """Print the error, a line for each of its notes (what else went wrong while the run was closed), and end the process."""
    rank = int(os.environ.get("RANK", "0"))
    if rank or isinstance(error, PeerLostError):
        # Usually rank 0 prints the same error, and a lost rank prints the cause. After the first failure torchrun ends
        # the other ranks, within this time, so that the error is printed once.
        time.sleep(2.0)
    where = f" (rank {rank})" if rank else ""
    for line in (str(error), *getattr(error, "__notes__", ())):
        print(f"error{where}: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # sys.exit would destroy the process groups, which waits for ranks that are inside a collective.
    os._exit(error.exit_code)
