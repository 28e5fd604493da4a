"""The command line. Each command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
import time

# Each module adds its commands to the application; --help lists them in this order.
# isort: off
from flagscale_like.cli import init, train, report, plan, bench, data, convert, model, ckpt, doctor  # noqa: F401

# isort: on
from flagscale_like.cli.base import app
from flagscale_like.errors import PeerLostError, UserError


def main() -> None:
    """Run the command line. A UserError is one line on stderr and its own exit code; anything else is a traceback."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        app()
    except UserError as error:
        if rank or isinstance(error, PeerLostError):
            # Rank 0 usually has the same error, and a lost rank its own: let it speak alone. torchrun then ends this one.
            time.sleep(2.0)
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not sys.exit: process groups would wait at exit for ranks that are inside a collective.
        os._exit(error.exit_code)
