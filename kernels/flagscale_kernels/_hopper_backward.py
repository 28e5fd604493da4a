r"""The deterministic backward of flash attention for Hopper (sm_90a) in Gluon: one kernel for dK and dV, one for dQ.

As in the forward (`_hopper_attention.py`) one warp copies tiles into shared memory by TMA, and two warpgroups compute: 64
keys each in the first kernel, 64 queries each in the second. While one waits for its products the other computes
exponentials. The left operands of products are read from registers where they are P or dS, and in the second kernel Q and
dO, which stay there. The maths and the names are those of `_bands.py`. A row beyond the end of a sequence is zeros in shared
memory, and no result of it is stored. P is 0 for a query beyond the end, as its LSE is +inf, and for a key it is masked.

What waits for what. `still`, one phase: the consumers, for the four copies of the tiles that stay; each consumer later writes
its results over its own half of them, after its last product has read it. `full[stage]`, phase i // STAGES of step i: the
consumers, for the step's two copies. `empty[stage]`: the producer, before step i, for both consumers' arrivals of step
i - STAGES, that is the phase before; so its first STAGES waits, with the opposite parity, return at once. A consumer arrives
after `warpgroup_mma_wait(0)`: its products have read the stage, and Triton puts a barrier of its 128 threads before the one
thread that arrives (seen in the PTX). Results go out by a fence of the asynchronous proxy, that barrier, and the copy.
"""

from flagscale_kernels._hopper_attention import HALF, HAS_GLUON, _descriptor
from flagscale_kernels._triton import cdiv

TILE = 64  # queries or keys that the warp copies at a time
BLOCK = 2 * HALF  # keys or queries of a block
STAGES = 2
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240

if HAS_GLUON:
    from flagscale_kernels._hopper_attention import (
        _copy_in,
        _copy_out,
        fence_async_shared,
        gl,
        gluon,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    @gluon.jit
    def _produce(
        STILL_A, STILL_B, MOVING_A, MOVING_B, a_smem, b_smem, ring_a, ring_b, still, full, empty,
        batch, still_head, first, first_head, per_head, low, count,
        HALF: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """Copy both halves of the two tiles that stay, and then the tiles of the two tensors that the loop walks over."""
        mbarrier.expect(still, 4 * STILL_A.block_type.nbytes)
        for half in gl.static_range(2):
            _copy_in(STILL_A, [batch, still_head, first + half * HALF, 0], still, a_smem.index(half))
            _copy_in(STILL_B, [batch, still_head, first + half * HALF, 0], still, b_smem.index(half))
        for i in range(count):
            stage = i % STAGES
            row = low + i % per_head * TILE
            head = first_head + i // per_head
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * MOVING_A.block_type.nbytes)
            _copy_in(MOVING_A, [batch, head, row, 0], full.index(stage), ring_a.index(stage))
            _copy_in(MOVING_B, [batch, head, row, 0], full.index(stage), ring_b.index(stage))

    @gluon.jit
    def _put(OUT, smem, value, batch, head, row, dtype: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr):
        """Store a [HALF, D] result through shared memory that nobody reads any more."""
        smem.reshape([HALF, D]).store(value.to(dtype))
        fence_async_shared()
        _copy_out(OUT, [batch, head, row, 0], smem)

    @gluon.jit
    def _consume_keys(
        DK, DV, LSE, DELTA, k_smem, v_smem, q_ring, do_ring, still, full, empty, scale, qk_scale,
        batch, kv_head, first, first_head, per_head, low, count, heads, seq_q, offset,
        WHICH: gl.constexpr, CAUSAL: gl.constexpr, HALF: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """dK and dV of 64 keys."""
        S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
        A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
        P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
        dtype: gl.constexpr = k_smem.dtype
        mine = first + WHICH * HALF
        k = k_smem.index(WHICH).reshape([HALF, D])
        v = v_smem.index(WHICH).reshape([HALF, D])
        dk = gl.full([HALF, D], 0.0, gl.float32, A)
        dv = gl.full([HALF, D], 0.0, gl.float32, A)
        zero = gl.full([HALF, TILE], 0.0, gl.float32, S)
        keys = mine + gl.arange(0, HALF, layout=gl.SliceLayout(1, S))
        columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, S))
        mbarrier.wait(still, 0)
        for i in range(count):
            stage = i % STAGES
            rows = low + i % per_head * TILE + columns
            statistics = (batch * heads + first_head + i // per_head).to(gl.int64) * seq_q
            lse = gl.load(LSE + statistics + rows, mask=rows < seq_q, other=float("inf"))
            delta = gl.load(DELTA + statistics + rows, mask=rows < seq_q, other=0.0)
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            q = q_ring.index(stage).reshape([TILE, D])
            do = do_ring.index(stage).reshape([TILE, D])
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            if CAUSAL:
                s = gl.where((rows + offset)[None, :] >= keys[:, None], s, float("-inf"))
            p = gl.exp2(s * qk_scale - lse[None, :])
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = p * (dp - delta[None, :])
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), P), do, dv, is_async=True)
            dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), P), q, dk, is_async=True)
            dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
            mbarrier.arrive(empty.index(stage), count=1)
        _put(DK, k_smem.index(WHICH), dk * scale, batch, kv_head, mine, dtype, HALF, D)
        _put(DV, v_smem.index(WHICH), dv, batch, kv_head, mine, dtype, HALF, D)
        tma.store_wait(0)

    @gluon.jit
    def _consume_queries(
        DQ, LSE, DELTA, q_smem, do_smem, k_ring, v_ring, still, full, empty, scale, qk_scale,
        batch, head, first, count, heads, seq_q, seq_k, offset,
        WHICH: gl.constexpr, CAUSAL: gl.constexpr, HALF: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """dQ of 64 queries."""
        S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
        A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
        X: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
        P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
        dtype: gl.constexpr = q_smem.dtype
        mine = first + WHICH * HALF
        rows = mine + gl.arange(0, HALF, layout=gl.SliceLayout(1, S))
        columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, S))
        statistics = (batch * heads + head).to(gl.int64) * seq_q
        lse = gl.load(LSE + statistics + rows, mask=rows < seq_q, other=float("inf"))
        delta = gl.load(DELTA + statistics + rows, mask=rows < seq_q, other=0.0)
        dq = gl.full([HALF, D], 0.0, gl.float32, A)
        zero = gl.full([HALF, TILE], 0.0, gl.float32, S)
        mbarrier.wait(still, 0)
        q = q_smem.index(WHICH).reshape([HALF, D]).load(X)
        do = do_smem.index(WHICH).reshape([HALF, D]).load(X)
        for i in range(count):
            stage = i % STAGES
            keys = i * TILE + columns
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            k = k_ring.index(stage).reshape([TILE, D])
            v = v_ring.index(stage).reshape([TILE, D])
            s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            if CAUSAL:
                s = gl.where((rows + offset)[:, None] >= keys[None, :], s, float("-inf"))
            else:  # the exponential of a key of zeros behind the last one can be infinite, and infinity times 0 is nan
                s = gl.where((keys < seq_k)[None, :], s, float("-inf"))
            p = gl.exp2(s * qk_scale - lse[:, None])
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = p * (dp - delta[:, None])
            dq = warpgroup_mma(gl.convert_layout(ds.to(dtype), P), k, dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq])
            mbarrier.arrive(empty.index(stage), count=1)
        _put(DQ, q_smem.index(WHICH), dq * scale, batch, head, mine, dtype, HALF, D)
        tma.store_wait(0)

    @gluon.jit
    def _barriers(STAGES: gl.constexpr):
        """(of the tiles that stay, of the full and of the empty stages of the ring)"""
        still = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        mbarrier.init(still, count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=2)
        fence_async_shared()
        return still, full, empty

    @gluon.jit(do_not_specialize=["seq_q", "seq_k", "tiles"])
    def _hopper_dkdv_kernel(
        Q, K, V, DO, DK, DV, LSE, DELTA, scale, qk_scale, tiles, heads, group, seq_q, seq_k,
        CAUSAL: gl.constexpr, HALF: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
        PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = Q.dtype
        k_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], K.layout)
        v_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], V.layout)
        q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], Q.layout)
        do_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], DO.layout)
        still, full, empty = _barriers(STAGES)
        first = gl.program_id(0) % tiles * (2 * HALF)
        rest = gl.program_id(0) // tiles
        kv_head = rest % (heads // group)
        batch = rest // (heads // group)
        offset = seq_k - seq_q
        low = 0
        if CAUSAL:  # the first query that sees the first key
            low = gl.minimum(gl.maximum(first - offset, 0), seq_q) // TILE * TILE
        per_head = gl.maximum((seq_q - low + TILE - 1) // TILE, 1)
        count = (seq_q - low + TILE - 1) // TILE * group
        first_head = kv_head * group
        gl.warp_specialize(
            [
                (_consume_keys, (
                    DK, DV, LSE, DELTA, k_smem, v_smem, q_ring, do_ring, still, full, empty, scale, qk_scale,
                    batch, kv_head, first, first_head, per_head, low, count, heads, seq_q, offset,
                    0, CAUSAL, HALF, TILE, D, STAGES,
                )),
                (_consume_keys, (
                    DK, DV, LSE, DELTA, k_smem, v_smem, q_ring, do_ring, still, full, empty, scale, qk_scale,
                    batch, kv_head, first, first_head, per_head, low, count, heads, seq_q, offset,
                    1, CAUSAL, HALF, TILE, D, STAGES,
                )),
                (_produce, (
                    K, V, Q, DO, k_smem, v_smem, q_ring, do_ring, still, full, empty,
                    batch, kv_head, first, first_head, per_head, low, count, HALF, TILE, STAGES,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip

    @gluon.jit(do_not_specialize=["seq_q", "seq_k", "tiles"])
    def _hopper_dq_kernel(
        Q, K, V, DO, DQ, LSE, DELTA, scale, qk_scale, tiles, heads, group, seq_q, seq_k,
        CAUSAL: gl.constexpr, HALF: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
        PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = Q.dtype
        q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], Q.layout)
        do_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], DO.layout)
        k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], K.layout)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], V.layout)
        still, full, empty = _barriers(STAGES)
        first = (tiles - 1 - gl.program_id(0) % tiles) * (2 * HALF)  # late queries have the most keys
        rest = gl.program_id(0) // tiles
        head = rest % heads
        batch = rest // heads
        offset = seq_k - seq_q
        keys = seq_k
        if CAUSAL:
            keys = gl.minimum(seq_k, gl.maximum(gl.minimum(first + 2 * HALF, seq_q) + offset, 0))
        count = (keys + TILE - 1) // TILE
        gl.warp_specialize(
            [
                (_consume_queries, (
                    DQ, LSE, DELTA, q_smem, do_smem, k_ring, v_ring, still, full, empty, scale, qk_scale,
                    batch, head, first, count, heads, seq_q, seq_k, offset, 0, CAUSAL, HALF, TILE, D, STAGES,
                )),
                (_consume_queries, (
                    DQ, LSE, DELTA, q_smem, do_smem, k_ring, v_ring, still, full, empty, scale, qk_scale,
                    batch, head, first, count, heads, seq_q, seq_k, offset, 1, CAUSAL, HALF, TILE, D, STAGES,
                )),
                (_produce, (
                    Q, DO, K, V, q_smem, do_smem, k_ring, v_ring, still, full, empty,
                    batch, head, first, head // group, gl.maximum(count, 1), 0, count, HALF, TILE, STAGES,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def _constants(q, causal):
    return {
        "CAUSAL": causal, "HALF": HALF, "TILE": TILE, "D": q.shape[3], "STAGES": STAGES, "num_warps": 4,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS, "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
    }  # fmt: skip


def dkdv(q, k, v, do, dk, dv, lse2, delta, *, scale: float, qk_scale: float, causal: bool) -> None:
    """Write dk and dv. Tensors are [b, n, s, d] views; lse2 (base 2) and delta are [b, n, s], fp32 and contiguous."""
    (batch, heads, seq_q, _), (_, kv_heads, seq_k, _) = q.shape, k.shape
    tiles = cdiv(seq_k, BLOCK)
    pairs = ((q, TILE), (k, HALF), (v, HALF), (do, TILE), (dk, HALF), (dv, HALF))
    _hopper_dkdv_kernel[(tiles * kv_heads * batch,)](
        *(_descriptor(t, rows) for t, rows in pairs), lse2, delta, scale, qk_scale, tiles, heads, heads // kv_heads, seq_q,
        seq_k, **_constants(q, causal),
    )  # fmt: skip


def dq(q, k, v, do, dq, lse2, delta, *, scale: float, qk_scale: float, causal: bool) -> None:
    """Write dq. The arguments are those of `dkdv`."""
    (batch, heads, seq_q, _), (_, kv_heads, seq_k, _) = q.shape, k.shape
    tiles = cdiv(seq_q, BLOCK)
    pairs = ((q, HALF), (k, TILE), (v, TILE), (do, HALF), (dq, HALF))
    _hopper_dq_kernel[(tiles * heads * batch,)](
        *(_descriptor(t, rows) for t, rows in pairs), lse2, delta, scale, qk_scale, tiles, heads, heads // kv_heads, seq_q,
        seq_k, **_constants(q, causal),
    )  # fmt: skip
