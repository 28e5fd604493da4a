"""Pairs of answers that are tokens already, as a source of pairs: what a policy drew, judged.

The files are those of `data pairs` (data.conversations). No text is tokenised again, so that a reward model reads the very
tokens that the policy drew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flagscale_like.data.chat import read_template
from flagscale_like.data.conversations import Conversations, mask_of
from flagscale_like.data.index_file import token_dtype, write_index
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError


@dataclass(frozen=True)
class TokenPair:
    """Two answers to one prompt, as tokens.

    Attributes:
        prompt: tokens before both answers, at least one.
        chosen, rejected: tokens of the better and of the worse answer, at least one each.
        margin: by how much the chosen one is better.
    """

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float = 0.0


def write_token_pairs(folder: Path, pairs: Sequence[TokenPair], tokenizer: Path) -> str:
    """Write a folder that holds a source of pairs; a folder that is there is replaced.

    Args:
        tokenizer: the folder of the tokenizer whose tokens they are.

    Returns:
        The source's prefix.

    Raises:
        DataError: there are no pairs, or one lacks a prompt or an answer.
    """
    for number, pair in enumerate(pairs):
        if not (pair.prompt and pair.chosen and pair.rejected):
            raise DataError(f"{folder}: pair {number + 1} of {len(pairs)} has an empty prompt or answer")
    if not pairs:
        raise DataError(f"{folder}: there are no pairs to write")
    vocab_size = Tokenizer(tokenizer).vocab_size
    documents = [[*p.prompt, *answer] for p in pairs for answer in (p.chosen, p.rejected)]
    answers = [len(answer) for p in pairs for answer in (p.chosen, p.rejected)]
    lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    prefix, dtype = str(temporary / "pairs"), token_dtype(vocab_size)
    np.concatenate([np.array(ids, dtype=dtype) for ids in documents]).tofile(f"{prefix}.bin")
    counted = [[0] * (n - own) + [1] * own for n, own in zip(lengths, answers, strict=True)]
    np.concatenate([np.array(own, dtype=np.uint8) for own in counted]).tofile(f"{mask_of(prefix)}.bin")
    write_index(Path(f"{prefix}.idx"), [lengths], dtype)
    write_index(Path(f"{mask_of(prefix)}.idx"), [lengths], np.dtype(np.uint8))
    np.save(f"{prefix}.pairs.npy", np.array([[p.margin, 1.0] for p in pairs], dtype=np.float32))
    Conversations(
        tokenizer=str(tokenizer),
        vocab_size=vocab_size,
        template=read_template(tokenizer),
        train="last",
        length=int(lengths.reshape(-1, 2).sum(1).max()),
        counted=sum(answers),
        pairs=True,
    ).write(Path(f"{prefix}.chat.json"))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return str(folder / "pairs")
