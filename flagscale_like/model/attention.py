"""Core attention: positions (RoPE, ALiBi, NLPE) and softmax(q kᵀ) v, on q, k, v as megatron-core hands them over.

It is causal, or bidirectional: then a query sees all keys of its document. A batch is rows of one document each, or a pack of
documents whose bounds megatron-core hands over as packed_seq_params. Where it hands over a CachedStep there, the tokens are
those of a step of generation, and their keys lie in a cache; see model.kv_cache. What this attention does not compute
(another mask, a bias) it refuses. With context parallelism, this rank has a part of every row; see model.context_parallel.

The rotation happens here and not in megatron-core's rope_utils: q and k are rotated in one launch, from tables that are made
once, and NLPE finds the unrotated q and k that it needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from flagscale_kernels import (
    apply_rope,
    flash_attention,
    piecewise_attention,
    rope,
    rope_frequencies,
    rope_tables,
)
from flagscale_like.arch import ModelArch, Position
from flagscale_like.config import ContextParallelKind, Kernels
from flagscale_like.errors import required
from flagscale_like.model.context_parallel import (
    Flash,
    Piecewise,
    Plan,
    gathered_attention,
    heads_for_tokens,
    plan_pack,
    plan_rows,
    tokens_for_heads,
)
from flagscale_like.model.kv_cache import CachedStep
from flagscale_like.model.modules import backend_of
from flagscale_like.model.packs import Pack
from flagscale_like.runtime.row_cut import RowCut, row_cut

# The mask types that megatron-core may name for what is computed: of rows, and of packs.
CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
BIDIRECTIONAL = (AttnMaskType.no_mask, AttnMaskType.padding)


class RotaryTables:
    """RoPE's angles, made at first use and shared by the layers of a model chunk.

    With dynamic scaling the frequencies depend on the length of the sequence, as in transformers where it runs a sequence
    without a cache of keys. (Its cache keeps keys that were rotated for shorter sequences.)

    Attributes:
        attention_factor: number that multiplies cos and sin, 1.0 but for yarn.
    """

    def __init__(self, arch: ModelArch) -> None:
        latent = arch.latent_attention  # rotates a part of a head's channels
        self._dim, self._base = latent.qk_rope_head_dim if latent else arch.head_dim, arch.position.base
        self._options: dict[str, Any] = {}
        self._fixed_up_to: int | None = None  # tokens up to which one set of frequencies holds; None: any number
        scaling = arch.position.scaling
        if scaling is not None:
            numbers, name = scaling.numbers, "original_max_position_embeddings"
            self._options = {"scaling": scaling.kind, "original_max_positions": numbers.pop(name, None), **numbers}
            self._fixed_up_to = scaling.original_max_position_embeddings if scaling.kind == "dynamic" else None
        _, self.attention_factor = self._frequencies(1)
        self._made: dict[tuple, tuple[Any, ...]] = {}
        self._packs: dict[tuple, tuple[tuple[int, ...], tuple[Tensor | None, ...]]] = {}

    def vary(self, longest: int) -> bool:
        """Whether documents of up to `longest` tokens have angles that depend on their lengths."""
        return self._fixed_up_to is not None and longest > self._fixed_up_to

    def tables(self, seq_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, each fp32 [s, d/2], of positions 0, 1, ... s - 1.

        Args:
            seq_length: tokens of the whole sequence, with dynamic scaling also where a rank holds a part of it.
        """

        def make() -> tuple[Tensor, ...]:
            return rope_tables(self._frequencies(seq_length)[0], seq_length, attention_factor=self.attention_factor)

        return self._kept("tables", seq_length, device, make)

    def far_angles(self, position: Position, seq_length: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """NLPE's angles for q2 and k2, fp32 [s, 1, 1, d] (each twice); None for a k2 that is not rotated."""

        def make() -> tuple[Tensor | None, ...]:
            true, w = torch.arange(seq_length, dtype=torch.float32, device="cpu"), float(position.required_threshold)
            if position.far == "clipped":
                places = (torch.full_like(true, w), None)
            else:
                c = position.far_factor
                places = (w - w / c + true / c, true / c)
            frequencies, _ = self._frequencies(seq_length)
            return tuple(p if p is None else _angles(p, frequencies) for p in places)

        return self._kept("far", seq_length, device, make)

    def of_documents(self, lengths: tuple[int, ...], made: MethodType, *args: Any) -> tuple:
        """`made(*args, length, device)` of each document of a pack, one after another: a row for each token.

        What was made last is kept, for the layers that read the same pack.

        Args:
            lengths: tokens of the documents.
            made: `tables`, or `far_angles`.
            args: what it takes, ending with the device.
        """
        *first, device = args
        if len(lengths) == 1:
            return made(*first, lengths[0], device)
        key = ("pack", made.__name__, device)
        if key not in self._packs or self._packs[key][0] != lengths:
            parts = zip(*(made(*first, length, device) for length in lengths), strict=True)
            self._packs[key] = (lengths, tuple(None if rows[0] is None else torch.cat(rows) for rows in parts))
        return self._packs[key][1]

    def _frequencies(self, seq_length: int) -> tuple[Tensor, float]:
        """fp32 [d/2], and the attention factor. On the CPU: a model may be built on the meta device."""
        length = {} if self._fixed_up_to is None else {"seq_len": seq_length}
        return rope_frequencies(self._dim, self._base, device="cpu", **self._options, **length)

    def _kept(self, name: str, seq_length: int, device: torch.device, make: Callable) -> tuple[Any, ...]:
        """The first rows of what was made for the longest sequence so far.

        Beyond the length up to which the frequencies are fixed, what was made last is kept, for its own length.
        """
        fixed = not self.vary(seq_length)
        key = (name, device, fixed)
        rows = len(self._made[key][0]) if key in self._made else 0  # the first one is always there
        if rows < seq_length if fixed else rows != seq_length:
            self._made[key] = tuple(t if t is None else t.to(device) for t in make())
        return tuple(t if t is None else t[:seq_length] for t in self._made[key])


def _angles(places: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.outer(places, frequencies)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slope of each head (Press et al. 2022).

    For 2^k heads the geometric series that starts at, and has the ratio, 2^(-8 / heads). Other counts take the series of
    the largest power of two below, and fill up with every second slope of the series of twice as many.

    Returns:
        [num_heads], float32, on the CPU.
    """

    def series(heads: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)]

    power = 1 << (num_heads.bit_length() - 1)
    slopes = series(power) + series(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


class CoreAttention(nn.Module):
    """Grouped-query attention of this tensor-parallel rank's heads, as model.attention says. Nothing of size [s, s] is made.

    Args:
        tables: RoPE's; None with ALiBi.
        cp_comm_type: parallel.cp_kind, as megatron-core hands it over; of no meaning over one context-parallel rank.
        config: megatron-core gives it to every core attention; this one needs none of it.
        layer_number: counted from 1 over the whole model.
        attn_mask_type, attention_type, attention_dropout: refused, unless of the model's self-attention, without dropout.
    """

    def __init__(  # many parameters: the signature is megatron-core's
        self,
        *,
        arch: ModelArch,
        kernels: Kernels,
        tables: RotaryTables | None,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        config: TransformerConfig | None = None,
        layer_number: int | None = None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        attention_type: str = "self",
        cp_comm_type: ContextParallelKind | None = None,
        attention_dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.causal = arch.attention == "causal"
        self.mask_types = CAUSAL if self.causal else BIDIRECTIONAL
        if attention_type != "self" or attn_mask_type not in self.mask_types or attention_dropout:
            raise ValueError(
                f"core attention is {arch.attention} self-attention without dropout (asked for: {attention_type} attention, "
                f"{attn_mask_type.name}, dropout {attention_dropout})"
            )
        self.layer_number, self.tables = layer_number, tables
        self.position = arch.position
        # q, k and v are views of what the QKV product wrote. Where autograd keeps rotated copies of q and k, a view of v
        # would keep all three alive. (A norm of q and k keeps them anyway, and so does ALiBi, which rotates nothing.)
        self.frees_qkv = tables is not None and not arch.qk_norm
        self.softmax_scale = softmax_scale
        self.window = arch.sliding_window
        self.rope_backend, self.backend = backend_of(kernels.rope), backend_of(kernels.attention)
        self.cut = row_cut(pg_collection.cp, cp_comm_type or "gather")
        self.slopes = self.head_slopes = None
        if arch.position.kind == "alibi":
            tp = pg_collection.tp
            self.slopes = self.head_slopes = alibi_slopes(arch.num_attention_heads).chunk(tp.size())[tp.rank()]
            if self.cut is not None and not self.cut.zigzag:  # a2a: this rank computes a part of the heads
                self.slopes = self.slopes.chunk(self.cut.size)[self.cut.rank]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query: [s, b, n/tp, d]; key, value: [s, b, g/tp, d] -> [s, b, n/tp * d].

        With packed_seq_params the pack is one row of t tokens: query [t, n/tp, d]; key, value [t, g/tp, d] -> [t, n/tp * d].
        With context parallelism, s and t count this rank's tokens.

        Raises:
            ValueError: a mask, a mask type, a bias or a form of pack is given that this attention does not compute.
        """
        if attention_mask is not None or attention_bias is not None:
            given = "attention_mask" if attention_mask is not None else "attention_bias"
            raise ValueError(
                f"{given} is given: core attention is {self._kind} within each document and takes no other mask"
            )
        if attn_mask_type is not None and attn_mask_type not in self.mask_types:
            raise ValueError(
                f"attn_mask_type is {attn_mask_type.name}: core attention computes {self._kind} attention only"
            )
        if packed_seq_params is not None and packed_seq_params.qkv_format != "thd":
            kind = packed_seq_params.qkv_format
            raise ValueError(f"packed_seq_params.qkv_format is {kind!r}: core attention takes packs as thd")
        if isinstance(packed_seq_params, CachedStep):
            return packed_seq_params.attend(self, query, key, value).flatten(1)
        if self.slopes is not None and self.slopes.device != query.device:
            self.slopes = self.slopes.to(query.device)
        if self.cut is None:
            return self._rows(query, key, value, packed_seq_params)
        pack = _with_bounds(packed_seq_params) if packed_seq_params is not None else None
        if self.cut.zigzag:
            return self._gathered(query, key, value, pack, self.cut)
        rows = pack.rows if pack is not None else 1
        query, key, value = tokens_for_heads((query, key, value), self.cut, rows)
        return heads_for_tokens(self._rows(query, key, value, pack), self.cut, rows)

    @property
    def _kind(self) -> str:
        return "causal" if self.causal else "bidirectional"

    def _rows(self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSeqParams | None) -> Tensor:
        """Attention of whole rows."""
        if self.frees_qkv or (self.cut is not None and self.tables is not None):  # or what was exchanged
            value = value.contiguous()
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params).flatten(1)
        if self.position.kind == "nlpe":
            return self._piecewise(query, key, value, (query.shape[0],)).flatten(2)
        if self.tables is not None:
            query, key = self._rotate(query, key, self.tables)
        return self._attend(query, key, value, layout="sbnd").flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **documents: Any) -> Tensor:
        return flash_attention(
            query,
            key,
            value,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            alibi_slopes=self.slopes,
            window=self.window,
            backend=self.backend,
            **documents,
        )

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedSeqParams) -> Tensor:
        """Each document of a pack by itself: positions start at 0 in each, and no query sees another document's keys."""
        bounds, longest = pack.cu_seqlens_q, pack.max_seqlen_q
        if self.position.kind == "nlpe":
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))  # [t, n/tp, d] -> [t, 1, n/tp, d]
            return self._piecewise(query, key, value, _lengths(pack)).squeeze(1)
        if self.tables is not None and self.tables.vary(longest or query.shape[0]):
            tables = self.tables.of_documents(_lengths(pack), self.tables.tables, query.device)
            query, key = rope(query, key, *tables, layout="tnd", inplace_backward=True, backend=self.rope_backend)
        elif self.tables is not None:
            tables = self.tables.tables(query.shape[0], query.device)
            options: dict[str, Any] = {"layout": "tnd", "inplace_backward": True, "backend": self.rope_backend}
            query, key = rope(query, key, *tables, cu_seqlens=bounds, **options)
        lengths = {"max_seqlen_q": pack.max_seqlen_q, "max_seqlen_k": pack.max_seqlen_kv}
        return self._attend(query, key, value, layout="tnd", cu_seqlens_q=bounds, cu_seqlens_k=bounds, **lengths)

    def _gathered(self, query: Tensor, key: Tensor, value: Tensor, pack: Pack | None, cut: RowCut) -> Tensor:
        """Attention of this rank's tokens over the keys of all context-parallel ranks."""
        options = {"causal": self.causal, "softmax_scale": self.softmax_scale, "backend": self.backend}
        nlpe = self.position.kind == "nlpe"
        if nlpe:
            kernel = Piecewise(self.position.required_threshold, options)
        else:
            kernel = Flash(options | {"alibi_slopes": self.slopes, "window": self.window})
        if pack is None:
            plan = plan_rows(cut, query.shape[0], query.device)
        else:
            if pack.plan is None:
                pack.plan = plan_pack(cut, pack, query.device, one_by_one=nlpe)
            plan = pack.plan
        if self.frees_qkv:
            value = value.contiguous()
        out = gathered_attention(kernel, plan, cut, value, lambda: self._rotate_at(query, key, plan))
        return out.flatten(-2)

    def _rotate_at(self, query: Tensor, key: Tensor, plan: Plan) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The queries and keys that the kernel takes, at the positions of this rank's tokens."""
        if self.tables is None:
            return (query,), (key,)
        tables, layout = self.tables, "sbnd" if query.dim() == 4 else "tnd"
        options: dict[str, Any] = {"layout": layout, "inplace_backward": True, "backend": self.rope_backend}
        if tables.vary(max(plan.lengths)):
            true, places = tables.of_documents(plan.lengths, tables.tables, query.device), plan.tokens
        else:
            true, places = tables.tables(max(plan.lengths), query.device), plan.positions
        q1, k1 = rope(query, key, *true, position_ids=places, **options)
        if self.position.kind != "nlpe":
            return (q1,), (k1,)
        far_q, far_k = tables.of_documents(plan.lengths, tables.far_angles, self.position, query.device)
        factor = tables.attention_factor

        def far(x: Tensor, angles: Tensor, mscale: float) -> Tensor:
            rows = x if x.dim() == 4 else x[:, None]
            return apply_rope(rows, angles[plan.tokens], mscale=mscale, backend=self.rope_backend).view(x.shape)

        if far_k is not None:
            return (q1, far(query, far_q, factor)), (k1, far(key, far_k, factor))
        k2 = key.contiguous() if self.frees_qkv else key  # q2 takes the factor of both
        return (q1, far(query, far_q, factor**2)), (k1, k2)

    def _rotate(self, query: Tensor, key: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor]:
        angles = tables.tables(query.shape[0], query.device)
        # In place: the rotated q and k go to the attention alone, so nothing else reads their gradients.
        return rope(query, key, *angles, layout="sbnd", inplace_backward=True, backend=self.rope_backend)

    def _piecewise(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """NLPE, one call of the kernel for each document. lengths: tokens of the documents, which fill the rows."""
        tables, backend = required(self.tables, "RoPE's tables"), self.rope_backend
        far_q, far_k = tables.of_documents(lengths, tables.far_angles, self.position, query.device)
        factor = tables.attention_factor
        if far_k is not None:
            q2 = apply_rope(query, far_q, mscale=factor, backend=backend)
            k2 = apply_rope(key, far_k, mscale=factor, backend=backend)
        else:  # k2 is the key itself: q2 takes the factor of both
            q2 = apply_rope(query, far_q, mscale=factor**2, backend=backend)
            k2 = key.contiguous() if self.frees_qkv else key
        true = tables.of_documents(lengths, tables.tables, query.device)
        q1, k1 = rope(query, key, *true, layout="sbnd", inplace_backward=True, backend=backend)

        def attend(*document: Tensor) -> Tensor:
            options: dict[str, Any] = {"softmax_scale": self.softmax_scale, "layout": "sbnd", "backend": self.backend}
            return piecewise_attention(*document, self.position.required_threshold, causal=self.causal, **options)

        if len(lengths) == 1:
            return attend(q1, k1, q2, k2, value)
        return torch.cat([attend(*d) for d in zip(*(t.split(lengths) for t in (q1, k1, q2, k2, value)), strict=True)])


def _with_bounds(pack: PackedSeqParams) -> Pack:
    if not isinstance(pack, Pack):
        raise ValueError(
            "packed_seq_params has no bounds on the host, which core attention needs here: make it with packing()"
        )
    return pack


def _lengths(pack: PackedSeqParams) -> tuple[int, ...]:
    """Tokens of a pack's documents."""
    return tuple(stop - start for start, stop in itertools.pairwise(_with_bounds(pack).bounds))
