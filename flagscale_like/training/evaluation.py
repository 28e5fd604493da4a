"""Perplexity of weights, native or Hugging Face, on a stream of tokens and on any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flagscale_like.checkpoint.store import WeightSource, load_weights
from flagscale_like.config import RunConfig
from flagscale_like.data.stream import TokenStream, window_count, windows
from flagscale_like.errors import ConfigError
from flagscale_like.model.build import build_chunks
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.step import forward_losses


@dataclass(frozen=True)
class Evaluation:
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
    precision: str = "fp32",
) -> Evaluation:
    """Predict every token but the first, once, from the tokens before it in its window. All ranks call it.

    Raises:
        ConfigError: the layout or the sequence length does not fit the model.
    """
    limit = source.arch.max_position_embeddings
    if limit and seq_length > limit:
        raise ConfigError(f"the sequence length ({seq_length}) exceeds the model's max_position_embeddings ({limit})")
    count = -(-window_count(len(stream.tokens), seq_length) // (micro_batch_size * ctx.dp))
    config = RunConfig.for_inference(
        source.arch,
        precision=precision,
        parallel=ctx.layout,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=count * micro_batch_size * ctx.dp,
    )
    chunks = build_chunks(config, ctx)
    load_weights(source, chunks, ctx)
    for chunk in chunks:
        chunk.eval()
    batches = windows(stream.tokens, ctx, seq_length=seq_length, micro_batch_size=micro_batch_size)
    total, tokens = forward_losses(chunks, config, ctx, batches, count)
    bits = total / math.log(2) / stream.text_bytes if stream.text_bytes else None
    return Evaluation(total / tokens, int(tokens), bits)
