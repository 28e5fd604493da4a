"""One function in a thread beside the training loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs `function` at once in a daemon thread: it ends with its process, and nothing waits for it at exit.

    A thread and not a process: a fork of a process that holds CUDA or gloo state is not safe, a spawned one would have
    to be sent the data, and both can outlive a killed trainer.

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
        return self._future.done()

    @property
    def error(self) -> Exception | None:
        """What the function raised; waits for it."""
        return self._future.exception()

    def result(self) -> T:
        """What the function returned, or raises what it raised; waits for it."""
        return self._future.result()
