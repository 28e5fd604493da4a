"""`flagscale-like train X.yaml` without torchrun: start the ranks of one node; end with their exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

import psutil

from flagscale_like.runtime.platforms import choose, prepared
from flagscale_like.runtime.watchdog import STOP_SIGNALS


def default_processes(model_parallel_size: int) -> int:
    """Ranks to start on this node: one a device, or where they share it as many as hold one copy of the model.

    Raises:
        PlatformError: no platform can be chosen.
    """
    platform = prepared(choose())
    return model_parallel_size if platform.ranks_share_device else platform.count()


def launch(processes: int, arguments: Sequence[str], *, max_restarts: int = 0) -> int:
    """Run `python -m flagscale_like ARGUMENTS` on `processes` ranks of this node through torch's elastic agent.

    The signals that ask for a stop are passed on to the ranks, which save and end by themselves; a second one kills them.

    Returns:
        0, or the exit code of the rank that failed first (128 + n for signal n), after the last restart.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The agent logs a block for every failed rank; the rank itself has said in one line what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.2,
        # The agent's own handler kills the ranks, and its end tells nothing of theirs.
        signals_to_handle="SIGQUIT",
    )
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL if received else number)
        if received:
            raise SystemExit(128 + number)
        received.append(number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        elastic_launch(config, sys.executable)("-m", "flagscale_like", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            name = signal.Signals(-code).name
            cause = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
            print(f"error: rank {rank} was ended by {name}{cause}", file=sys.stderr)
        if max_restarts:
            print(f"error: given up after {max_restarts} restarts (--max-restarts)", file=sys.stderr)
        return code if code > 0 else 128 - code
    return 0
