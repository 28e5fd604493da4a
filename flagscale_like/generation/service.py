"""A thread that draws the texts of requests from many sides in one batch, token by token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Rollout, Sampling
from flagscale_like.generation.schedule import Text


@dataclass(eq=False)
class Request:
    """A prompt whose texts are drawn.

    Attributes:
        tell: called on the engine's thread with the rollout of each text that got a token, and with an error where the engine
            failed. It must not wait.
        texts: the texts, once the engine has taken the request.
    """

    prompt: Prompt
    sampling: Sampling
    tell: Callable[[Rollout | Exception], None]
    texts: list[Text]
    cancelled: bool = False


class Service:
    """Runs an engine on a thread of its own, which nobody else may use meanwhile. Requests join the batch as they come.

    Attributes:
        requests: that were taken so far.
        running, waiting: texts that have a row, and that have none yet, after the last step.
        problem: what ended the thread; None while it runs.
    """

    def __init__(self, own: OwnEngine) -> None:
        self.own, self.requests, self.running, self.waiting = own, 0, 0, 0
        self.problem: Exception | None = None
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._active: dict[Text, Request] = {}
        self._lock = threading.Lock()  # once the engine has ended, nothing comes into the inbox
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; texts under way are dropped."""
        self._inbox.put(None)
        self._thread.join()

    def ask(self, prompt: Prompt, sampling: Sampling, tell: Callable[[Rollout | Exception], None]) -> Request:
        """Let a prompt's texts join the batch. Any thread may call it.

        Raises:
            ConfigError: see OwnEngine.generate().
            RuntimeError: the engine has failed.
        """
        self.own.check(prompt, sampling)
        request = Request(prompt, sampling, tell, [])
        with self._lock:
            if self.problem is not None:
                raise RuntimeError(f"the engine has ended: {self.problem}")
            self._inbox.put(request)
        return request

    def cancel(self, request: Request) -> None:
        """Drop a request's texts, at the next step. Any thread may call it."""
        request.cancelled = True

    def _run(self) -> None:
        try:
            with self.own.forward.ready():
                while self._take():
                    self.own.cancel([text for text, request in self._active.items() if request.cancelled])
                    self._active = {t: request for t, request in self._active.items() if not request.cancelled}
                    for text in self.own.step() if self._active else ():
                        self._active[text].tell(text.rollout)
                        if text.rollout.finish:
                            del self._active[text]
                    self._count()
        except Exception as error:  # whoever waits for an answer has to hear of it
            with self._lock:
                self.problem = error
            waiting = {id(request): request for request in self._active.values()}
            while not self._inbox.empty():
                request = self._inbox.get()
                waiting |= {id(request): request} if request is not None else {}
            for request in waiting.values():
                request.tell(error)
            raise

    def _count(self) -> None:
        self.running = len(self.own.schedule.running)
        self.waiting = self.own.schedule.count - self.running

    def _take(self) -> bool:
        """Take what has come; with nothing to do, wait for it. Returns whether to go on."""
        while True:
            try:
                request = self._inbox.get(block=not self._active)
            except queue.Empty:
                return True
            if request is None:
                return False
            if not request.cancelled:
                self.requests += 1
                request.texts = self.own.add(request.prompt, request.sampling)
                self._active |= dict.fromkeys(request.texts, request)
