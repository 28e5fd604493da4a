r"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of q and k in one launch.

Each pair (x1, x2) of a head at position p is rotated by p times the frequency of the pair:

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

A pair is dimensions (i, i + r/2), or (2i, 2i + 1) if interleaved; dimensions from r to d are copied. The gradient of a
rotation is the rotation by the opposite angle, so the backward runs the same kernel with -sin. It needs only the tables
and can write over the incoming gradient.

The forward and the backward each move 4 bytes per element of q and k in bf16. The tables are read once per token, for
all its heads.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flagscale_kernels._checks import check_float, check_same, check_unit_stride, choose_backend, require
from flagscale_kernels._layouts import as_bnsd, check_layout, sizes, strides
from flagscale_kernels._operators import operator
from flagscale_kernels._triton import next_power_of_2, tl, triton
from flagscale_kernels.rope_frequencies import packed_position_ids

HEADS_TILE = 2048  # pairs in a tile of heads


def rope_reference(t: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """The definition in plain PyTorch: rotate t [..., d]; cos and sin [..., r / 2] broadcast against it."""
    r = 2 * cos.shape[-1]
    compute = torch.promote_types(t.dtype, torch.float32)
    rotated, rest = t[..., :r].to(compute), t[..., r:]
    x1, x2 = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack((y1, y2), dim=-1).flatten(-2) if interleaved else torch.cat((y1, y2), dim=-1)
    return torch.cat((y.to(t.dtype), rest), dim=-1)


# ---------------------------------------------------------------------------------------------------------- CPU path


def _pairs(t, r, interleaved):
    if interleaved:
        return t[..., 0:r:2], t[..., 1:r:2]
    return t[..., : r // 2], t[..., r // 2 : r]


def _rotate_torch(t, out, cos, sin, interleaved, sign):
    """t and out are [b, n, s, d] views and may be the same; cos and sin are [b or 1, 1, s, r / 2]."""
    r = 2 * cos.shape[-1]
    x1, x2 = _pairs(t, r, interleaved)
    y1, y2 = _pairs(out, r, interleaved)
    # cos is fp32 or wider, and so are the products. y1 may be x1's memory, so all of x1 is read before y1 is written.
    if out is not t and t.dtype == cos.dtype:
        torch.addcmul(x2 * cos, x1, sin, value=sign, out=y2)
        torch.addcmul(x1 * cos, x2, sin, value=-sign, out=y1)
    else:
        rotated = torch.addcmul(x2 * cos, x1, sin, value=sign)
        y1.copy_(torch.addcmul(x1 * cos, x2, sin, value=-sign))
        y2.copy_(rotated)
    if out is not t and r < t.shape[-1]:
        out[..., r:].copy_(t[..., r:])


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _rotate_heads(
    IN, OUT, cos, sin, heads, in_stride, out_stride, d, half,
    INTERLEAVED: tl.constexpr, COPY_REST: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, HALF)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        source = IN + head.to(tl.int64)[:, None] * in_stride
        target = OUT + head.to(tl.int64)[:, None] * out_stride
        if INTERLEAVED:
            # Load whole rows and split them in registers, so that the accesses are contiguous.
            cols = tl.arange(0, 2 * HALF)
            mask = (head < heads)[:, None] & (cols < 2 * half)[None, :]
            x = tl.load(source + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.debug_barrier()  # in place, all threads must load before one of them stores
            x1, x2 = tl.split(tl.reshape(x, [HEADS, HALF, 2]))
            y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
            y = tl.reshape(y, [HEADS, 2 * HALF])
            tl.store(target + cols[None, :], y.to(OUT.dtype.element_ty), mask=mask)
        else:
            mask = (head < heads)[:, None] & (pair < half)[None, :]
            x1 = tl.load(source + pair[None, :], mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(source + half + pair[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(target + pair[None, :], (x1 * cos - x2 * sin).to(OUT.dtype.element_ty), mask=mask)
            tl.store(target + half + pair[None, :], (x2 * cos + x1 * sin).to(OUT.dtype.element_ty), mask=mask)
        if COPY_REST:
            rest = 2 * half + tl.arange(0, REST)
            mask = (head < heads)[:, None] & (rest < d)[None, :]
            tl.store(target + rest[None, :], tl.load(source + rest[None, :], mask=mask), mask=mask)


@triton.jit
def _rope_kernel(
    Q, K, Q_OUT, K_OUT, COS, SIN, POSITIONS, seq, q_heads, k_heads, d, half, sign,
    q_batch_stride, q_head_stride, q_seq_stride, k_batch_stride, k_head_stride, k_seq_stride,
    qo_batch_stride, qo_head_stride, qo_seq_stride, ko_batch_stride, ko_head_stride, ko_seq_stride,
    cos_batch_stride, cos_seq_stride, sin_batch_stride, sin_seq_stride, position_batch_stride, position_seq_stride,
    HAS_K: tl.constexpr, HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, COPY_REST: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    s, b = (token % seq).to(tl.int64), (token // seq).to(tl.int64)
    position = s
    if HAS_POSITIONS:
        position = tl.load(POSITIONS + b * position_batch_stride + s * position_seq_stride).to(tl.int64)
    pair = tl.arange(0, HALF)
    cos_row = COS + b * cos_batch_stride + position * cos_seq_stride
    sin_row = SIN + b * sin_batch_stride + position * sin_seq_stride
    cos = tl.load(cos_row + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_row + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :] * sign
    _rotate_heads(
        Q + b * q_batch_stride + s * q_seq_stride, Q_OUT + b * qo_batch_stride + s * qo_seq_stride, cos, sin,
        q_heads, q_head_stride, qo_head_stride, d, half, INTERLEAVED, COPY_REST, Q_HEADS, HALF, REST,
    )  # fmt: skip
    if HAS_K:
        _rotate_heads(
            K + b * k_batch_stride + s * k_seq_stride, K_OUT + b * ko_batch_stride + s * ko_seq_stride, cos, sin,
            k_heads, k_head_stride, ko_head_stride, d, half, INTERLEAVED, COPY_REST, K_HEADS, HALF, REST,
        )  # fmt: skip


def _table_strides(t):
    """(batch, row) strides of [rows, ...] or [b or 1, rows, ...]. One table for all batch entries has batch stride 0."""
    if t.dim() == 1 or (t.dim() == 2 and t.is_floating_point()):
        return 0, t.stride(0)
    return (t.stride(0) if t.shape[0] > 1 else 0), t.stride(1)


def _rotate_triton(q, k, q_out, k_out, cos, sin, positions, layout, interleaved, sign):
    b, q_heads, s = sizes(q, layout)
    d, half = q.shape[-1], cos.shape[-1]
    k_heads = q_heads if k is None else sizes(k, layout)[1]
    half_block = next_power_of_2(half)
    most = max(1, HEADS_TILE // half_block)
    tiles = [min(most, next_power_of_2(n)) for n in (q_heads, k_heads)]
    if b * s == 0:
        return
    has_k = k is not None
    k, k_out = (k, k_out) if has_k else (q, q_out)
    _rope_kernel[(b * s,)](
        q, k, q_out, k_out, cos, sin, cos if positions is None else positions, s, q_heads, k_heads, d, half, sign,
        *(stride for t in (q, k, q_out, k_out) for stride in strides(t, layout)),
        *_table_strides(cos), *_table_strides(sin), *((0, 0) if positions is None else _table_strides(positions)),
        HAS_K=has_k, HAS_POSITIONS=positions is not None, INTERLEAVED=interleaved,
        COPY_REST=2 * half < d and q_out is not q, Q_HEADS=tiles[0], K_HEADS=tiles[1], HALF=half_block,
        REST=next_power_of_2(max(1, d - 2 * half)), num_warps=4,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- custom ops


def _rotate(q, k, q_out, k_out, cos, sin, positions, layout, interleaved, sign, backend):
    if backend == "triton":
        return _rotate_triton(q, k, q_out, k_out, cos, sin, positions, layout, interleaved, sign)
    if positions is not None:
        rows = positions.long()
        if cos.dim() == 3:  # one table per batch entry
            index = rows.expand(cos.shape[0], -1)[..., None].expand(-1, -1, cos.shape[-1])
            cos, sin = cos.gather(1, index), sin.gather(1, index)
        else:
            cos, sin = cos[rows], sin[rows]
    s = sizes(q, layout)[2]
    cos, sin = ((t[None] if t.dim() == 2 else t)[:, None, :s] for t in (cos, sin))
    for t, out in ((q, q_out), (k, k_out)):
        if t is not None:
            view = as_bnsd(t, layout)
            _rotate_torch(view, view if out is t else as_bnsd(out, layout), cos, sin, interleaved, sign)


def _no_k(q):
    return q.new_empty(0)  # a custom op returns tensors only


@operator("rope")
def _rope_op(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    layout: str, interleaved: bool, sign: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = _no_k(q) if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _rotate(q, k, q_out, k_out, cos, sin, positions, layout, interleaved, sign, backend)
    return q_out, k_out


@operator("rope_", mutates=("q", "k"))
def _rope_inplace_op(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    layout: str, interleaved: bool, sign: float, backend: str,
) -> None:  # fmt: skip
    _rotate(q, k, q, k, cos, sin, positions, layout, interleaved, sign, backend)


@_rope_op.register_fake
def _(q, k, cos, sin, positions, layout, interleaved, sign, backend):
    return q.new_empty(q.shape), _no_k(q) if k is None else k.new_empty(k.shape)


def _can_be_written_over(dq, dk):
    """Whether each gradient can take its own rotation: they are dense, and not in the same memory, as those of q + k are."""
    if dk is None:
        return dq.is_contiguous()
    apart = dq.untyped_storage()._cdata != dk.untyped_storage()._cdata
    return apart and dq.is_contiguous() and dk.is_contiguous()


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, layout, interleaved, inplace_backward, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.options = layout, interleaved, backend
        ctx.inplace_backward, ctx.has_k = inplace_backward, k is not None
        q_out, k_out = _rope_op(q, k, cos, sin, positions, layout, interleaved, 1.0, backend)
        return (q_out, k_out) if ctx.has_k else q_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk=None):
        cos, sin, positions = ctx.saved_tensors
        layout, interleaved, backend = ctx.options
        args = (cos, sin, positions, layout, interleaved, -1.0, backend)
        none = (None,) * 7
        if ctx.inplace_backward and _can_be_written_over(dq, dk):
            _rope_inplace_op(dq, dk, *args)
            return dq, dk, *none
        dq, dk = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (dq, dk))
        dq_out, dk_out = _rope_op(dq, dk, *args)
        return dq_out, dk_out if ctx.has_k else None, *none


# ------------------------------------------------------------------------------------------------------------- public


def _check_tables(q, cos, sin, positions, layout, backend):
    b, _, s = sizes(q, layout)
    check_float("cos", cos, backend)
    for attribute in ("shape", "dtype", "device"):
        check_same(attribute, [("cos", cos), ("sin", sin)])
    check_same("device", [("q", q), ("cos", cos)])
    require(cos.dim() in (2, 3), f"cos.dim() ({cos.dim()}) must be 2 ([positions, r/2]) or 3 ([b, positions, r/2])")
    check_unit_stride("cos", cos)
    check_unit_stride("sin", sin)
    r, d = 2 * cos.shape[-1], q.shape[-1]
    require(0 < r <= d, f"2 * cos.shape[-1] ({r}), the rotary dimension, must be from 2 to the head dimension ({d})")
    if cos.dim() == 3:
        require(cos.shape[0] in (1, b), f"cos.shape[0] ({cos.shape[0]}) must be 1 or the batch size ({b})")
    if positions is None:
        require(cos.shape[-2] >= s, f"cos.shape[-2] ({cos.shape[-2]}) must be at least the sequence length ({s})")
        return
    require(
        positions.dtype in (torch.int32, torch.int64),
        f"position_ids.dtype ({positions.dtype}) must be torch.int32 or torch.int64",
    )
    check_same("device", [("q", q), ("position_ids", positions)])
    allowed = ((s,), (1, s), (b, s))
    require(
        tuple(positions.shape) in allowed,
        f"position_ids.shape ({tuple(positions.shape)}) must be one of {sorted(set(allowed))} for {layout!r}",
    )


def _check_heads(name, t, layout, backend):
    check_layout(layout, [(name, t)])
    check_float(name, t, backend)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "sbnd",
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions in one launch. k may have fewer heads than q.

    q, k: [s, b, n, d] for layout "sbnd"; "bnsd", "bsnd", and "tnd" for a pack of sequences. Strides are free, but the
    last must be 1.
    cos, sin: tables [positions, r / 2] or [b, positions, r / 2] from `rope_tables`. Dimensions from r to d are copied.
    position_ids: int [s] or [b, s], the row of the tables for each token; by default 0, 1, and so on. Whether they lie
    in the tables is not checked.
    cu_seqlens: int [sequences + 1], for "tnd": each sequence starts at position 0.
    inplace_backward: write the gradients over the incoming ones if those are contiguous and in memory of their own. Only
    correct if nothing else reads the incoming gradients, as where q and k go to an attention and nowhere else.
    Raises ValueError for a shape, dtype, device, stride or layout that does not fit.
    """
    backend = choose_backend(q, backend)
    _check_heads("q", q, layout, backend)
    _check_heads("k", k, layout, backend)
    for attribute in ("dtype", "device"):
        check_same(attribute, [("q", q), ("k", k)])
    require(q.shape[-1] == k.shape[-1], f"k.shape[-1] ({k.shape[-1]}) must equal q.shape[-1] ({q.shape[-1]})")
    q_sizes, k_sizes = sizes(q, layout)[::2], sizes(k, layout)[::2]
    require(q_sizes == k_sizes, f"k's (batch, sequence) {k_sizes} must equal q's {q_sizes}")
    if cu_seqlens is not None:
        require(layout == "tnd", f"cu_seqlens needs layout 'tnd', got {layout!r}")
        require(position_ids is None, "cu_seqlens and position_ids exclude each other: give 1 of the 2")
        position_ids = packed_position_ids(cu_seqlens, q.shape[0])
    _check_tables(q, cos, sin, position_ids, layout, backend)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()  # torch.compile plans its own buffers
    return _Rope.apply(q, k, cos, sin, position_ids, layout, interleaved, inplace_backward, backend)


def _angle_tables(freqs, interleaved, mscale):
    """cos and sin [s, r / 2] of megatron-core's angles [s, 1, 1, r], which have each angle twice."""
    half = freqs.shape[-1] // 2
    angles = freqs.reshape(freqs.shape[0], freqs.shape[-1])
    angles = (angles[:, ::2] if interleaved else angles[:, :half]).float()
    return angles.cos() * mscale, angles.sin() * mscale


def _check_angles(freqs):
    require(
        freqs.dim() >= 2 and freqs.numel() == freqs.shape[0] * freqs.shape[-1] and freqs.shape[-1] % 2 == 0,
        f"freqs.shape ({tuple(freqs.shape)}) must be [positions, 1, 1, r] with r divisible by 2",
    )


def apply_rope(
    t: Tensor,
    freqs: Tensor,
    transpose_output_memory: bool = False,
    interleaved: bool = False,
    *,
    mscale: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotate t [s, b, n, d] by the angles freqs [s, 1, 1, r]. The signature is that of megatron-core's
    `fused_apply_rotary_pos_emb`.

    freqs has each angle twice: in its two halves, or side by side if interleaved. `mscale` multiplies cos and sin. They
    stay in fp32; megatron-core's unfused path rounds them to t's dtype.
    Raises ValueError for a shape, dtype, device or stride that does not fit.
    """
    backend = choose_backend(t, backend)
    require(not transpose_output_memory, "transpose_output_memory (True) must be False: it is not supported")
    _check_heads("t", t, "sbnd", backend)
    _check_angles(freqs)
    cos, sin = _angle_tables(freqs, interleaved, mscale)
    _check_tables(t, cos, sin, None, "sbnd", backend)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    return _Rope.apply(t, None, cos, sin, None, "sbnd", interleaved, inplace_backward, backend)


def apply_rope_thd(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    *,
    interleaved: bool = False,
    mscale: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotate a pack t [t, n, d] by the angles freqs [positions, 1, 1, r]. The signature is that of megatron-core's
    `fused_apply_rotary_pos_emb_thd`.

    Each sequence of cu_seqlens starts at position 0. With context parallelism cu_seqlens is of the whole sequences. Each
    is split into 2 cp_size chunks, and this rank has chunks cp_rank and 2 cp_size - 1 - cp_rank, as in megatron-core.
    Raises ValueError for a shape, dtype, device or stride that does not fit.
    """
    backend = choose_backend(t, backend)
    require(0 <= cp_rank < cp_size, f"cp_rank ({cp_rank}) must be from 0 to cp_size - 1 ({cp_size - 1})")
    _check_heads("t", t, "tnd", backend)
    _check_angles(freqs)
    local = packed_position_ids(cu_seqlens // cp_size, t.shape[0])
    if cp_size > 1:
        # The first half of a rank's tokens of a sequence is chunk cp_rank, the second is 2 cp_size - 1 - cp_rank.
        bounds = cu_seqlens.to(local.device, torch.int64) // cp_size
        index = torch.arange(t.shape[0], device=local.device)
        chunk = (bounds[1:] - bounds[:-1])[torch.searchsorted(bounds[1:-1].contiguous(), index, right=True)] // 2
        local = torch.where(local < chunk, local + cp_rank * chunk, local - chunk + (2 * cp_size - 1 - cp_rank) * chunk)
    cos, sin = _angle_tables(freqs, interleaved, mscale)
    _check_tables(t, cos, sin, local, "tnd", backend)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    return _Rope.apply(t, None, cos, sin, local, "tnd", interleaved, inplace_backward, backend)
