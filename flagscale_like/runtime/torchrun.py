"""torchrun, whose end is the failed rank's one line and exit code: `python -m flagscale_like.runtime.torchrun ...`.

It takes torchrun's options and starts torchrun's agent. torchrun itself ends with a traceback of the agent and a table of
the ranks, below which the line that a rank has printed is hard to find, and always with exit code 1.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from flagscale_like.runtime.launch import Failure


def main() -> int:
    """Run torchrun's agent with the options of the command line.

    Returns:
        0, or the exit code of the rank of this node that failed first; 128 + n where signal n ended it or the agent.
    """
    # It logs that a rank failed, which is said here, and that it ends the others.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run(parse_args(None))
    except ChildFailedError as error:
        failure = Failure.of(error)
        print(f"error: {failure.describe()}", file=sys.stderr)
        return failure.exit_code
    except SignalException as stopped:
        print(f"{stopped.sigval.name}: the ranks of this node have ended", file=sys.stderr)
        return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
