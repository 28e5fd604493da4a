"""Launch: what torchrun tells a rank in its environment. Nothing else reads these variables."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from flagscale_like.errors import PlatformError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One of torchrun's ranks.

    Attributes:
        rank, world_size: among all ranks.
        local_rank: among the ranks of this node.
        address, port: where the ranks meet.
        restart, max_restarts: how often torchrun has started the ranks again, and how often it may; 0 without torchrun.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    restart: int = 0
    max_restarts: int = 0

    @property
    def endpoint(self) -> str:
        """HOST:PORT at which the ranks meet."""
        return f"{self.address}:{self.port}"

    def check_address(self) -> None:
        """Resolve the address once: torch would try for minutes.

        Raises:
            PlatformError: the name does not resolve.
        """
        try:
            socket.getaddrinfo(self.address, self.port)
        except OSError as error:
            raise PlatformError(
                f"the ranks cannot meet at {self.endpoint}: {self.address} does not resolve ({error.strerror or error}): "
                "give a name or an address that every node can reach"
            ) from None


def local_rank() -> int:
    """This process's number among the ranks of its node; 0 without torchrun."""
    given = os.environ.get("LOCAL_RANK", "0")
    if not given.isdecimal():
        raise PlatformError(f"the environment has LOCAL_RANK={given}: it must be a number, as torchrun sets it")
    return int(given)


def current_launch() -> Launch | None:
    """The launch that this process is a rank of; None for a process that was started by itself.

    Raises:
        PlatformError: the environment has some of torchrun's variables and not all, or they are no numbers.
    """
    given = {name: os.environ[name] for name in NAMES if name in os.environ}
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(given):
        return None
    missing = [name for name in NAMES if name not in given]
    if missing:
        said = " ".join(f"{name}={value}" for name, value in given.items())
        raise PlatformError(
            f"the environment has {said}, but no {' or '.join(missing)}: start the ranks with torchrun (launch/torchrun.sh), "
            f"which sets them all, or unset {' '.join(given)} to run without it"
        )
    try:
        rank, world, local, port = (int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        counts = (int(os.environ.get(f"TORCHELASTIC_{n}", "0")) for n in ("RESTART_COUNT", "MAX_RESTARTS"))
        launch = Launch(rank, world, local, given["MASTER_ADDR"], port, *counts)
    except ValueError as error:
        raise PlatformError(f"the environment's {', '.join(NAMES)} must be numbers and a host ({error})") from None
    if not 0 <= rank < world or local < 0:
        raise PlatformError(f"the environment has RANK={rank} LOCAL_RANK={local} WORLD_SIZE={world}: no such rank")
    return launch
