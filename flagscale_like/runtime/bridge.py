"""A bridge between two worlds of ranks that one launch started: each has process groups of its own, and they send messages.

The ranks of the launch are divided by their numbers: the last ones are apart. Inside of a world nothing knows of the other
one. Messages go by host memory, over gloo.
"""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flagscale_like.errors import PeerLostError

LENGTH, CONTENT, TENSOR = 1, 2, 3  # tags of a message's parts


class Bridge:
    """This rank's end of the bridge. Ranks are numbered as the launch numbers them.

    Args:
        apart: how many ranks, the last ones, are a world of their own.

    Attributes:
        is_apart: whether this rank is one of them.
        rank, size: this rank among all of the launch, and how many they are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, apart: int, timeout_s: float) -> None:
        self.rank, self.size, self.first_apart = rank, size, size - apart
        self.is_apart = rank >= self.first_apart
        # Any: torch's stub has no send, recv and allgather of it.
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=timeout_s))

    @property
    def world(self) -> tuple[int, int]:
        """This rank's number in its own world, and the size of that."""
        first = self.first_apart if self.is_apart else 0
        return self.rank - first, (self.size if self.is_apart else self.first_apart) - first

    def send(self, value: Any, to: int) -> None:
        """Send any picklable object to a rank; waits until it is taken."""
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self._wait(self._group.send([torch.tensor([len(content)])], to, LENGTH))
        self._wait(self._group.send([content], to, CONTENT))

    def receive(self, of: int) -> Any:
        """The object that a rank sends."""
        length = torch.zeros(1, dtype=torch.long)
        self._wait(self._group.recv([length], of, LENGTH))
        content = torch.empty(int(length), dtype=torch.uint8)
        self._wait(self._group.recv([content], of, CONTENT))
        return pickle.loads(content.numpy().tobytes())  # of a rank of this launch

    def send_tensors(self, tensors: Iterable[Tensor], to: int) -> None:
        """Send tensors to a rank that receives as many, of the same shapes."""
        for tensor in tensors:
            self._wait(self._group.send([_on_host(tensor)], to, TENSOR))

    def receive_tensors(self, tensors: Iterable[Tensor], of: int) -> None:
        """Fill tensors with those that a rank sends, bit for bit."""
        for tensor in tensors:
            taken = torch.empty_like(_on_host(tensor))
            self._wait(self._group.recv([taken], of, TENSOR))
            tensor.detach().copy_(taken.view(tensor.dtype).view(tensor.shape))

    def places(self, place: tuple[int, int, int]) -> dict[int, tuple[int, int, int]]:
        """Every rank's place in its own world, by its number in the launch. All ranks of both worlds call it.

        Args:
            place: this rank's copy of the model, tensor-parallel rank and stage.
        """
        own = torch.tensor(place)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(self._group.allgather([found], [own]))
        return {rank: tuple(one.tolist()) for rank, one in enumerate(found)}

    @staticmethod
    def _wait(work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerLostError(f"the other world of this launch has ended: {str(error).splitlines()[0]}") from error


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor's bytes on the host, flat."""
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
