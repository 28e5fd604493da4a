"""Context parallelism: core attention over rows of which each rank of the cp group holds a part (runtime.row_cut).

gather (Dubey et al. 2024, section 3.3.2): keys and values are gathered over the group. A rank holds two chunks of queries of
    every row. Each chunk is a call of the plain kernel with the keys before the chunk's end: causal with the last query at
    the last key, so that windows and ALiBi see true distances. Nothing is padded, and nothing of size [s, s] is made. The
    gathered keys and values live during one layer's attention: a rank keeps its own part, and the backward pass gathers
    again and reduce-scatters the gradients.
a2a (DeepSpeed Ulysses: Jacobs et al. 2023): the ranks exchange tokens for heads. Each computes core attention of whole rows
    for its part of the heads; then they exchange back.

Tensors have their tokens in dimension 0: [s/cp, b, heads, d] of rows of one document each, [b * s/cp, heads, d] of a pack.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flagscale_kernels import (
    flash_attention,
    flash_attention_backward,
    piecewise_attention,
    piecewise_attention_backward,
)
from flagscale_like.model.modules import in_backward
from flagscale_like.model.packs import Pack
from flagscale_like.runtime.row_cut import RowCut

HALVES = (0, 1)  # the chunk from a row's front, and its mirror image from the back


@dataclass(frozen=True)
class Call:
    """One call of an attention kernel.

    Attributes:
        queries: of this rank's tokens.
        keys: of the tokens of the whole rows, flat; the last of them is the last query's own.
        documents: cu_seqlens and longest lengths, as flash_attention names them; empty where queries and keys are one
            document.
    """

    queries: slice
    keys: slice
    documents: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a rank computes of a micro-batch's attention.

    Attributes:
        rows: rows of a pack; 1 where the tensors have a batch dimension.
        lengths: tokens of the documents that fill the rows.
        tokens: int64, this rank's tokens, counted over the whole rows; on the device.
        positions: int64, the same tokens, counted in their documents.
        calls: those of the front chunks, and those of the back chunks.
    """

    rows: int
    lengths: tuple[int, ...]
    tokens: Tensor
    positions: Tensor
    calls: tuple[list[Call], list[Call]]


@functools.lru_cache(maxsize=8)
def _tokens_of_row(cut: RowCut, length: int, device: torch.device) -> Tensor:
    return cut.part(torch.arange(length, device=device), 0)


def plan_rows(cut: RowCut, tokens: int, device: torch.device) -> Plan:
    """The plan of rows of one document each.

    Args:
        tokens: of a row, on this rank.
    """
    length = tokens // 2
    front, back = (
        [Call(slice(half * length, (half + 1) * length), slice(0, (chunk + 1) * length), {})]
        for half, chunk in enumerate(cut.held)
    )
    # Made once for all layers; without the group, which would outlive its run here.
    mine = _tokens_of_row(replace(cut, group=None), tokens * cut.size, device)
    return Plan(1, (tokens * cut.size,), mine, mine, (front, back))


def plan_pack(cut: RowCut, pack: Pack, device: torch.device, *, one_by_one: bool) -> Plan:
    """The plan of a pack; made on the host, and nothing waits for the device.

    Args:
        one_by_one: a call for each document, where the kernel takes no cu_seqlens.
    """
    bounds, rows = torch.tensor(pack.bounds), pack.rows
    whole = pack.bounds[-1] // rows
    tokens = cut.part(torch.arange(rows * whole).view(rows, whole), 1).flatten()
    positions = tokens - bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
    length = whole // cut.chunks
    pieces = [
        (half, row * 2 * length + half * length, _overlaps(pack.bounds, row * whole + chunk * length, length))
        for row in range(rows)
        for half, chunk in enumerate(cut.held)
    ]
    if one_by_one:
        pieces = [
            (half, first + query - documents[0][0], [(query, key, stop)])
            for half, first, documents in pieces
            for query, key, stop in documents
        ]
    cu_seqlens = [_cu_seqlens(documents) for _, _, documents in pieces]
    moved = torch.tensor([n for pair in cu_seqlens for side in pair for n in side], dtype=torch.int32)
    sizes = [len(side) for pair in cu_seqlens for side in pair]
    on_device = iter(moved.to(device, non_blocking=True).split(sizes))
    calls: tuple[list[Call], list[Call]] = ([], [])
    for (half, first, documents), sides in zip(pieces, cu_seqlens, strict=True):
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        longest = (max(b - a for a, b in itertools.pairwise(side)) for side in sides)
        given = dict(zip(names, (next(on_device), next(on_device), *longest), strict=True))
        keys = slice(documents[0][1], documents[-1][2])
        calls[half].append(Call(slice(first, first + sides[0][-1]), keys, {} if one_by_one else given))
    lengths = tuple(bounds.diff().tolist())
    return Plan(rows, lengths, tokens.to(device, non_blocking=True), positions.to(device, non_blocking=True), calls)


def _overlaps(bounds: Sequence[int], start: int, length: int) -> list[tuple[int, int, int]]:
    """The documents that have tokens in [start, start + length): first query, first key, and the end of both."""
    end = start + length
    return [(max(a, start), a, min(b, end)) for a, b in itertools.pairwise(bounds) if b > start and a < end]


def _cu_seqlens(documents: list[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    first_query, first_key, _ = documents[0]
    ends = [stop for _, _, stop in documents]
    return [0, *(end - first_query for end in ends)], [0, *(end - first_key for end in ends)]


FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q1, k1, q2, k2, v


class Kernel(Protocol):
    """An attention kernel, forward and backward. `keys` are its key tensors with the values last."""

    def forward(self, call: Call, queries: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The output, and the log-sum-exp of the scores."""
        ...

    def backward(
        self, call: Call, grad: Tensor, queries: list[Tensor], keys: list[Tensor], out: Tensor, lse: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The gradients of queries and keys."""
        ...


@dataclass(frozen=True)
class Flash:
    """flash_attention of (q), (k, v). `options` are the ones that all calls share."""

    options: dict[str, Any]

    def forward(self, call: Call, queries: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, Tensor]:
        return flash_attention(*queries, *keys, return_lse=True, **self._given(call))

    def backward(
        self, call: Call, grad: Tensor, queries: list[Tensor], keys: list[Tensor], out: Tensor, lse: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        dq, *dkv = flash_attention_backward(grad, *queries, *keys, out, lse, **self._given(call))
        return (dq,), dkv

    def _given(self, call: Call) -> dict[str, Any]:
        return {"layout": "tnd" if call.documents else "sbnd", **call.documents, **self.options}


@dataclass(frozen=True)
class Piecewise:
    """piecewise_attention of (q1, q2), (k1, k2, v), of one document a call. `options` are the ones that all calls share."""

    threshold: int
    options: dict[str, Any]

    def forward(self, call: Call, queries: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, Tensor]:
        qkv = self._in_rows(queries, keys)
        out, lse = piecewise_attention(*qkv, self.threshold, layout="sbnd", return_lse=True, **self.options)
        return out.view(queries[0].shape), lse

    def backward(
        self, call: Call, grad: Tensor, queries: list[Tensor], keys: list[Tensor], out: Tensor, lse: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        qkv = self._in_rows(queries, keys)
        like = qkv[0].shape
        found = piecewise_attention_backward(
            grad.reshape(like), qkv, out.view(like), lse, self.threshold, layout="sbnd", **self.options
        )
        dq1, dk1, dq2, dk2, dv = (x.view(t.shape) for x, t in zip(found, self._flat(queries, keys), strict=True))
        return (dq1, dq2), (dk1, dk2, dv)

    def _flat(self, queries: list[Tensor], keys: list[Tensor]) -> FiveTensors:
        (q1, q2), (k1, k2, v) = queries, keys
        return q1, k1, q2, k2, v

    def _in_rows(self, queries: list[Tensor], keys: list[Tensor]) -> FiveTensors:
        q1, k1, q2, k2, v = (t if t.dim() == 4 else t[:, None] for t in self._flat(queries, keys))
        return q1, k1, q2, k2, v


class Whole:
    """A tensor of this rank's tokens, gathered over the cp group into whole rows: half by half, asynchronously.

    Args:
        part: [rows * s/cp, ...], without gradient.
    """

    def __init__(self, part: Tensor, cut: RowCut, rows: int) -> None:
        self.cut = cut
        self.part = part.unflatten(0, (rows, 2, -1))  # [rows, 2, chunk, ...]
        self.whole = part.new_empty(rows, 2 * cut.size, *self.part.shape[2:])
        self._pending: dict[int, tuple[Any, Tensor, Tensor]] = {}

    @property
    def flat(self) -> Tensor:
        """[rows * s, ...]; of the halves that have arrived."""
        return self.whole.flatten(0, 2)

    def start(self, half: int) -> Whole:
        """Begin to gather the front chunks (0) or the back chunks (1) of all ranks."""
        sent = self.part[:, half].contiguous()
        received = sent.new_empty(self.cut.size, *sent.shape)
        work = dist.all_gather_into_tensor(received.flatten(0, 1), sent, group=self.cut.group, async_op=True)
        self._pending[half] = (work, sent, received)
        return self

    def arrive(self, half: int) -> None:
        """Wait for a half that was started. On a device its stream waits, and the host does not."""
        work, _, received = self._pending.pop(half)
        work.wait()
        _half(self.whole, half).copy_(_in_order(received.transpose(0, 1), half))


class WholeGradient:
    """The gradient of a tensor's whole rows, of which each rank has made a part; reduce-scattered half by half."""

    def __init__(self, of: Whole) -> None:
        self.cut, self.whole, self.part = of.cut, torch.zeros_like(of.whole), torch.empty_like(of.part)
        self._pending: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def add(self, keys: slice, grad: Tensor) -> None:
        self.whole.flatten(0, 2)[keys] += grad

    def start(self, half: int) -> None:
        """Begin to add up the front chunks (0) or the back chunks (1), to which nothing is added any more."""
        sent = _in_order(_half(self.whole, half), half).transpose(0, 1).contiguous()
        received = sent.new_empty(sent.shape[1:])
        work = dist.reduce_scatter_tensor(received, sent.flatten(0, 1), group=self.cut.group, async_op=True)
        self._pending[half] = (work, sent, received)

    def finish(self) -> Tensor:
        """This rank's part, [rows * s/cp, ...]."""
        for half, (work, _, received) in self._pending.items():
            work.wait()
            self.part[:, half] = received
        return self.part.flatten(0, 2)


def _half(whole: Tensor, half: int) -> Tensor:
    """The front or the back chunks of whole rows [rows, 2 cp, chunk, ...], in the order in which they lie."""
    return whole.chunk(2, dim=1)[half]


def _in_order(chunks: Tensor, half: int) -> Tensor:
    """Chunks [rows, cp, chunk, ...] of one half: by rank -> as they lie in the row, and back."""
    return chunks.flip(1) if half else chunks


class _Gathered(torch.autograd.Function):
    """Core attention of this rank's queries over gathered keys.

    Forward, the back chunks arrive while the front chunk's attention runs. Backward, their gradients are added up over the
    ranks while it runs.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, plan: Plan, values: Whole, count: int, *tensors: Tensor) -> Tensor:
        """Args: values: begun with their front half. tensors: `count` queries; as many keys; values."""
        queries, keys = tensors[:count], tensors[count:]
        wholes = [*(Whole(key, values.cut, plan.rows).start(0) for key in keys[:-1]), values]
        for whole in wholes:
            whole.start(1)
        out, statistics = torch.empty(queries[0].shape, dtype=values.part.dtype, device=values.part.device), []
        for half in HALVES:
            for whole in wholes:
                whole.arrive(half)
            for call in plan.calls[half]:
                given = [q[call.queries] for q in queries], [whole.flat[call.keys] for whole in wholes]
                out[call.queries], lse = kernel.forward(call, *given)
                statistics.append(lse)
        ctx.save_for_backward(*tensors, out, *statistics)
        ctx.kernel, ctx.plan, ctx.cut, ctx.count = kernel, plan, values.cut, count
        # Where a layer is recomputed, its backward pass follows at once: keep what is gathered.
        ctx.wholes = wholes if in_backward() else None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        count, plan, saved = ctx.count, ctx.plan, ctx.saved_tensors
        queries, keys, (out, *statistics) = saved[:count], saved[count : 2 * count + 1], saved[2 * count + 1 :]
        wholes = ctx.wholes or _gather(keys, ctx.cut, plan.rows)
        front = len(plan.calls[0])
        lses = statistics[:front], statistics[front:]
        dqs = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for q in queries]
        gathered = [WholeGradient(whole) for whole in wholes]
        for half in reversed(HALVES):
            for call, lse in zip(plan.calls[half], lses[half], strict=True):
                given = [q[call.queries] for q in queries], [whole.flat[call.keys] for whole in wholes]
                found = ctx.kernel.backward(call, grad[call.queries], *given, out[call.queries], lse)
                for dq, part in zip(dqs, found[0], strict=True):
                    dq[call.queries] = part
                for gradient, part in zip(gathered, found[1], strict=True):
                    gradient.add(call.keys, part)
            for gradient in gathered:
                gradient.start(half)
        return None, None, None, None, *dqs, *(gradient.finish() for gradient in gathered)


def _gather(parts: Sequence[Tensor], cut: RowCut, rows: int) -> list[Whole]:
    wholes = [Whole(part, cut, rows) for part in parts]
    for half in HALVES:
        for whole in wholes:
            whole.start(half)
    for half in HALVES:
        for whole in wholes:
            whole.arrive(half)
    return wholes


def gathered_attention(
    kernel: Kernel,
    plan: Plan,
    cut: RowCut,
    value: Tensor,
    rotate: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks, in the queries' shape.

    Args:
        rotate: makes the kernel's queries and its keys without the values. The values are under way while it runs.
    """
    values = Whole(value.detach(), cut, plan.rows).start(0)
    queries, keys = rotate()
    return _Gathered.apply(kernel, plan, values, len(queries), *queries, *keys, value)


class _Exchange(torch.autograd.Function):
    """Part i of dimension 0 goes to rank i, and part i of what returns is from rank i; backward the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0], ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # empty_like would keep x's strides
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received


def tokens_for_heads(tensors: Sequence[Tensor], cut: RowCut, rows: int) -> tuple[Tensor, ...]:
    """Tensors [rows * s/cp, ..., heads, d] of this rank's tokens -> [rows * s, ..., heads/cp, d] of its heads.

    The tensors travel in one message. They may differ in the number of heads.
    """
    n = cut.size
    parts = [x.unflatten(-2, (n, -1)).movedim(-3, 0) for x in tensors]  # [cp, tokens, ..., heads/cp, d]
    received = _Exchange.apply(torch.cat(parts, -2), cut.group)
    whole = received.unflatten(1, (rows, -1)).transpose(0, 1).flatten(0, 2)  # the ranks' parts of a row side by side
    return whole.split([part.shape[-2] for part in parts], -2)


def heads_for_tokens(x: Tensor, cut: RowCut, rows: int) -> Tensor:
    """[rows * s, ..., c] of this rank's heads -> [rows * s/cp, ..., cp * c] of all heads, for this rank's tokens."""
    parts = x.unflatten(0, (rows, cut.size, -1)).transpose(0, 1).flatten(1, 2)  # [cp, tokens, ..., c]
    return _Exchange.apply(parts, cut.group).movedim(0, -2).flatten(-2)
