"""The table of tensors that are saved for the backward pass, from which all activation figures come.

An entry is a storage that autograd holds; a storage of which several operators saved a view is one entry. Entries depend on
the model (Shape) and on its operators (Operators). An operator that is changed to save something else is changed in
BLOCK_SAVES' functions or `head_saves`, and nowhere else; tests/planner/test_activations.py compares the table with what
saved_tensors_hooks see in a real step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from flagscale_like.arch import (
    Block,
    Experts,
    GatedFeedForward,
    GroupedQueryAttention,
    MixtureOfExperts,
    MultiLatentAttention,
    Parameter,
    Role,
)
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
        outputs: see Shape.
    """

    rms_norm: Saves = "torch"
    swiglu: Saves = "torch"
    cross_entropy: Saves = "torch"
    linear_cross_entropy: bool = False
    lora: Lora | None = None
    outputs: int | None = None


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
        sequences: rows of the micro-batch.
        exchanges: core attention works on exchanged copies of q, k and v (cp_kind a2a).
        ep: ranks that experts are cut over.
        fullest: tokens that come to the rank with the most, relative to the mean.
        dtype_bytes: of an activation.
    """

    rows: float
    rows_sp: float
    sequences: int
    tp: int
    exchanges: bool
    ep: int
    fullest: float
    dtype_bytes: int

    @classmethod
    def of(cls, layout: Layout, seq_length: int, dtype_bytes: int) -> MicroBatch:
        rows = layout.rows(seq_length)
        rows_sp = rows / layout.tp if layout.sp else rows
        exchanges = layout.cp > 1 and layout.cp_kind == "a2a"
        return cls(
            rows=rows,
            rows_sp=rows_sp,
            sequences=layout.micro_batch_size,
            tp=layout.tp,
            exchanges=exchanges,
            ep=layout.ep,
            fullest=layout.fullest,
            dtype_bytes=dtype_bytes,
        )

    def routed(self, top_k: int) -> float:
        """Tokens that come to the experts of the rank with the most, once for each expert that they go to."""
        return self.rows_sp * top_k * self.fullest


def layer_saves(
    shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, ops: Operators, layer: int = 0
) -> list[Saved]:
    """All that one layer keeps without recompute.

    Args:
        layer: its number.
    """
    if not shape.decoder:
        return _gpt_layer(shape, layout, seq_length, dtype_bytes)
    batch = MicroBatch.of(layout, seq_length, dtype_bytes)
    attention, feed_forward = shape.decoder[layer].attention, shape.decoder[layer].feed_forward
    norm = norm_saves(batch.rows_sp, shape.hidden, dtype_bytes, ops)
    saves = [
        Saved(name="attention norm", bytes=norm),
        *BLOCK_SAVES[type(attention)](attention, batch, ops),
        Saved(name="MLP norm", bytes=norm),
        *BLOCK_SAVES[type(feed_forward)](feed_forward, batch, ops),
    ]
    return saves if ops.lora is None else _with_adapters(saves, shape, layer, batch, ops.lora)


# Inputs that a matrix keeps for its own gradient alone, and the matrix.
KEPT_FOR = {
    "input of the QKV product": "linear_qkv",
    "input of the projections down": "linear_q_proj",
    "input of the projection up to q": "linear_q_up_proj",
    "input of the projection up to k and v": "linear_kv_up_proj",
    "input of the gate and up product": "linear_fc1",
    "input of the down product": "linear_fc2",
    "input of the experts' gate and up product": "linear_fc1",
    "input of the experts' down product": "linear_fc2",
}


def _with_adapters(saves: list[Saved], shape: Shape, layer: int, batch: MicroBatch, lora: Lora) -> list[Saved]:
    """What a layer keeps with LoRA: the inputs of the matrices with an adapter, which A needs, and what the adapters keep."""
    unused = {name for name, matrix in KEPT_FOR.items() if matrix not in lora.targets or lora.dropout}
    found = [save for save in saves if save.name not in unused]
    adapters = shape.adapters_of(layer)
    of_a = {parameter.place_in_layer: parameter for parameter in adapters if parameter.role is Role.ADAPTER_A}
    for b in (parameter for parameter in adapters if parameter.role is Role.ADAPTER_B):
        found += _adapter(of_a[b.place_in_layer], b, batch, lora, batch.routed(shape.top_k))
    return found


def _adapter(a: Parameter, b: Parameter, batch: MicroBatch, lora: Lora, routed: float) -> list[Saved]:
    """What the adapter of one matrix keeps: A x, and with dropout and DoRA what they need.

    Args:
        routed: tokens that come to this rank's experts.
    """
    e, matrix = batch.dtype_bytes, b.place_in_layer.removesuffix(".lora")
    out, inner = b.shape[-2], a.shape[-1]
    if b.experts:
        inputs, outputs, low = routed * inner, routed * out, routed
    elif b.cut == 0:  # the matrix is cut by rows: A x is whole on every rank
        inputs, outputs, low = batch.rows_sp * inner, batch.rows * out / batch.tp, batch.rows
    else:
        inputs, outputs, low = batch.rows * inner / batch.tp, batch.rows_sp * out, batch.rows_sp
    kept = [Saved(name=f"A x beside {matrix}", bytes=low * b.shape[-1] * e)]
    if lora.dropout:
        kept.append(Saved(name=f"input of A of {matrix} after dropout, and the mask", bytes=inputs * (e + 1)))
    if lora.dora:
        kept.append(Saved(name=f"output of {matrix} before its length", bytes=outputs * e))
        if b.experts:
            kept.append(Saved(name=f"rows' lengths beside {matrix}, and whose", bytes=outputs * e + routed * 8))
    return kept


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
        norms = norm_saves(rows * (n + g), d, e, ops)
        if block.qk_norm_over == "projection":  # 1/rms of a token's q and k, and not of each head's
            norms += 4 * rows * (2 - n - g)
            if g == 1 and batch.tp > 1:  # q and k of one group are views of the QKV product's output
                norms = 4 * rows * 2
        saves.append(Saved(name="norms of q and k", bytes=norms))
    if batch.exchanges:
        if block.qk_norm:
            saves.append(Saved(name="v, exchanged", bytes=rows * g * d * e, in_core_attention=True))
        saves.append(Saved(name="attention output before its exchange", bytes=rows * n * d * e, in_core_attention=True))
    saves.append(Saved(name="log-sum-exp of the scores, fp32", bytes=rows * n * 4, in_core_attention=True))
    saves.append(Saved(name="attention output, input of the projection", bytes=rows * n * d * e))
    return saves


def _latent_attention(block: MultiLatentAttention, batch: MicroBatch, ops: Operators) -> list[Saved]:
    rows, rows_sp, e, x = batch.rows, batch.rows_sp, batch.dtype_bytes, block.latent
    n = block.heads / batch.tp
    heads = rows * n * x.head_dim * e
    saves = [Saved(name="input of the projections down", bytes=rows_sp * block.hidden_size * e)]
    for name, rank in (("q", x.q_lora_rank), ("k and v", x.kv_lora_rank)):
        if rank is not None:
            saves.append(Saved(name=f"norm of the latent {name}", bytes=norm_saves(rows_sp, rank, e, ops)))
            saves.append(Saved(name=f"input of the projection up to {name}", bytes=rows_sp * rank * e))
    core = {"rotated q": heads, "rotated k": heads, "v, padded": heads, "log-sum-exp of the scores, fp32": rows * n * 4}
    if x.v_head_dim < x.head_dim or batch.exchanges:
        core["attention output, padded"] = heads
    saves += [Saved(name=name, bytes=held, in_core_attention=True) for name, held in core.items()]
    saves.append(Saved(name="attention output, input of the projection", bytes=rows * n * x.v_head_dim * e))
    return saves


def _gated_feed_forward(block: GatedFeedForward, batch: MicroBatch, ops: Operators) -> list[Saved]:
    return [
        Saved(name="input of the gate and up product", bytes=batch.rows_sp * block.hidden_size * batch.dtype_bytes),
        *_swiglu(batch.rows, block.ffn_hidden_size / batch.tp, batch.dtype_bytes, ops),
    ]


def _swiglu(rows: float, ffn: float, dtype_bytes: int, ops: Operators, whose: str = "") -> list[Saved]:
    element = rows * ffn * dtype_bytes
    saves = [
        Saved(name=f"{whose}gate and up", bytes=2 * element),
        Saved(name=f"input of the {whose}down product", bytes=element),
    ]
    if ops.swiglu == "torch":
        saves.append(Saved(name=f"{whose}silu(gate)", bytes=element))
    return saves


def _mixture_of_experts(block: MixtureOfExperts, batch: MicroBatch, ops: Operators) -> list[Saved]:
    x, h, e = block.experts, block.hidden_size, batch.dtype_bytes
    routed = batch.routed(x.top_k)
    saves = [
        Saved(name="input of the router and of the shared FFN", bytes=batch.rows_sp * h * e),
        *_router(x, batch),
        *_dispatcher(x, batch),
        Saved(name="input of the experts' gate and up product", bytes=routed * h * e),
        *_swiglu(routed, x.ffn_hidden_size, e, ops, "experts' "),
        Saved(name="weights of the tokens that came, fp32", bytes=routed * 4),
    ]
    if x.shared_ffn_hidden_size:
        saves += _swiglu(batch.rows, x.shared_ffn_hidden_size / batch.tp, e, ops)
    if x.shared_gate:
        saves.append(Saved(name="output of the shared FFN, and its gate", bytes=batch.rows_sp * (h + 1) * e))
    return saves


def _router(experts: Experts, batch: MicroBatch) -> list[Saved]:
    """Logits and scores are fp32, and indices int64."""
    t, k = batch.rows_sp, experts.top_k
    scores = t * experts.count * 4  # of all experts
    indices = t * k * 8
    saves = [Saved(name="experts of each token", bytes=indices)]
    if experts.score == "sigmoid":
        # Of the chosen ones, and their sum, by which they are divided.
        saves.append(Saved(name="scores", bytes=scores + (t * (k + 1) * 4 if experts.normalize else 0)))
    else:
        saves.append(Saved(name="scores", bytes=t * k * 4 if experts.normalize else scores))
    if experts.groups > 1:
        best = 1 if experts.group_score == "max" else 2
        bytes_ = t * experts.groups * (best * 8 + 1) + t * experts.top_groups * 8
        saves.append(Saved(name="best of each group, and the groups chosen", bytes=bytes_))
    rows = t * batch.sequences * 4  # which row a token is of
    if experts.balances:
        bytes_ = scores + indices + (t * 4 if experts.score == "sigmoid" else 0)
        bytes_ += t * 4 if experts.balance == "batch" else rows
        saves.append(Saved(name="scores and choice of the auxiliary loss", bytes=bytes_))
    if experts.z_loss:
        own = 0 if experts.balances and experts.balance == "sequence" else rows
        saves.append(Saved(name="logits, and their log-sum-exp", bytes=scores + t * 4 + own))
    return saves


def _dispatcher(experts: Experts, batch: MicroBatch) -> list[Saved]:
    """What putting tokens in the order of the experts keeps: LocalDispatcher, or megatron-core's all-to-all dispatcher."""
    t, chosen = batch.rows_sp, batch.rows_sp * experts.top_k
    weights = Saved(name="weights of each token's experts, fp32", bytes=t * experts.count * 4)
    if batch.ep == 1:
        # Order, inverse and tokens of the choices, and the experts of each token in their order.
        return [weights, Saved(name="permutation", bytes=4 * chosen * 8)]
    return [weights, Saved(name="permutation and map of the choices", bytes=chosen * 8 + t * experts.count)]


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


def _latent_checkpoint(block: MultiLatentAttention, batch: MicroBatch) -> float:
    """Likewise: q, k, and the product that v is a part of."""
    x = block.latent
    channels = 2 * x.head_dim + x.qk_nope_head_dim + x.v_head_dim
    return batch.rows * block.heads / batch.tp * channels * batch.dtype_bytes


# What each class of block in flagscale_like.arch saves; and what selective recompute keeps of an attention block's inputs.
BLOCK_SAVES: dict[type[Block], Callable[..., list[Saved]]] = {
    GroupedQueryAttention: _attention,
    MultiLatentAttention: _latent_attention,
    GatedFeedForward: _gated_feed_forward,
    MixtureOfExperts: _mixture_of_experts,
}
CHECKPOINT_BYTES: dict[type[Block], Callable[..., float]] = {
    GroupedQueryAttention: _attention_checkpoint,
    MultiLatentAttention: _latent_checkpoint,
}


def norm_saves(rows: float, hidden: int, dtype_bytes: int, ops: Operators) -> float:
    """Bytes that an RMSNorm of [rows, hidden] saves."""
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


def layer_bytes(
    shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, ops: Operators, layer: int = 0
) -> float:
    """Bytes that one layer keeps for one micro-batch on one rank, after its recompute choice.

    Args:
        layer: its number.
    """
    rows = layout.rows(seq_length)
    if layout.recompute == "full":  # only its input
        return (rows / layout.tp if layout.sp else rows) * shape.hidden * dtype_bytes
    saves = layer_saves(shape, layout, seq_length, dtype_bytes, ops, layer)
    if layout.recompute == "none":
        return sum(s.bytes for s in saves)
    kept = sum(s.bytes for s in saves if not s.in_core_attention)
    if not shape.decoder:
        return kept
    attention = shape.decoder[layer].attention
    return kept + CHECKPOINT_BYTES[type(attention)](attention, MicroBatch.of(layout, seq_length, dtype_bytes))


def head_saves(shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, ops: Operators) -> list[Saved]:
    """What the last stage keeps after its layers: final norm, output layer, cross-entropy."""
    rows = layout.rows(seq_length)
    rows_sp = rows / layout.tp if layout.sp else rows
    logits = rows * shape.vocab / layout.tp
    saves = [
        Saved(name="final norm", bytes=norm_saves(rows_sp, shape.hidden, dtype_bytes, ops)),
    ]
    if ops.outputs is not None:
        values = Saved(name="input of the value head", bytes=rows_sp * shape.hidden * dtype_bytes)
        return saves + ([values] if ops.outputs else [])
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
    """Elements of logits that the last stage holds beside what is saved: all of one micro-batch's, or one chunk's.

    Without a vocabulary, what the head gives of the whole rows.
    """
    if ops.outputs is not None:
        return layout.rows(seq_length) * (ops.outputs or shape.hidden)
    rows, columns = layout.rows(seq_length), shape.vocab / layout.tp
    if ops.linear_cross_entropy:
        rows = min(rows, max(MIN_CHUNK_TOKENS, rows * shape.hidden // int(columns)))
    return rows * columns


def loss_bytes(shape: Shape, layout: Layout, seq_length: int, dtype_bytes: int, ops: Operators) -> float:
    """Bytes that the last stage holds while the output layer and the loss run, beside what they save.

    A fused loss has a chunk of the logits, two where another follows; the gradient of its input, under sequence parallelism
    the whole input; and the gradient of its matrix: of several chunks their sum in fp32, which is then copied to the weights'
    dtype beside the last chunk.
    """
    logits = logits_for_a_moment(shape, layout, seq_length, ops)
    if not ops.linear_cross_entropy or ops.outputs is not None:
        return logits * dtype_bytes
    rows, columns = layout.rows(seq_length), shape.vocab / layout.tp
    held = (2 if layout.sp else 1) * rows * shape.hidden * dtype_bytes
    matrix = 0.0 if shape.adapters else columns * shape.hidden
    if logits >= rows * columns:  # one chunk
        return held + (logits + matrix) * dtype_bytes
    copied = matrix if dtype_bytes < 4 else 0.0
    return held + 4 * matrix + (logits + max(logits, copied)) * dtype_bytes


def embedding_saves(layout: Layout, seq_length: int) -> list[Saved]:
    """What the first stage keeps before its layers: the token ids, and under tensor parallelism which of them are its own."""
    rows = layout.rows(seq_length)
    return [Saved(name="token ids", bytes=rows * (8 + (1 if layout.tp > 1 else 0)))]
