"""run_ranks names the rank that is at fault, whichever is heard first."""

import os
import signal
import time

import pytest

from flagscale_like.errors import PeerLostError
from tests import harness
from tests.harness import run_ranks


def die_after_the_peer_noticed():
    if os.environ["RANK"] == "1":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    raise PeerLostError("the other has ended")


def fail_after_the_peer_noticed():
    if os.environ["RANK"] == "1":
        time.sleep(0.3)
        raise ValueError("wrong")
    raise PeerLostError("the other has ended")


def fail_while_the_peer_hangs():
    if os.environ["RANK"] == "1":
        time.sleep(600)
    raise ValueError("wrong")


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (die_after_the_peer_noticed, f"rank 1: died (exit code -{int(signal.SIGKILL)})\nrank 0: Traceback"),
        (fail_after_the_peer_noticed, "rank 1: Traceback"),
        (fail_while_the_peer_hangs, "rank 0: Traceback"),
    ],
)
def test_the_rank_at_fault_is_named_first(function, first, monkeypatch):
    if function is fail_while_the_peer_hangs:
        monkeypatch.setattr(harness, "AFTER_A_FAILURE_S", 0.5)
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, function, timeout_s=60)
    assert str(caught.value).startswith(first)


def test_ranks_that_all_hang_are_named():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 said nothing for 0.5 s"):
        run_ranks(2, time.sleep, 600, timeout_s=0.5)
