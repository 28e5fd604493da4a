"""Perplexity of weights, native or Hugging Face, on a stream of tokens or on conversations, and on any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flagscale_like.checkpoint.store import WeightSource
from flagscale_like.data.packing import conversation_batches
from flagscale_like.data.stream import TokenStream, window_count, windows
from flagscale_like.engine.engine import Engine
from flagscale_like.model.spec import ModelSpec, Precision
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.evaluation import evaluate


@dataclass(frozen=True)
class StreamLoss:
    """Mean loss in nats a token, over `tokens` predicted tokens; bits a byte of text, where there was text."""

    loss: float
    tokens: int
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def evaluate_stream(
    source: WeightSource,
    stream: TokenStream,
    ctx: ParallelContext,
    *,
    seq_length: int,
    micro_batch_size: int = 1,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> StreamLoss:
    """Predict every token but the first, once, from the tokens before it in its window. All ranks call it.

    Args:
        source: the weights; with adapters (AdaptedWeights), these take part.

    Raises:
        ConfigError: the layout or the sequence length does not fit the model.
    """
    engine = _engine(source, ctx, seq_length, micro_batch_size, precision)
    count = -(-window_count(len(stream.tokens), seq_length) // (micro_batch_size * ctx.dp))
    batches = windows(stream.tokens, ctx, seq_length=seq_length, micro_batch_size=micro_batch_size)
    found = evaluate(engine, NextToken(), batches, steps=1, micro_batches=count)
    bits = found.loss * found.count / math.log(2) / stream.text_bytes if stream.text_bytes else None
    return StreamLoss(found.loss, found.count, bits)


def evaluate_conversations(
    source: WeightSource,
    prefix: str,
    ctx: ParallelContext,
    *,
    seq_length: int,
    micro_batch_size: int = 1,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> StreamLoss:
    """Predict the tokens that count of every conversation of a prefix of `data chat`, in packs. All ranks call it.

    Raises:
        ConfigError: the layout or the sequence length does not fit the model.
        DataError: see conversation_batches().
    """
    engine = _engine(source, ctx, seq_length, micro_batch_size, precision)
    batches, count = conversation_batches(
        prefix, ctx, places=seq_length, micro_batch_size=micro_batch_size, vocab_size=source.arch.vocab_size
    )
    found = evaluate(engine, NextToken(packed=True), batches, steps=1, micro_batches=count)
    return StreamLoss(found.loss, found.count, None)


def _engine(
    source: WeightSource, ctx: ParallelContext, seq_length: int, micro_batch_size: int, precision: Precision
) -> Engine:
    spec = ModelSpec(
        arch=source.arch,
        parallel=ctx.layout,
        precision=precision,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        lora=getattr(source, "lora", None),
    )
    return Engine.build(spec, ctx, source=source)
