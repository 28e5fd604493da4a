"""Activation offload: saved activations wait for their backward pass in host memory.

In 1F1B stage i of p holds p - i micro-batches in flight, so the first stages run out of memory first, while what they hold
only waits. A share of it goes to (pinned) host memory on a side stream and comes back, one layer ahead of the backward pass,
on another (Baichuan 3's technical report; the mechanism is torch.autograd.graph.saved_tensors_hooks).

    forward of layer i     pack():   copy out; the device's copy lives until layer i + 2, when compute waits for the copy
    backward of layer i    unpack(): first use starts layer i - 1's copies in, or the next micro-batch's last layer's

Which layers: the first ones of a chunk, because their backward pass comes last and the copies have longest to hide. Of a
share f of L layers, the first f L move whole, one moves in part, and the rest stay.

What stays on the device, whatever the share:
- parameters and views of their buffers (optimizer and DDP hold them anyway, and autograd wants the object itself),
- what several layers save (rotary tables): it would be moved once a layer and freed by none,
- a stage's input, which the pipeline schedule holds until the backward pass,
- small tensors, and everything outside the layers (loss, logits, final norm): needed at once.
The schedule empties an output (`out.data = ...`) after it was sent; hence copies are made from `t.detach()`, which has a
storage pointer of its own. megatron-core's CheckpointWithoutOutput frees storages under autograd's feet and is refused.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from flagscale_like.config import RunConfig
from flagscale_like.errors import required
from flagscale_like.model.build import LanguageModel
from flagscale_like.model.modules import in_backward
from flagscale_like.planner.memory import LAYERS_ON_THE_WAY
from flagscale_like.planner.search import Goal, configured_layout
from flagscale_like.runtime.copies import CopyStream, HostPool
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.platforms import Platform
from flagscale_like.runtime.storage import is_plain, memory_of


@dataclass
class OffloadStats:
    """Counts since the last reset. `tensors` and bytes_out are distinct copies out; `reused` were still on the device.

    Attributes:
        bytes_kept: of layer activations that stayed.
        prefetched: copies in that had been started before they were needed; `late` ones had not.
    """

    tensors: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    bytes_kept: int = 0
    prefetched: int = 0
    late: int = 0
    reused: int = 0


class _Pass:
    """One forward pass of one chunk: its layers' groups, by layer."""

    __slots__ = ("__weakref__", "groups", "index", "started")

    def __init__(self, index: int, layers: int) -> None:
        self.index, self.started = index, False
        self.groups = [_Group(self, layer) for layer in range(layers)]


class _Group:
    """What one layer saved in one pass. Handles keep the pass alive, not the other way round."""

    __slots__ = ("handles", "layer", "pass_ref", "started")

    def __init__(self, owner: _Pass, layer: int) -> None:
        self.handles: list[weakref.ref[_Handle]] = []
        self.layer, self.started, self.pass_ref = layer, False, weakref.ref(owner)

    def alive(self) -> list[_Handle]:
        return [handle for ref in self.handles if (handle := ref()) is not None]


class _Handle:
    """Bytes in a host buffer. Dies with the last graph node that saved them, and gives the buffer back.

    A strided view is packed without its gaps on the host, and gets them again on the device: kernels choose their order of
    summation by strides, and gradients are to be the same bits.
    """

    __slots__ = (
        "__weakref__",
        "buffer",
        "dense",
        "dtype",
        "group",
        "incoming",
        "loaded",
        "nbytes",
        "owner",
        "pool",
        "shape",
        "source",
        "stride",
        "ticket_in",
        "ticket_out",
    )

    def __init__(self, tensor: Tensor, group: _Group, owner: _Pass, pool: HostPool, *, dense: bool) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.dense = dense
        self.nbytes = tensor.numel() * tensor.element_size()
        self.group, self.owner, self.pool = group, owner, pool
        self.source: Tensor | None = tensor
        self.loaded: Tensor | None = None
        self.incoming: CopyStream | None = None  # while a copy in is under way that compute has not waited for
        self.ticket_in = self.ticket_out = None
        self.buffer: Tensor | None = None

    def arrive(self) -> None:
        """Make compute wait for the copy in; also before `loaded` is freed, whose memory compute uses again."""
        if self.incoming is not None:
            self.incoming.wait(self.ticket_in)
            self.incoming = None

    def host(self) -> Tensor:
        flat = required(self.buffer, "buffer")[: self.nbytes].view(self.dtype)
        return torch.as_strided(flat, self.shape, self.stride) if self.dense else flat.view(self.shape)

    def __del__(self) -> None:
        self.arrive()
        if self.buffer is not None:
            self.pool.put(self.buffer, self.ticket_in if self.ticket_in is not None else self.ticket_out)


@dataclass(frozen=True)
class _Saved:
    """What autograd holds instead of a tensor: the handle, and the view that was saved of it."""

    handle: _Handle
    shape: torch.Size
    stride: tuple[int, ...]


class ActivationOffload:
    """Moves a share of the activations of this rank's chunks to host memory. One object serves all chunks of a stage.

    Args:
        share: of the layers' saved bytes, 0 to 1.
        min_tensor_bytes: smaller tensors stay on the device.
    """

    def __init__(self, platform: Platform, *, share: float, min_tensor_bytes: int) -> None:
        self.share, self.min_tensor_bytes = share, min_tensor_bytes
        self.stats = OffloadStats()
        self.pool = HostPool(platform)
        self._device = platform.device
        self._out, self._in = CopyStream(platform), CopyStream(platform)
        self._leaving: deque[tuple[int, weakref.ref[_Handle]]] = deque()
        self._layers_begun = 0
        self._in_flight: list[weakref.ref[_Pass]] = []
        self._forward_count, self._order, self._last_order = 0, [], []
        self._group: _Group | None = None
        self._pass: _Pass | None = None
        self._quota = self._credit = 0.0
        self._fixed: set[int] = set()
        self._seen: dict[tuple, weakref.ref[_Handle]] = {}
        self._by_storage: dict[int, tuple[int, StorageWeakRef]] = {}
        self._constants: dict[int, StorageWeakRef] = {}

    def attach(self, decoder: TransformerBlock, config: TransformerConfig) -> None:
        """Watch a TransformerBlock's forward passes, through forward hooks: its layers and their order are as they were.

        Identity autograd functions or full backward hooks would make the block's output a view, which the pipeline
        schedule refuses to empty.
        """
        drops = set(config.recompute_modules or ()) - {"core_attn"}
        assert config.recompute_granularity != "selective" or not drops, f"offload cannot see {drops} being recomputed"
        layers = len(decoder.layers)
        contexts: list[Any] = []

        def begin(module: nn.Module, _: Any) -> None:
            if self.share > 0 and torch.is_grad_enabled() and not in_backward():
                self._begin_pass(module, layers)
                contexts.append(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
                contexts[-1].__enter__()

        def end(*_: Any) -> None:
            if contexts:
                contexts.pop().__exit__(None, None, None)
                self._end_pass()

        decoder.register_forward_pre_hook(begin)
        decoder.register_forward_hook(end, always_call=True)
        for index, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._begin_layer(index, layers))
        if decoder.final_layernorm is not None:
            decoder.final_layernorm.register_forward_pre_hook(lambda *_: self._leave_layers())

    def _begin_pass(self, decoder: nn.Module, layers: int) -> None:
        alive = [ref for ref in self._in_flight if ref() is not None]
        if not alive:  # a new step: what was learnt about the order of backward passes holds for it
            self._last_order, self._order, self._forward_count = self._order, [], 0
        self._pass = _Pass(self._forward_count, layers)
        self._forward_count += 1
        self._in_flight = [*alive, weakref.ref(self._pass)]
        # Under full recompute a layer's input is saved by the checkpoint around the layer.
        self._fixed = {memory_of(p) for p in decoder.parameters()}
        if isinstance(decoder.input_tensor, Tensor):
            self._fixed.add(memory_of(decoder.input_tensor))
        self._by_storage = {}

    def _end_pass(self) -> None:
        self._pass = self._group = None
        self._seen, self._by_storage = {}, {}

    def _begin_layer(self, index: int, layers: int) -> None:
        if self._pass is None:  # evaluation, or a layer that is recomputed inside the backward pass
            return
        self._layers_begun += 1
        while self._leaving and self._leaving[0][0] <= self._layers_begun - LAYERS_ON_THE_WAY:
            self._release(self._leaving.popleft()[1]())
        self._group = self._pass.groups[index]
        self._quota = min(1.0, max(0.0, self.share * layers - index))
        self._credit, self._seen = 0.0, {}

    def _leave_layers(self) -> None:
        self._group = None

    def _release(self, handle: _Handle | None) -> None:
        """Let the device copy go, after the copy out: compute that reuses its memory is queued behind the copy."""
        if handle is not None and handle.source is not None:
            self._out.wait(handle.ticket_out)
            handle.source = None

    def _stays(self, layer: int, tensor: Tensor, nbytes: int) -> bool:
        """Whether a tensor that this layer saves is left on the device."""
        storage, pointer = tensor.untyped_storage(), memory_of(tensor)
        if isinstance(tensor, nn.Parameter) or pointer in self._fixed:
            return True
        if not is_plain(tensor) or tensor.device.type != self._device.type or nbytes < self.min_tensor_bytes:
            return True
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            return True  # expanded: the memory behind it is smaller than it looks, and cannot be written as a whole
        known = self._constants.get(pointer)
        if known is not None and not known.expired():
            return True
        first, weak = self._by_storage.setdefault(pointer, (layer, StorageWeakRef(storage)))
        if first != layer:
            if not weak.expired():
                self._constants[pointer] = weak
                return True
            self._by_storage[pointer] = (layer, StorageWeakRef(storage))
        return False

    def _pack(self, tensor: Tensor) -> Any:
        group, nbytes = self._group, tensor.numel() * tensor.element_size()
        if group is None or self._stays(group.layer, tensor, nbytes):
            return tensor
        shape, stride = tensor.shape, tensor.stride()
        dense = _is_dense(tensor)
        where = (memory_of(tensor), tensor.storage_offset(), tensor.dtype, tensor._version)
        key = (*where, nbytes) if dense else (*where, shape, stride)
        if (ref := self._seen.get(key)) is not None and (handle := ref()) is not None:
            return _Saved(handle, shape, stride)
        # Error diffusion: over a layer the moved bytes come to its quota, to within one tensor.
        self._credit += self._quota * nbytes
        if self._credit < nbytes * (1 - 1e-9):
            self.stats.bytes_kept += nbytes
            return tensor
        self._credit -= nbytes
        source = tensor.detach()
        handle = _Handle(source, group, required(self._pass, "pass"), self.pool, dense=dense)
        handle.buffer, last_reader = self.pool.get(nbytes)
        handle.ticket_out = self._out.copy(handle.host(), source, after=last_reader)
        group.handles.append(weakref.ref(handle))
        self._leaving.append((self._layers_begun, weakref.ref(handle)))
        self._seen[key] = weakref.ref(handle)
        self.stats.tensors += 1
        self.stats.bytes_out += nbytes
        return _Saved(handle, shape, stride)

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        handle = saved.handle
        early = handle.loaded is not None
        if not handle.group.started:
            self._start_backward(handle.group)
        if handle.source is not None:  # still on its way out
            self.stats.reused += 1
            tensor = handle.source
        else:
            if handle.loaded is None:
                self._load(handle)
            handle.arrive()
            self.stats.prefetched += early
            self.stats.late += not early
            tensor = handle.loaded
        return torch.as_strided(tensor, saved.shape, saved.stride, tensor.storage_offset())

    def _load(self, handle: _Handle) -> None:
        if handle.source is not None or handle.loaded is not None:
            return
        handle.loaded = torch.empty_strided(handle.shape, handle.stride, dtype=handle.dtype, device=self._device)
        handle.ticket_in = self._in.copy(handle.loaded, handle.host(), after=handle.ticket_out)
        handle.incoming = self._in
        self.stats.bytes_in += handle.nbytes

    def _start_backward(self, group: _Group) -> None:
        """First use of a layer's tensors: bring in the rest of them and those that are needed next, last saved first."""
        group.started = True
        owner = required(group.pass_ref(), "pass")  # a handle of the group keeps it alive
        if not owner.started:
            owner.started = True
            self._order.append(owner.index)
        for handle in reversed(group.alive()):
            self._load(handle)
        ahead = next((g for g in reversed(owner.groups[: group.layer]) if g.handles), None)
        if ahead is None and (following := self._next_pass(owner)) is not None:
            ahead = next((g for g in reversed(following.groups) if g.handles), None)
        if ahead is not None:
            for handle in reversed(ahead.alive()):
                self._load(handle)

    def _next_pass(self, owner: _Pass) -> _Pass | None:
        """Whose backward pass comes next: as in the step before; in the first step, the oldest's, which is 1F1B's order."""
        waiting = [p for ref in self._in_flight if (p := ref()) is not None and not p.started]
        if owner.index in self._last_order[:-1]:
            following = self._last_order[self._last_order.index(owner.index) + 1]
            return next((p for p in waiting if p.index == following), None)
        return waiting[0] if waiting else None

    def report(self) -> dict[str, float]:
        """Statistics since the last report, with seconds of copies hidden and exposed. Waits for the device."""
        out, in_ = self._out.times(), self._in.times()
        found = {
            **asdict(self.stats),
            "host_bytes": self.pool.total_bytes,
            "copy_s": out.copy_s + in_.copy_s,
            "hidden_s": out.hidden_s + in_.hidden_s,
            "exposed_s": out.exposed_s + in_.exposed_s,
        }
        self.stats = replace(OffloadStats())
        return found


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their range of the storage, in whatever order: then they copy as one block."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def attach_offload(
    models: Sequence[LanguageModel], config: RunConfig, ctx: ParallelContext
) -> ActivationOffload | None:
    """Offload as configured, over all of this stage's chunks; None where `offload` is not configured.

    `share: auto` is resolved by the planner: the least share that fits the GPU; on a CPU all but one micro-batch's.
    """
    if config.offload is None:
        return None
    hbm_bytes = ctx.platform.total_memory_bytes() if ctx.platform.counts_device_memory else None
    layout = configured_layout(config, ctx.world_size, Goal.of(config, cuda=ctx.platform.triton), hbm_bytes)
    offload = ActivationOffload(
        ctx.platform,
        share=layout.offload_share(ctx.pp_rank),
        min_tensor_bytes=config.offload.min_tensor_bytes,
    )
    for model in models:
        offload.attach(model.decoder, model.config)
        if ctx.replicas > 1:
            return_weight_gradients(model.decoder)
    return offload


def return_weight_gradients(module: nn.Module) -> None:
    """Let the linears inside return their weight's gradient, and not add it to main_grad by themselves.

    megatron-core marks that it has added one on the weight that its backward pass finds. Saved-tensor hooks give it another
    object than the parameter, and DistributedDataParallel then refuses the gradient that is missing where it reduces
    gradients during the backward pass.
    """
    for linear in module.modules():
        if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            linear.gradient_accumulation_fusion = False
