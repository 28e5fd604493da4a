"""The files that make a .bin/.idx pair a source of conversations: what they were rendered with, and the weights of tokens.

| file | content |
|---|---|
| PREFIX.bin, .idx | tokens; a document is a conversation |
| PREFIX.mask.bin, .mask.idx | the weight of each token as a label: uint8 0 or 1, or float32 |
| PREFIX.chat.json | that the prefix holds conversations, and what they were rendered with |
| PREFIX.pairs.npy | of pairs, each two conversations, the chosen answer first: float32 [pairs, 2], margin and weight |
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flagscale_like.data.chat import read_template
from flagscale_like.data.index_file import read_lengths
from flagscale_like.errors import DataError
from flagscale_like.json_files import write_json


@dataclass(frozen=True)
class Conversations:
    """The content of PREFIX.chat.json.

    Attributes:
        tokenizer: the tokenizer's folder.
        vocab_size: number of its ids.
        template: the chat template; None of tokens that were made without one.
        train: which of the assistant's messages count.
        length: places of a row that every conversation fits. None: unknown.
        counted: tokens that count.
        pairs: whether they are pairs of answers.
    """

    tokenizer: str
    vocab_size: int
    template: str | None
    train: str
    length: int | None
    counted: int
    pairs: bool = False

    @property
    def command(self) -> str:
        """The command that wrote the prefix."""
        return "data pairs" if self.pairs else "data chat"

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        write_json(path, asdict(self))


def mask_of(prefix: str | Path) -> str:
    """The prefix of the weights beside a prefix of conversations."""
    return f"{prefix}.mask"


def answer_lengths(prefix: str | Path) -> np.ndarray:
    """Tokens of each conversation that training learns from, int64 [conversations]."""
    weights = np.fromfile(f"{mask_of(prefix)}.bin", dtype=np.uint8).astype(np.int64)
    ends = np.cumsum(read_lengths(str(prefix)), dtype=np.int64)
    return np.diff(np.concatenate([[0], np.cumsum(weights)])[np.concatenate([[0], ends])])


def pair_values(prefix: str | Path) -> np.ndarray:
    """Margin and weight of each pair, float32 [pairs, 2].

    Raises:
        DataError: the file is missing or damaged.
    """
    path = Path(f"{prefix}.pairs.npy")
    try:
        return np.load(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): run `data pairs` again") from None


def conversations_at(prefix: str | Path) -> Conversations | None:
    """What a prefix says of its conversations; None: its documents are text.

    Raises:
        DataError: the files that make it a source of conversations are incomplete or cannot be read.
    """
    path, mask = Path(f"{prefix}.chat.json"), mask_of(prefix)
    files = (path, Path(mask + ".bin"), Path(mask + ".idx"))
    missing = [str(file) for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise DataError(
            f"data source {prefix}: holds conversations, but {missing[0]} is missing: copy all files of the prefix, or run "
            "`data chat` (of pairs, `data pairs`) again"
        )
    try:
        return Conversations(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}): write the prefix again") from None


def places_of(lengths: np.ndarray, found: Conversations) -> np.ndarray:
    """Places of a row that each conversation, or each pair, takes.

    A conversation of n tokens takes n - 1, because its last token is only a label. An answer of a pair takes n: a reward
    model reads its last token.

    Args:
        lengths: tokens of each document.
    """
    return lengths.reshape(-1, 2).sum(1, dtype=np.int64) if found.pairs else lengths - 1


def longest_row(prefix: str) -> int:
    """Places of the longest pair of a prefix.

    Raises:
        DataError: it holds no pairs.
    """
    found = conversations_at(prefix)
    if found is None or not found.pairs:
        raise DataError(f"{prefix}: holds no pairs: make them with `data pairs IN --tokenizer T --out PREFIX`")
    return int(places_of(read_lengths(prefix), found).max())


def check_readable(prefix: str, found: Conversations, *, places: int, vocab_size: int) -> None:
    """Check that a model can read the conversations of a prefix.

    Args:
        places: of a row, train.seq_length.
        vocab_size: the model's.

    Raises:
        DataError: the weights are those of other tokens; a conversation is longer than a row, or has a single token; or the
            ids exceed the model's vocabulary.
    """
    lengths, weights = read_lengths(prefix), read_lengths(mask_of(prefix))
    if not np.array_equal(lengths, weights):
        raise DataError(
            f"data source {prefix}: its {len(lengths):,} conversations have {int(lengths.sum(dtype=np.int64)):,} tokens, "
            f"{mask_of(prefix)} has {int(weights.sum(dtype=np.int64)):,} weights of {len(weights):,}: run `{found.command}` "
            "again"
        )
    if found.pairs and pair_values(prefix).shape != (len(lengths) // 2, 2):
        raise DataError(f"data source {prefix}: {prefix}.pairs.npy is of other pairs: run `data pairs` again")
    taken, noun = places_of(lengths, found), "pair" if found.pairs else "conversation"
    longest = int(taken.max())
    if longest > places:
        raise DataError(
            f"data source {prefix}: {noun} {int(taken.argmax())} takes {longest:,} places, "
            f"{int((taken > places).sum()):,} of {len(taken):,} take more than train.seq_length ({places:,}): set "
            f"seq_length to {longest:,}, or run `{found.command} --length {places} --long drop` (or cut)"
        )
    if lengths.min() < 2:
        raise DataError(
            f"data source {prefix}: conversation {int(lengths.argmin())} has {int(lengths.min())} tokens: 2 are needed"
        )
    if found.vocab_size > vocab_size:
        raise DataError(
            f"data source {prefix}: its tokenizer has {found.vocab_size} ids, model.vocab_size is {vocab_size}: set "
            f"model.vocab_size to {found.vocab_size} or more"
        )


def check_conversations(prefix: str, found: Conversations, *, places: int, tokenizer: Path, vocab_size: int) -> None:
    """Check that a run can train on the conversations of a prefix.

    Args:
        places, vocab_size: see check_readable().
        tokenizer: the run's tokenizer folder, which the export of the model copies.

    Raises:
        DataError: see check_readable(), or the chat template is not the tokenizer folder's.
    """
    check_readable(prefix, found, places=places, vocab_size=vocab_size)
    if read_template(tokenizer) != found.template:
        own = f"{prefix}-tokenizer"
        way_out = (
            own if Path(own).is_dir() else f"the folder that `{found.command}` was given, or wrote beside its output"
        )
        raise DataError(
            f"data source {prefix}: its conversations are rendered with another chat template than data.tokenizer "
            f"({tokenizer}) has, which the exported model would use: set data.tokenizer to {way_out}"
        )
