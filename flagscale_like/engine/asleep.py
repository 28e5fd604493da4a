"""What only training needs, in host memory while an engine does something else: generation, for one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from flagscale_like.engine.engine import Engine
from flagscale_like.runtime.host_copy import HostCopies


class TrainingMemory:
    """Moves an engine's optimizer states out and back, and frees its gradient buffers meanwhile.

    Storages are emptied and filled again, so that whoever holds a view of them still holds it. While they are empty the
    engine refuses to train and to save. The host buffers are made once and kept.

    Args:
        states: whether the optimizer's states move; by default where the device has memory of its own. Gradient buffers are
            freed on every device: between an update and the next step they hold nothing.
    """

    def __init__(self, engine: Engine, *, states: bool | None = None) -> None:
        self.engine, platform = engine, engine.ctx.platform
        self.moves = platform.counts_device_memory if states is None else states
        self._copies = HostCopies(platform)
        self._out: dict[str, tuple[Tensor, Tensor, int]] = {}  # name -> what moved, its copy, bytes of its storage

    def sleep(self) -> int:
        """Call it after an update: gradients are lost.

        Returns:
            Bytes that are free on the device until wake().
        """
        engine = self.engine
        if engine.asleep or engine.optimizer is None:
            return 0
        engine.optimizer.zero_grad()  # views of the buffers
        freed = 0
        for chunk in engine.chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                freed += buffer.grad_data.untyped_storage().nbytes()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # megatron-core asks one for its size
                chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        engine.asleep = True
        return freed + (self._move_out() if self.moves else 0)

    def wake(self) -> None:
        """Bring everything back. Gradients are zero."""
        if not self.engine.asleep:
            return
        for tensor, kept, size in self._out.values():
            tensor.untyped_storage().resize_(size)
            tensor.copy_(kept, non_blocking=True)
        self._out.clear()
        for chunk in self.engine.chunks:
            chunk.restore_grad_buffers(synchronize=False)
        self.engine.asleep = False

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """sleep(), and wake() at the end."""
        self.sleep()
        try:
            yield
        finally:
            self.wake()

    def _move_out(self) -> int:
        self._copies.begin()
        for name, tensor in self._states():
            kept = self._copies.copy(name, tensor)
            self._out[name] = tensor, kept, tensor.untyped_storage().nbytes()
        self._copies.end()
        self._copies.wait()
        for tensor, _, _ in self._out.values():
            tensor.untyped_storage().resize_(0)
        return sum(size for _, _, size in self._out.values())

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        """Master weights with a memory of their own, and moments. A storage that other tensors share stays where it is."""
        for shard in self.engine.owned:
            if not shard.trained:
                continue
            tensors = {"main": shard.main.detach(), **{k: v for k, v in shard.state.items() if isinstance(v, Tensor)}}
            for name, tensor in tensors.items():
                if tensor.numel() > 1 and tensor.untyped_storage().nbytes() == tensor.nbytes:
                    yield f"{shard.name}/{name}", tensor
