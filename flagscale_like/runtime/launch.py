"""`flagscale-like train X.yaml` without torchrun: start the ranks of one node; end with their exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from flagscale_like.errors import PeerLostError
from flagscale_like.runtime.platforms import choose, prepared
from flagscale_like.runtime.watchdog import STOP_SIGNALS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def default_processes(model_parallel_size: int) -> int:
    """Ranks to start on this node: one a device, or where they share it as many as hold one copy of the model.

    Raises:
        PlatformError: no platform can be chosen.
    """
    platform = prepared(choose())
    return model_parallel_size if platform.ranks_share_device else platform.count()


def launch(processes: int, arguments: Sequence[str], *, max_restarts: int = 0) -> int:
    """Run `python -m flagscale_like ARGUMENTS` on `processes` ranks of this node through torch's elastic agent.

    If a rank fails, all ranks are started again, `max_restarts` times at most, and one line says why. The signals that ask
    for a stop are passed on to the ranks, which save and end by themselves; a second one kills them.

    Returns:
        0, or the exit code of the rank that failed first (128 + n for signal n), after the last restart.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The agent logs a block for every failed rank; the rank itself has said in one line what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
    for restart in range(max_restarts + 1):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            # The agent's own handler kills the ranks, and its end tells nothing of theirs.
            signals_to_handle="SIGQUIT",
        )
        try:
            elastic_launch(config, sys.executable)("-m", "flagscale_like", *arguments)
            return 0
        except ChildFailedError as error:
            failure = Failure.of(error)
        if received or restart == max_restarts:
            break
        print(f"restarting all ranks ({restart + 1} of {max_restarts}): {failure.describe()}", file=sys.stderr)
    if failure.signal or max_restarts:
        print(f"error: {failure.describe()}", file=sys.stderr)
    if max_restarts and not received:
        print(f"error: given up after {max_restarts} restarts (--max-restarts)", file=sys.stderr)
    return failure.exit_code


@dataclass(frozen=True)
class Failure:
    """How the rank ended that all others ended after.

    Attributes:
        code: as the agent has it: an exit code, or -n for signal n.
    """

    rank: int
    code: int

    @classmethod
    def of(cls, error: ChildFailedError) -> Failure:
        """The first failure that is no consequence of another: a lost peer's, or the agent's own SIGTERM."""
        consequences = (PeerLostError.exit_code, -signal.SIGTERM)
        first = min(
            error.failures.items(), key=lambda item: (item[1].exitcode in consequences, item[1].timestamp, item[0])
        )
        return cls(first[0], first[1].exitcode)

    @property
    def signal(self) -> int:
        """The signal that ended the rank; 0 for none."""
        return max(0, -self.code)

    @property
    def exit_code(self) -> int:
        """What a shell would give: 128 + n for signal n."""
        return 128 + self.signal if self.signal else self.code

    def describe(self) -> str:
        """In words, without what the rank itself has said."""
        if not self.signal:
            return f"rank {self.rank} ended with exit code {self.code}; its error is above"
        name = signal.Signals(self.signal).name
        cause = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"rank {self.rank} was ended by {name}{cause}"
