"""The table of tensors that are saved for the backward pass, from which all activation figures come.

An entry is a storage that autograd holds; a storage of which several operators saved a view is one entry. Entries depend on
the model (Shape) and on its operators (Operators). An operator that is changed to save something else is changed in
BLOCK_SAVES' functions or `head_saves`, and nowhere else; tests/planner/test_activations.py compares the table with what
saved_tensors_hooks see in a real step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from flagscale_like.arch import GatedFeedForward, GroupedQueryAttention
from flagscale_like.config import Kernels, Lora
from flagscale_like.planner.layout import Layout, Shape

Saves = Literal["torch", "fused"]
MIN_CHUNK_TOKENS = 1024  # of flagscale_kernels.linear_cross_entropy, which this module does not import: it needs torch


@dataclass(frozen=True, kw_only=True)
class Operators:
    """What the operators save: `torch` is autograd over plain operators, `fused` saves inputs and a number a row.

    Attributes:
        linear_cross_entropy: the output layer and the loss are one operator, which holds a chunk of the logits at a time and
            computes them again in the backward pass.
        lora: adapters beside the matrices, which then keep no input of theirs; None without LoRA.
    """

    rms_norm: Saves = "torch"
    swiglu: Saves = "torch"
    cross_entropy: Saves = "torch"
    linear_cross_entropy: bool = False
    lora: Lora | None = None


FUSED = Operators(rms_norm="fused", swiglu="fused", cross_entropy="fused")
FUSED_ON_GPU = replace(FUSED, linear_cross_entropy=True)


def operators_of(kernels: Kernels, *, cuda: bool) -> Operators:
    """What the model runs with the configured kernels.

    flagscale_kernels save the same with Triton and with torch; only kernels.linear_cross_entropy changes what is saved.

    Args:
        cuda: the devices are GPUs.
    """
    choice = kernels.linear_cross_entropy
    return replace(FUSED, linear_cross_entropy=choice == "fused" or (choice == "auto" and cuda))


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A storage kept for the backward pass of one micro-batch on one rank.

    Attributes:
        in_core_attention: selective recompute drops it.
    """

    name: str
    bytes: float
    in_core_attention: bool = False


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch on one rank.

    Attributes:
        rows: tokens.
        rows_sp: tokens that this rank's norms and residuals see: a part of them under sequence parallelism.
        tp: ranks that heads and FFN channels are cut over.
        exchanges: core attention works on exchanged copies of q, k and v (cp_kind a2a).
        dtype_bytes: of an activation.
    """

    rows: float
    rows_sp: float
    tp: int
    exchanges: bool
    dtype_bytes: int

    @classmethod
    def of(cls, layout: Layout, seq_length: int, dtype_bytes: int) -> MicroBatch:
        rows = layout.rows(seq_length)
        rows_sp = rows / layout.tp if layout.sp else rows
        exchanges = layout.cp > 1 and layout.cp_kind == "a2a"
        return cls(rows=rows, rows_sp=rows_sp, tp=layout.tp, exchanges=exchanges, dtype_bytes=dtype_bytes)


def layer_saves(shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, ops: Operators) -> list[Saved]:
    """All that one layer keeps without recompute."""
    if shape.layer is None:
        return _gpt_layer(shape, layout, seq_length, dtype_bytes)
    batch = MicroBatch.of(layout, seq_length, dtype_bytes)
    attention, feed_forward = shape.layer.attention, shape.layer.feed_forward
    norm = _norm(batch.rows_sp, shape.hidden, dtype_bytes, ops)
    saves = [
        Saved(name="attention norm", bytes=norm),
        *BLOCK_SAVES[type(attention)](attention, batch, ops),
        Saved(name="MLP norm", bytes=norm),
        *BLOCK_SAVES[type(feed_forward)](feed_forward, batch, ops),
    ]
    return saves if ops.lora is None else _with_adapters(saves, shape, batch, ops.lora)


# Inputs that a matrix keeps for its own gradient alone, by the matrix.
KEPT_FOR = {
    "linear_qkv": "input of the QKV product",
    "linear_fc1": "input of the gate and up product",
    "linear_fc2": "input of the down product",
}


def _with_adapters(saves: list[Saved], shape: Shape, batch: MicroBatch, lora: Lora) -> list[Saved]:
    """What a layer keeps with LoRA: the inputs of the matrices with an adapter, which A needs, and what the adapters keep."""
    unused = {name for matrix, name in KEPT_FOR.items() if matrix not in lora.targets or lora.dropout}
    found = [save for save in saves if save.name not in unused]
    e, rows, rows_sp = batch.dtype_bytes, batch.rows, batch.rows_sp
    for b in (parameter for parameter in shape.adapters if parameter.name.endswith(".b")):
        # Of a matrix that is cut by rows, A x is whole on every rank; else a part of the sequence with SP.
        found.append(Saved(name=f"A x beside {b.name}", bytes=(rows if b.cut == 0 else rows_sp) * b.shape[1] * e))
    return found + [save for matrix in lora.targets for save in _adapter_extras(matrix, shape, batch, lora)]


def _adapter_extras(matrix: str, shape: Shape, batch: MicroBatch, lora: Lora) -> list[Saved]:
    """What dropout and DoRA keep beside one matrix."""
    a, b = (next(p for p in shape.adapters if p.name.endswith(f"{matrix}.lora.{letter}")) for letter in "ab")
    by_rows, e = b.cut == 0, batch.dtype_bytes
    inputs = batch.rows_sp * a.shape[1] if by_rows else batch.rows * a.shape[1] / batch.tp
    outputs = batch.rows * b.shape[0] / batch.tp if by_rows else batch.rows_sp * b.shape[0]
    extras = []
    if lora.dropout:
        extras.append(Saved(name=f"input of A of {matrix} after dropout, and the mask", bytes=inputs * (e + 1)))
    if lora.dora:
        extras.append(Saved(name=f"output of {matrix} before its length", bytes=outputs * e))
    return extras


def _qkv_output(block: GroupedQueryAttention, batch: MicroBatch) -> float:
    """Bytes of what q, k and v are views of. Where ranks share a KV group, megatron-core gathers the rows of all ranks."""
    shards = batch.tp if block.groups >= batch.tp else 1
    return batch.rows * (block.heads + 2 * block.groups) * block.head_dim * batch.dtype_bytes / shards


def _attention(block: GroupedQueryAttention, batch: MicroBatch, ops: Operators) -> list[Saved]:
    rows, e, d = batch.rows, batch.dtype_bytes, block.head_dim
    n, g = block.heads / batch.tp, max(1, block.groups / batch.tp)
    alibi = block.position.kind == "alibi"
    saves = [Saved(name="input of the QKV product", bytes=batch.rows_sp * block.hidden_size * e)]
    if alibi or block.qk_norm:  # k is kept as the QKV product wrote it, and so v and q with it
        saves.append(Saved(name="output of the QKV product", bytes=_qkv_output(block, batch)))
    else:
        saves.append(Saved(name="v, copied", bytes=rows * g * d * e, in_core_attention=True))
    if not alibi or (n > g > 1):
        saves.append(Saved(name="rotated q, or a copy of q", bytes=rows * n * d * e, in_core_attention=not alibi))
    if not alibi:
        saves.append(Saved(name="rotated k", bytes=rows * g * d * e, in_core_attention=True))
    if block.position.kind == "nlpe":
        saves.append(Saved(name="second q, rotated for far keys", bytes=rows * n * d * e, in_core_attention=True))
        if block.position.far == "compressed" or not block.qk_norm:
            saves.append(Saved(name="second k, rotated or copied", bytes=rows * g * d * e, in_core_attention=True))
    if block.qk_norm:
        saves.append(Saved(name="norms of q and k", bytes=_norm(rows * (n + g), d, e, ops)))
    if batch.exchanges:
        if block.qk_norm:
            saves.append(Saved(name="v, exchanged", bytes=rows * g * d * e, in_core_attention=True))
        saves.append(Saved(name="attention output before its exchange", bytes=rows * n * d * e, in_core_attention=True))
    saves.append(Saved(name="log-sum-exp of the scores, fp32", bytes=rows * n * 4, in_core_attention=True))
    saves.append(Saved(name="attention output, input of the projection", bytes=rows * n * d * e))
    return saves


def _gated_feed_forward(block: GatedFeedForward, batch: MicroBatch, ops: Operators) -> list[Saved]:
    rows, e, f = batch.rows, batch.dtype_bytes, block.ffn_hidden_size / batch.tp
    saves = [
        Saved(name="input of the gate and up product", bytes=batch.rows_sp * block.hidden_size * e),
        Saved(name="gate and up", bytes=rows * 2 * f * e),
        Saved(name="input of the down product", bytes=rows * f * e),
    ]
    if ops.swiglu == "torch":
        saves.append(Saved(name="silu(gate)", bytes=rows * f * e))
    return saves


def _attention_checkpoint(block: GroupedQueryAttention, batch: MicroBatch) -> float:
    """Bytes that selective recompute keeps on top: the inputs of core attention, where nothing else keeps them."""
    rows, e, d = batch.rows, batch.dtype_bytes, block.head_dim
    n, g = block.heads / batch.tp, max(1, block.groups / batch.tp)
    if block.qk_norm:
        return rows * (n + g) * d * e
    if block.position.kind == "alibi":
        return 0.0
    # q's heads of several groups lie apart in the QKV product's output, so megatron-core hands over a copy of q.
    return _qkv_output(block, batch) + (rows * n * d * e if n > g > 1 else 0.0)


# What each class of block in flagscale_like.arch saves; and what selective recompute keeps of an attention block's inputs.
BLOCK_SAVES = {GroupedQueryAttention: _attention, GatedFeedForward: _gated_feed_forward}
CHECKPOINT_BYTES = {GroupedQueryAttention: _attention_checkpoint}


def _norm(rows: float, hidden: int, dtype_bytes: int, ops: Operators) -> float:
    if ops.rms_norm == "fused":
        return rows * hidden * dtype_bytes + rows * 4  # x, which is the residual stream, and 1/rms
    return rows * hidden * (4 + 4) + rows * 4  # x and x/rms in fp32, and 1/rms


def _gpt_layer(shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int) -> list[Saved]:
    """Korthikanti et al. 2022, section 4: sbh(34 + 5as/h) bytes in 16 bits, divided as in their table 2."""
    b, t = layout.micro_batch_size, layout.tp
    rows = seq_length * b
    rows_sp = rows / t if layout.sp else rows
    h, e, n = shape.hidden, dtype_bytes, shape.heads / t
    scores = n * seq_length * rows
    return [
        Saved(name="attention LayerNorm input", bytes=rows_sp * h * e),
        Saved(name="input of the QKV product", bytes=rows_sp * h * e),
        Saved(name="q and k", bytes=rows / t * h * 2 * e),
        Saved(name="v", bytes=rows / t * h * e),
        Saved(name="softmax output", bytes=scores * e, in_core_attention=True),
        Saved(name="attention dropout mask", bytes=scores, in_core_attention=True),
        Saved(name="attention dropout output", bytes=scores * e, in_core_attention=True),
        Saved(name="input of the projection", bytes=rows / t * h * e),
        Saved(name="residual dropout mask", bytes=rows_sp * h),
        Saved(name="MLP LayerNorm input", bytes=rows_sp * h * e),
        Saved(name="input of the first MLP product", bytes=rows_sp * h * e),
        Saved(name="GeLU input", bytes=rows / t * shape.ffn * e),
        Saved(name="input of the second MLP product", bytes=rows / t * shape.ffn * e),
        Saved(name="MLP dropout mask", bytes=rows_sp * h),
    ]


def layer_bytes(shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, ops: Operators) -> float:
    """Bytes that one layer keeps for one micro-batch on one rank, after its recompute choice."""
    rows = layout.rows(seq_length)
    if layout.recompute == "full":  # only its input
        return (rows / layout.tp if layout.sp else rows) * shape.hidden * dtype_bytes
    saves = layer_saves(shape, layout, seq_length, dtype_bytes, ops)
    if layout.recompute == "none":
        return sum(s.bytes for s in saves)
    kept = sum(s.bytes for s in saves if not s.in_core_attention)
    if shape.layer is None:
        return kept
    attention = shape.layer.attention
    return kept + CHECKPOINT_BYTES[type(attention)](attention, MicroBatch.of(layout, seq_length, dtype_bytes))


def head_saves(shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, ops: Operators) -> list[Saved]:
    """What the last stage keeps after its layers: final norm, output layer, cross-entropy."""
    rows = layout.rows(seq_length)
    rows_sp = rows / layout.tp if layout.sp else rows
    logits = rows * shape.vocab / layout.tp
    saves = [
        Saved(name="final norm", bytes=_norm(rows_sp, shape.hidden, dtype_bytes, ops)),
    ]
    if (
        not shape.adapters or ops.linear_cross_entropy
    ):  # LoRA leaves the output layer as it is, which then keeps no input
        saves.append(Saved(name="input of the output layer", bytes=rows_sp * shape.hidden * dtype_bytes))
    if shape.norm_head:
        matrix = shape.vocab / layout.tp * (shape.hidden + 2) * dtype_bytes
        saves.append(Saved(name="output matrix with rows of length 1, and their lengths", bytes=matrix))
    if ops.linear_cross_entropy:
        saves.append(Saved(name="labels, log-sum-exp and mask", bytes=rows * (8 + 4 + 1)))
    elif ops.cross_entropy == "fused":
        saves.append(Saved(name="logits", bytes=logits * dtype_bytes))
        saves.append(Saved(name="labels, log-sum-exp and mask", bytes=rows * (8 + 4 + 1)))
    else:
        saves.append(Saved(name="softmax of the logits, fp32", bytes=logits * 4))
        saves.append(Saved(name="labels and mask", bytes=rows * (8 + 1)))
    return saves


def logits_for_a_moment(shape: Shape, layout: Layout, seq_length: int, ops: Operators) -> float:
    """Elements of logits that the last stage holds beside what is saved: all of one micro-batch's, or one chunk's."""
    rows, columns = layout.rows(seq_length), shape.vocab / layout.tp
    if ops.linear_cross_entropy:
        rows = min(rows, max(MIN_CHUNK_TOKENS, rows * shape.hidden // int(columns)))
    return rows * columns


def embedding_saves(layout: Layout, seq_length: int) -> list[Saved]:
    """What the first stage keeps before its layers: the token ids, and under tensor parallelism which of them are its own."""
    rows = layout.rows(seq_length)
    return [Saved(name="token ids", bytes=rows * (8 + (1 if layout.tp > 1 else 0)))]
