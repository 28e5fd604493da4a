"""Reads text or a .bin/.idx pair as one stream of tokens, and cuts it into the windows that an evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flagscale_like.data.batch import Batch
from flagscale_like.data.readers import find_inputs, read_documents
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError
from flagscale_like.runtime.parallel import ParallelContext


@dataclass(frozen=True)
class TokenStream:
    """A stream of tokens.

    Attributes:
        tokens: [n] token ids.
        text_bytes: bytes of the text that the tokens encode; None if unknown.
    """

    tokens: np.ndarray
    text_bytes: int | None


def read_stream(path: Path, tokenizer: Path | None, *, vocab_size: int) -> TokenStream:
    """Read the tokens of a .bin/.idx pair, or tokenize text files. An end-of-text token separates the documents of text.

    Args:
        path: a .bin/.idx pair, with or without the suffix; or a text file, a folder or a glob.
        tokenizer: the tokenizer's folder; needed for text.
        vocab_size: the model's vocabulary size.

    Raises:
        DataError: `path` matches no file, text has no tokenizer, there are fewer than two tokens, or a token id is not
            below `vocab_size`.
    """
    prefix = Path(str(path).removesuffix(".bin").removesuffix(".idx"))
    text_bytes = None
    if Path(f"{prefix}.idx").is_file():
        try:
            dtype = IndexedDataset(str(prefix)).index.dtype
            tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
        except Exception as error:  # megatron-core raises various types for a file of another format
            raise DataError(
                f"{prefix}.idx: not a megatron index ({type(error).__name__}: {error}): write it with `preprocess`"
            ) from None
    else:
        if tokenizer is None:
            raise DataError(f"{path}: text needs a tokenizer: give --tokenizer FOLDER")
        words, ids, text_bytes = Tokenizer(tokenizer), [], 0
        for document in read_documents(find_inputs([str(path)])):
            if ids:
                ids.append(words.eod)
            ids += words.encode_batch([document.text])[0]
            text_bytes += len(document.text.encode())
        tokens = np.asarray(ids, dtype=np.int64)
    if len(tokens) < 2:
        raise DataError(f"{path}: holds {len(tokens)} tokens, a loss needs 2 or more: give more text")
    if int(tokens.max()) >= vocab_size:
        raise DataError(
            f"{path}: holds token {int(tokens.max())}, the model's vocabulary has {vocab_size}: use the tokenizer that the "
            "model was trained with"
        )
    return TokenStream(tokens, text_bytes)


def window_count(tokens: int, seq_length: int) -> int:
    """The number of windows of `seq_length` predictions that cover a stream. Each token but the first is predicted once."""
    return -(-(tokens - 1) // seq_length)


def windows(tokens: np.ndarray, ctx: ParallelContext, *, seq_length: int, micro_batch_size: int) -> Iterator[Batch]:
    """Yield this data-parallel rank's micro-batches, on its device.

    All ranks yield the same number of micro-batches. Positions beyond the end of the stream have a loss mask of 0.
    """
    span = micro_batch_size * ctx.dp
    for turn in range(-(-window_count(len(tokens), seq_length) // span)):
        inputs = torch.zeros(micro_batch_size, seq_length, dtype=torch.int64)
        labels, mask = torch.zeros_like(inputs), torch.zeros(micro_batch_size, seq_length)
        for row in range(micro_batch_size):
            start = (turn * span + ctx.dp_rank * micro_batch_size + row) * seq_length
            part = torch.from_numpy(tokens[start : start + seq_length + 1].astype(np.int64))
            count = max(len(part) - 1, 0)
            inputs[row, :count], labels[row, :count], mask[row, :count] = part[:count], part[1 : count + 1], 1.0
        yield Batch.of({"tokens": inputs, "labels": labels, "loss_mask": mask}, ctx.platform.device)
