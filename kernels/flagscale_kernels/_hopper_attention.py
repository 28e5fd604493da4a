r"""The forward of flash attention for Hopper (sm_90a) in Gluon: asynchronous copies, wgmma and specialised warps.

The structure is that of FlashAttention 3 (Shah et al. 2024, arXiv:2407.08608). One block of 9 warps stays on each
multiprocessor and takes tiles of 128 queries in turn. One warp (the producer) copies Q, K and V
into shared memory with the tensor memory accelerator (TMA). Two warpgroups (the consumers) take 64 queries each: while the
matrix unit computes P V of one tile of keys and Q K^T of the next, the other warpgroup computes its softmax. The maths
is that of `_bands.py`. The producer runs ahead into the next tile of queries while the consumers end theirs.

What waits for what. A turn is one tile of queries; turns without keys copy nothing and count nowhere, for all three warps
alike. `q_full`, phase of the turn: the consumers, for both halves of Q. `q_empty`: the producer, before the next turn, for
both consumers' arrivals behind their last S. Steps count tiles of keys over all turns. `k_full[stage]` and `v_full[stage]`,
phase step // STAGES: the consumers, for one copy. `k_empty`, `v_empty`: the producer, before a step, for both consumers'
arrivals of step - STAGES. S of a step has read its K before that is given back (all products but the last begun have
ended), and P V its V (none is under way). The producer copies K, V, K, V; a consumer takes K of step + 1 before V of step,
and gives K of step back before it takes V of step, so with two stages neither waits for what the other holds. Shared memory
of O is written after the copy of the turn before has read it.

It takes what training takes most: bf16 or fp16, head dimension 64 or 128, causal or not, any lengths, grouped heads, and
strides that are multiples of 16 bytes. `takes` says whether it does; the kernels in Triton take the rest. It is chosen only
where its result agrees with theirs and it is faster (`_rivals.py`).
"""

import torch

from flagscale_kernels._triton import cdiv, sm_count

BM, HALF = 128, 64  # queries of a block, and of one of its two consumers
BN = 128  # keys of a tile
STAGES = 2
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
HEAD_DIMS = (64, 128)
ALIGNMENT = 16  # bytes, of a descriptor's strides

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Triton 3.9 has renamed the two copies.
    _copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    HAS_GLUON = True
except ImportError:  # a Triton without Gluon's Hopper module, or no Triton
    HAS_GLUON = False


if HAS_GLUON:

    @gluon.jit
    def _tile(turn, pairs, tiles, heads, group, seq_q, seq_k, CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
        """(first query, head, KV head, batch entry, tiles of keys) of this block's tile number `turn`.

        Under a causal mask late queries have more keys than early ones. So that all blocks do the same work, tiles are taken
        in pairs: the last and the first, the last but one and the second. All pairs of a head come after one another, so
        that the blocks that run at a time share its keys in the L2 cache. In an odd number of tiles the middle one has no
        partner: its second turn is a tile behind the last query, without keys.
        """
        pair = gl.program_id(0) + turn // 2 * gl.num_programs(0)
        place = pair % pairs
        head = pair // pairs % heads
        batch = pair // pairs // heads
        early = gl.where(place == tiles - 1 - place, tiles, place)
        first = gl.where(turn % 2 == 0, tiles - 1 - place, early) * BM
        keys = seq_k
        if CAUSAL:
            keys = gl.minimum(seq_k, gl.maximum(gl.minimum(first + BM, seq_q) + seq_k - seq_q, 0))
        keys = gl.where(first < seq_q, keys, 0)
        return first, head, head // group, batch, (keys + BN - 1) // BN

    @gluon.jit
    def _produce(
        Q, K, V, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        turns, pairs, tiles, heads, group, seq_q, seq_k,
        CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """Copy the tiles of Q, K and V in the order in which the consumers take them."""
        step = 0
        round = 0
        for turn in range(turns):
            first, head, kv_head, batch, count = _tile(turn, pairs, tiles, heads, group, seq_q, seq_k, CAUSAL, BM, BN)
            if count > 0:
                mbarrier.wait(q_empty, (round & 1) ^ 1)
                mbarrier.expect(q_full, 2 * Q.block_type.nbytes)
                _copy_in(Q, [batch, head, first, 0], q_full, q_smem.index(0))
                _copy_in(Q, [batch, head, first + BM // 2, 0], q_full, q_smem.index(1))
                round += 1
                for i in range(count):
                    key = (count - 1 - i) * BN
                    stage = step % STAGES
                    phase = ((step // STAGES) & 1) ^ 1
                    mbarrier.wait(k_empty.index(stage), phase)
                    mbarrier.expect(k_full.index(stage), K.block_type.nbytes)
                    _copy_in(K, [batch, kv_head, key, 0], k_full.index(stage), k_smem.index(stage))
                    mbarrier.wait(v_empty.index(stage), phase)
                    mbarrier.expect(v_full.index(stage), V.block_type.nbytes)
                    _copy_in(V, [batch, kv_head, key, 0], v_full.index(stage), v_smem.index(stage))
                    step += 1

    @gluon.jit
    def _softmax(
        s, m, l, key, first_pos, seq_k, qk_scale, MASKED: gl.constexpr, CAUSAL: gl.constexpr, HALF: gl.constexpr,
        BN: gl.constexpr, S: gl.constexpr, P: gl.constexpr, dtype: gl.constexpr,
    ):  # fmt: skip
        """(p, alpha, m, l) of the online softmax after a tile of scores s; p is the left operand of a product."""
        if MASKED:
            keys = key + gl.arange(0, BN, layout=gl.SliceLayout(0, S))
            allowed = (keys < seq_k)[None, :]
            if CAUSAL:
                rows = first_pos + gl.arange(0, HALF, layout=gl.SliceLayout(1, S))
                allowed = allowed & (rows[:, None] >= keys[None, :])
            s = gl.where(allowed, s, float("-inf"))
        new_m = gl.maximum(m, gl.max(s, 1) * qk_scale)
        safe_m = new_m
        if MASKED:  # a row may have seen no key yet
            safe_m = gl.where(new_m == float("-inf"), 0.0, new_m)
        p = gl.exp2(s * qk_scale - safe_m[:, None])
        alpha = gl.exp2(m - safe_m)
        l = l * alpha + gl.sum(p, 1)
        return gl.convert_layout(p.to(dtype), P), alpha, new_m, l

    @gluon.jit
    def _consume(
        O, LSE, q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        qk_scale, turns, pairs, tiles, heads, group, seq_q, seq_k,
        WHICH: gl.constexpr, CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """Compute 64 queries of each tile: the half WHICH, 0 or 1."""
        HALF: gl.constexpr = BM // 2
        S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
        A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
        P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
        dtype: gl.constexpr = q_smem.dtype
        q = q_smem.index(WHICH).reshape([HALF, D])
        offset = seq_k - seq_q
        step = 0
        round = 0
        for turn in range(turns):
            first, head, _kv_head, batch, count = _tile(turn, pairs, tiles, heads, group, seq_q, seq_k, CAUSAL, BM, BN)
            mine = first + WHICH * HALF
            m = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, S))
            l = gl.full([HALF], 0.0, gl.float32, gl.SliceLayout(1, S))
            acc = gl.full([HALF, D], 0.0, gl.float32, A)
            if count > 0:
                zero = gl.full([HALF, BN], 0.0, gl.float32, S)
                mbarrier.wait(q_full, round & 1)
                round += 1
                key = (count - 1) * BN
                mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1)
                k = k_smem.index(step % STAGES).reshape([BN, D]).permute((1, 0))
                s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(k_empty.index(step % STAGES), count=1)
                p, _alpha, m, l = _softmax(
                    s, m, l, key, mine + offset, seq_k, qk_scale, True, CAUSAL, HALF, BN, S, P, dtype
                )
                # Tiles whose every key is seen by every row need no mask.
                full = seq_k // BN
                if CAUSAL:
                    full = gl.minimum(full, gl.maximum(mine + offset + 1, 0) // BN)
                masked = gl.maximum(count - 1 - full, 0)
                for i in range(masked):
                    p, acc, m, l = _advance(
                        p, acc, m, l, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, step, key - (i + 1) * BN,
                        mine + offset, seq_k, qk_scale, True, CAUSAL, HALF, BN, D, STAGES, S, A, P, dtype,
                    )  # fmt: skip
                    step += 1
                for i in range(masked, count - 1):
                    p, acc, m, l = _advance(
                        p, acc, m, l, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, step, key - (i + 1) * BN,
                        mine + offset, seq_k, qk_scale, False, CAUSAL, HALF, BN, D, STAGES, S, A, P, dtype,
                    )  # fmt: skip
                    step += 1
                mbarrier.arrive(q_empty, count=1)
                mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)
                v = v_smem.index(step % STAGES).reshape([BN, D])
                acc = warpgroup_mma(p, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(step % STAGES), count=1)
                step += 1
            safe_l = gl.where(l == 0.0, 1.0, l)  # a row without keys gives 0, and -inf for the LSE
            inverse = gl.convert_layout(1.0 / safe_l, gl.SliceLayout(1, A))
            o = o_smem.index(WHICH)
            tma.store_wait(0)  # the output before has left its shared memory
            o.reshape([HALF, D]).store((acc * inverse[:, None]).to(dtype))
            fence_async_shared()
            _copy_out(O, [batch, head, mine, 0], o)
            rows = mine + gl.arange(0, HALF, layout=gl.SliceLayout(1, S))
            lse = (m + gl.log2(safe_l)) * 0.6931471805599453
            gl.store(LSE + (batch * heads + head).to(gl.int64) * seq_q + rows, lse, mask=rows < seq_q)
        tma.store_wait(0)

    @gluon.jit
    def _advance(
        p, acc, m, l, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, step, key, first_pos, seq_k, qk_scale,
        MASKED: gl.constexpr, CAUSAL: gl.constexpr, HALF: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
        STAGES: gl.constexpr, S: gl.constexpr, A: gl.constexpr, P: gl.constexpr, dtype: gl.constexpr,
    ):  # fmt: skip
        """Add P V of tile `step` to acc while the scores of the next tile, which begins at `key`, are computed."""
        stage = step % STAGES
        phase = (step // STAGES) & 1
        later = (step + 1) % STAGES
        mbarrier.wait(k_full.index(later), ((step + 1) // STAGES) & 1)
        k = k_smem.index(later).reshape([BN, D]).permute((1, 0))
        zero = gl.full([HALF, BN], 0.0, gl.float32, S)
        s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(p, v_smem.index(stage).reshape([BN, D]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(later), count=1)
        p, alpha, m, l = _softmax(s, m, l, key, first_pos, seq_k, qk_scale, MASKED, CAUSAL, HALF, BN, S, P, dtype)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        return p, acc * gl.convert_layout(alpha, gl.SliceLayout(1, A))[:, None], m, l

    @gluon.jit(do_not_specialize=["seq_q", "seq_k", "total", "pairs", "tiles"])
    def _hopper_forward_kernel(
        Q, K, V, O, LSE, qk_scale, total, pairs, tiles, heads, group, seq_q, seq_k,
        CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
        PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = Q.dtype
        q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BM // 2, D], Q.layout)
        k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], K.layout)
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], V.layout)
        o_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BM // 2, D], O.layout)
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        mbarrier.init(q_empty, count=2)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
            mbarrier.init(k_empty.index(i), count=2)
            mbarrier.init(v_full.index(i), count=1)
            mbarrier.init(v_empty.index(i), count=2)
        fence_async_shared()
        mine = (total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)  # pairs of this block
        turns = 2 * mine
        gl.warp_specialize(
            [
                (_consume, (
                    O, LSE, q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    qk_scale, turns, pairs, tiles, heads, group, seq_q, seq_k, 0, CAUSAL, BM, BN, D, STAGES,
                )),
                (_consume, (
                    O, LSE, q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    qk_scale, turns, pairs, tiles, heads, group, seq_q, seq_k, 1, CAUSAL, BM, BN, D, STAGES,
                )),
                (_produce, (
                    Q, K, V, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    turns, pairs, tiles, heads, group, seq_q, seq_k, CAUSAL, BM, BN, STAGES,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def takes(form, dtype, *, right: int, chip: int) -> bool:
    """Whether the kernel computes flash attention of this Form (`_tiles.py`) and right bound, where descriptors fit."""
    options = form.left or form.alibi or form.cap or form.sinks or form.packed
    if not (HAS_GLUON and chip == 90) or options or right not in (-1, 0):
        return False
    return dtype in (torch.float16, torch.bfloat16) and form.d == form.v and form.d in HEAD_DIMS


def _descriptor(t, rows):
    """A TMA descriptor of the [b, n, s, d] view t with blocks of `rows` tokens of one head."""
    block = [1, 1, rows, t.shape[3]]
    element = gl.float16 if t.dtype == torch.float16 else gl.bfloat16
    shared = gl.NVMMASharedLayout.get_default_for(block, element)
    unit = ALIGNMENT // t.element_size()  # the stride of a dimension of size 1 may be anything that is aligned
    outer = [stride if size > 1 else unit for size, stride in zip(t.shape[:3], t.stride()[:3])]
    return TensorDescriptor(t, list(t.shape), [*outer, 1], block, shared)


def forward(q, k, v, o, lse, *, qk_scale: float, causal: bool) -> None:
    """Write o and lse [b, n, s], fp32 and contiguous. q, k, v and o are [b, n, s, d] views.

    qk_scale: the softmax scale times log2(e).
    """
    (batch, heads, seq_q, d), (_, kv_heads, seq_k, _) = q.shape, k.shape
    tiles = cdiv(seq_q, BM)
    pairs = cdiv(tiles, 2)
    total = pairs * heads * batch
    descriptors = [_descriptor(t, rows) for t, rows in ((q, HALF), (k, BN), (v, BN), (o, HALF))]
    _hopper_forward_kernel[(min(total, sm_count(q.device)),)](
        *descriptors, lse, qk_scale, total, pairs, tiles, heads, heads // kv_heads, seq_q, seq_k,
        CAUSAL=causal, BM=BM, BN=BN, D=d, STAGES=STAGES, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, num_warps=4,
    )  # fmt: skip
