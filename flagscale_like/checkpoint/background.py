"""One function in a thread beside the training loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs `function` at once in a daemon thread, which ends with its process: nothing waits for it at exit.

    A thread and not a process: to fork a process that holds CUDA or gloo state is not safe, a spawned process would have
    to be sent the data, and both can outlive a killed trainer.

    Args:
        name: the thread's name.

    Attributes:
        seconds: how long the function ran, once it is done.
    """

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self.seconds = 0.0
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, args=(function,), name=name, daemon=True).start()

    def _run(self, function: Callable[[], T]) -> None:
        began = time.perf_counter()
        try:
            result = function()
        except Exception as error:  # raised again where the result is asked for
            self.seconds = time.perf_counter() - began
            self._future.set_exception(error)
        else:
            self.seconds = time.perf_counter() - began
            self._future.set_result(result)

    @property
    def done(self) -> bool:
        """Whether the function has returned or raised."""
        return self._future.done()

    def wait(self) -> None:
        """Wait until the function has returned or raised."""
        self._future.exception()

    @property
    def error(self) -> BaseException | None:
        """What the function raised, or None; waits for its end."""
        return self._future.exception()

    def result(self) -> T:
        """Wait for the function's end. Returns what it returned, or raises what it raised."""
        return self._future.result()
