"""Keys and values of texts that are being generated, and the attention of a step's tokens over them.

A step is one pack of tokens: first the next token of each text under way, then parts of new prompts. megatron-core hands it
to core attention as packed_seq_params, as it does the packs of training, and core attention hands its q, k and v over.

The cache has a row for each text, [rows, groups, places, channels], and the texts under way fill its first rows. Their keys
are then views of it. (A paged cache saves memory where texts are far shorter than the longest one. To read it without a
kernel of its own, all keys are gathered at every step, which takes longer than the attention.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from flagscale_kernels import apply_rope, flash_attention, piecewise_attention, rope
from flagscale_like.errors import required

if TYPE_CHECKING:
    from flagscale_like.model.attention import CoreAttention, RotaryTables
    from flagscale_like.model.build import LanguageModel

GROWS_BY = 64  # places; a cache has a multiple of it


class KeyValueCache:
    """Keys and values of this rank's layers and heads.

    Args:
        chunks: this rank's chunks of the model.
        rows: the most texts that are under way at a time.

    Attributes:
        data: [layers, 2 (keys, values) or 3 (near keys, far keys, values: NLPE), rows, groups, places, channels].
    """

    def __init__(self, chunks: Sequence[LanguageModel], rows: int) -> None:
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        arch, weight = chunks[0].arch, next(chunks[0].parameters())
        self.rows, self.numbers = rows, {layer.layer_number: index for index, layer in enumerate(layers)}
        kinds = 3 if arch.position.kind == "nlpe" else 2
        groups = arch.num_query_groups // chunks[0].config.tensor_model_parallel_size
        self.shape = (len(layers), kinds, rows, groups, arch.head_dim)
        self.dtype, self.device = weight.dtype, weight.device
        self.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self._take(torch.empty(*self.shape[:-1], 0, self.shape[-1], dtype=self.dtype, device=self.device))

    def _take(self, data: Tensor) -> None:
        self.data = data
        self.layers = [layer.unbind(0) for layer in data.unbind(0)]  # views, made once

    @property
    def places(self) -> int:
        """Tokens that a row takes now."""
        return self.data.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now."""
        return self.data.nbytes

    def reserve(self, places: int, most: int) -> None:
        """Have at least so many places in each row. It grows by half at least, but not beyond `most`."""
        if places <= self.places:
            return
        wanted = max(places, min(self.places * 3 // 2, most))
        wanted = -(-wanted // GROWS_BY) * GROWS_BY
        # Zeros: attention multiplies what lies behind the end of a text with 0, which nan would survive.
        data = torch.zeros(*self.shape[:-1], wanted, self.shape[-1], dtype=self.dtype, device=self.device)
        data[..., : self.places, :] = self.data
        self._take(data)

    def of_layer(self, number: int) -> tuple[Tensor, ...]:
        """The keys and values of a layer, each [rows, groups, places, channels].

        Args:
            number: of the layer, counted from 1 over the whole model.
        """
        return self.layers[self.numbers[number]]

    def copy(self, source: int, rows: slice | int, places: int) -> None:
        """Copy the first places of a row to other rows."""
        self.data[:, :, rows, :, :places] = self.data[:, :, source : source + 1, :, :places]

    def take_out(self, row: int, places: int) -> Tensor:
        """A copy of the first places of a row, for `put`."""
        return self.data[:, :, row : row + 1, :, :places].clone()

    def put(self, taken: Tensor, rows: slice) -> None:
        """Write into rows what `take_out` gave."""
        self.data[:, :, rows, :, : taken.shape[-2]] = taken


@dataclass(frozen=True)
class PromptPart:
    """Tokens of a prompt that a step computes.

    Attributes:
        row: of the cache.
        start: place of the first one in its text; what is before it lies in the cache.
        at: index of the first one in the pack.
        count: how many.
        length: tokens of the whole prompt.
    """

    row: int
    start: int
    at: int
    count: int
    length: int


@dataclass(kw_only=True)
class CachedStep(PackedSeqParams):
    """The tokens of one step, as megatron-core hands them to core attention. Make one with `cached_step`.

    Attributes:
        rows, places: int64 [t] on the device, where each token's key lies in the cache.
        on_host: the places on the host.
        decoding: tokens at the pack's front that are the next one of rows 0, 1, ...
        prompts: the tokens behind them.
    """

    cache: KeyValueCache
    rows: Tensor
    places: Tensor
    on_host: Sequence[int] = ()
    decoding: int = 0
    prompts: Sequence[PromptPart] = ()
    _made: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def attend(self, core: CoreAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Put the tokens' keys and values into the cache, and attend to what is there of their texts.

        Args:
            query: [t, n/tp, d].
            key, value: [t, g/tp, d].

        Returns:
            [t, n/tp, d].
        """
        queries, keys = self._rotate(core, query, key)
        stored = self.cache.of_layer(required(core.layer_number, "layer_number"))
        for held, new in zip(stored, (*keys, value), strict=True):
            held[self.rows, :, self.places] = new
        if not self.prompts:
            return self._decode(core, queries, stored)
        parts = [self._decode(core, [q[: self.decoding] for q in queries], stored)] if self.decoding else []
        parts += [_prompt(core, part, queries, stored) for part in self.prompts]
        return torch.cat(parts)

    def _decode(self, core: CoreAttention, queries: Sequence[Tensor], stored: Sequence[Tensor]) -> Tensor:
        """One query [b, n, d] of each of the first rows, over all keys of its text."""
        b, longest = len(queries[0]), max(self.on_host[: self.decoding]) + 1
        *keys, values = (held[:b, :, :longest] for held in stored)  # [b, g, longest, d]
        # The heads of a group are queries of one key: [b, g, n/g, d].
        queries = [q.unflatten(1, (values.shape[1], -1)) for q in queries]
        bias, distance = self._bias(core, longest, values.shape[1], values.dtype)
        if len(keys) == 1:
            out = F.scaled_dot_product_attention(queries[0], keys[0], values, attn_mask=bias, scale=core.softmax_scale)
            return out.flatten(1, 2)
        near, far = (torch.matmul(q, k.transpose(-1, -2)).float() for q, k in zip(queries, keys, strict=True))
        scale = core.softmax_scale if core.softmax_scale is not None else queries[0].shape[-1] ** -0.5
        scores = torch.where(distance >= core.position.required_threshold, far, near) * scale + bias
        return torch.matmul(scores.softmax(-1).to(values.dtype), values).flatten(1, 2)

    def _bias(self, core: CoreAttention, longest: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What is added to the scores of the next tokens, [b, 1, 1, keys] or with ALiBi [b, g, n/g, keys]; the distances.

        It is made once for all layers.
        """
        if "bias" not in self._made:
            distance = self.places[: self.decoding, None] - torch.arange(longest, device=self.places.device)
            distance = distance[:, None, None]  # [b, 1, 1, keys]
            hidden = distance < 0
            if core.window:
                hidden = hidden | (distance >= core.window)
            bias = torch.zeros(distance.shape, dtype=dtype, device=distance.device)
            if core.head_slopes is not None:
                slopes = core.head_slopes.to(distance.device).view(1, groups, -1, 1)
                bias = (-slopes * distance).to(dtype)
            self._made["bias"] = bias.masked_fill(hidden, -torch.inf), distance
        return self._made["bias"]

    def _rotate(self, core: CoreAttention, query: Tensor, key: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The queries and the keys at their places: one of each, or with NLPE the near and the far ones."""
        tables, backend = core.tables, core.rope_backend
        if tables is None:
            return (query,), (key,)
        near = rope(query, key, *self._angles(tables, tables.tables, query.device), layout="tnd", backend=backend)
        if core.position.kind != "nlpe":
            return near[:1], near[1:]
        far_q, far_k = self._angles(tables, tables.far_angles, core.position, query.device)
        factor = tables.attention_factor

        def far(x: Tensor, angles: Tensor, mscale: float) -> Tensor:
            return apply_rope(x[:, None], angles, mscale=mscale, backend=backend)[:, 0]

        if far_k is not None:
            return (near[0], far(query, far_q, factor)), (near[1], far(key, far_k, factor))
        return (near[0], far(query, far_q, factor**2)), (near[1], key)  # q2 takes the factor of both

    def _angles(self, tables: RotaryTables, made: MethodType, *args: Any) -> tuple[Any, ...]:
        """The rows of `made` (tables.tables or tables.far_angles) at the tokens' places, made once for all layers."""
        name = made.__name__
        if name not in self._made:
            *first, device = args
            longest = max(self.lengths)
            if tables.vary(longest):
                found = [
                    tuple(t if t is None else t[places] for t in made(*first, length, device))
                    for length, places in self._spans()
                ]
                self._made[name] = tuple(None if t[0] is None else torch.cat(t) for t in zip(*found, strict=True))
            else:
                rows = made(*first, longest, device)
                self._made[name] = tuple(t if t is None else t[self.places] for t in rows)
        return self._made[name]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text with the step's, of prompts those of the whole prompt."""
        return [place + 1 for place in self.on_host[: self.decoding]] + [part.length for part in self.prompts]

    def _spans(self) -> list[tuple[int, slice]]:
        """Of each text, its length (see `lengths`) and the places of the step's tokens in it."""
        decoded = [(place + 1, slice(place, place + 1)) for place in self.on_host[: self.decoding]]
        return decoded + [(part.length, slice(part.start, part.start + part.count)) for part in self.prompts]


def _prompt(core: CoreAttention, part: PromptPart, queries: Sequence[Tensor], stored: Sequence[Tensor]) -> Tensor:
    """A prompt's tokens over its keys up to them, [count, n, d]."""
    end = part.start + part.count
    *keys, values = (held[part.row : part.row + 1, :, :end] for held in stored)  # [1, g, end, d]
    queries = [q[part.at : part.at + part.count].transpose(0, 1)[None] for q in queries]  # [1, n, count, d]
    options: dict[str, Any] = {
        "causal": True,
        "softmax_scale": core.softmax_scale,
        "layout": "bnsd",
        "backend": core.backend,
    }
    if len(keys) == 1:
        slopes = core.head_slopes if core.head_slopes is None else core.head_slopes.to(values.device)
        out = flash_attention(queries[0], keys[0], values, alibi_slopes=slopes, window=core.window, **options)
    else:
        near, far = zip(queries, keys, strict=True)
        out = piecewise_attention(*near, *far, values, core.position.required_threshold, **options)
    return out[0].transpose(0, 1)


def cached_step(cache: KeyValueCache, decoding: Sequence[int], prompts: Sequence[PromptPart]) -> CachedStep:
    """The step that computes the tokens at these places of rows 0, 1, ..., and then these parts of prompts."""
    parts = [range(part.start, part.start + part.count) for part in prompts]
    places = [*decoding, *itertools.chain.from_iterable(parts)]
    rows = [*range(len(decoding)), *itertools.chain.from_iterable([part.row] * part.count for part in prompts)]
    where = torch.tensor([rows, places], device="cpu").to(cache.device, non_blocking=True)
    return CachedStep(
        qkv_format="thd",
        cache=cache,
        rows=where[0],
        places=where[1],
        on_host=places,
        decoding=len(decoding),
        prompts=prompts,
    )
