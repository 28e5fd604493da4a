"""Copies of device tensors in host memory, made beside the compute and into the same buffers each time."""

from __future__ import annotations

import torch
from torch import Tensor

from flagscale_like.runtime.platforms import Platform


class HostCopies:
    """A round of copies: `begin`, `copy` of each tensor, `end`. Then

    - `wait` returns when the copies are there; any thread may call it;
    - `hold_compute` must come before the sources are overwritten; it stops the device's compute queue, not the caller.

    Where there are streams, the copies run on one of their own, so that `begin` to `end` takes the time to enqueue them.
    Elsewhere each `copy` is complete when it returns.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._stream = platform.side_stream()
        self._event: torch.Event | None = None
        self._buffers: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Start a round. The copies see what the compute that is enqueued so far leaves."""
        self.wait()
        if self._stream is not None:
            self._stream.wait_stream(self._platform.compute_stream())

    def copy(self, name: str, source: Tensor) -> Tensor:
        """The host buffer of this name, which receives `source`; made anew where shape or dtype changed."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = self._platform.host_buffer(source.numel(), source.dtype).view(source.shape)
            self._buffers[name] = buffer
        with self._platform.on_stream(self._stream):
            return buffer.copy_(source, non_blocking=True)

    def end(self) -> None:
        """End a round."""
        if self._stream is not None:
            self._event = self._stream.record_event()

    def wait(self) -> None:
        """Until the copies of the last round are complete."""
        if self._event is not None:
            self._event.synchronize()

    def hold_compute(self) -> None:
        """Let what is enqueued next start only after the copies."""
        if self._event is not None:
            self._platform.compute_stream().wait_event(self._event)
