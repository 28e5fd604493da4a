"""Groups of a query and its passages: their files, and the passages that an epoch takes of each.

| file | content |
|---|---|
| PREFIX.bin, .idx | tokens; a document is a text. A group is its query, its positives and its negatives, in this order |
| PREFIX.groups.json | that the prefix holds groups, and how texts became tokens |
| PREFIX.groups.npy | int32 [groups, 2], how many positives and negatives each has |
| PREFIX.scores.npy | float32 [documents], a teacher's score of each passage; nan for none |

Which positive and which negatives an epoch takes follows from (seed, epoch, group) alone, so that a resumed run reads what
the uninterrupted one would have read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flagscale_like.data.index_file import read_lengths
from flagscale_like.data.table import DocumentTable
from flagscale_like.data.texts import Affixes, TextEncoder
from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_JSON, write_json

MAX_KEYS = 1 << 22  # numbers, one for each text, that are sorted at a time: 32 MB


@dataclass(frozen=True)
class Groups:
    """The content of PREFIX.groups.json.

    Attributes:
        tokenizer: the tokenizer's folder.
        vocab_size: number of its ids.
        before, after: ids that it puts around each text.
        groups: how many there are.
        scored: how many have a teacher's scores.
        query_length, passage_length: most tokens of a text; None: no limit was set.
        query_instruction, passage_instruction: what is put before each text, unless its line said otherwise.
    """

    tokenizer: str
    vocab_size: int
    before: list[int]
    after: list[int]
    groups: int
    scored: int
    query_length: int | None
    passage_length: int | None
    query_instruction: str
    passage_instruction: str

    @property
    def affixes(self) -> Affixes:
        """What the tokenizer puts around each text."""
        return Affixes(tuple(self.before), tuple(self.after))

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        write_json(path, asdict(self))


def groups_at(prefix: str | Path) -> Groups | None:
    """What a prefix says of its groups; None: it holds something else.

    Raises:
        DataError: the files that make it a source of groups are incomplete or cannot be read.
    """
    files = [Path(f"{prefix}{suffix}") for suffix in (".groups.json", ".groups.npy", ".scores.npy")]
    missing = [str(file) for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise DataError(
            f"data source {prefix}: holds groups, but {missing[0]} is missing: copy all files of the prefix, or run "
            "`data groups` again"
        )
    try:
        return Groups(**json.loads(files[0].read_text(encoding="utf-8")))
    except (*BAD_JSON, TypeError) as error:
        raise DataError(f"{files[0]}: cannot be read ({error}): run `data groups` again") from None


class GroupTable:
    """Where the texts of each group of a prefix are, and which of them an epoch takes.

    Attributes:
        counts: int32 [groups, 2], positives and negatives.
        queries: int64 [groups], the document of each query; its positives and negatives follow.
        lengths: int32 [documents], tokens.
        scores: float32 [documents], a teacher's; nan for none.

    Raises:
        DataError: the files of the prefix are not of the same groups.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.lengths = read_lengths(str(prefix))
        try:
            self.counts = np.load(f"{prefix}.groups.npy")
            self.scores = np.load(f"{prefix}.scores.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{prefix}.groups.npy: cannot be read ({error}): run `data groups` again") from None
        sizes = 1 + self.counts.sum(1, dtype=np.int64)
        if sizes.sum() != len(self.lengths) or len(self.scores) != len(self.lengths):
            raise DataError(
                f"data source {prefix}: {prefix}.groups.npy is of {int(sizes.sum()):,} texts, the .idx of "
                f"{len(self.lengths):,}: run `data groups` again"
            )
        self.queries = np.concatenate(([0], np.cumsum(sizes)[:-1]))

    def __len__(self) -> int:
        return len(self.counts)

    def group_lengths(self) -> np.ndarray:
        """Tokens of all texts of each group, int64 [groups]."""
        return np.add.reduceat(self.lengths, self.queries, dtype=np.int64)

    def choose(self, groups: np.ndarray, *, passages: int, seed: int, epoch: int) -> np.ndarray:
        """The documents that an epoch takes of some groups, int64 [g, 1 + passages]: the query, a positive, negatives.

        A group with fewer negatives than asked for gives all of them before it gives one again.

        Args:
            groups: int [g], numbers of groups.
            passages: of each group, the positive among them.
        """
        found = np.empty((len(groups), 1 + passages), dtype=np.int64)
        for part in _parts(len(groups), self.counts[groups, 1].max()):
            numbers, rows = groups[part], found[part]
            queries, (positives, negatives) = self.queries[numbers], self.counts[numbers].T.astype(np.int64)
            rows[:, 0] = queries
            rows[:, 1] = queries + 1 + (keys_of(queries, seed, epoch) % positives.astype(np.uint64)).astype(np.int64)
            if passages > 1:
                order = _orders(queries + 1 + positives, negatives, seed, epoch)
                places = np.arange(passages - 1) % negatives[:, None]
                rows[:, 2:] = (queries + 1 + positives)[:, None] + np.take_along_axis(order, places, axis=1)
        return found

    def tokens_of(self, groups: np.ndarray, *, passages: int, seed: int, epoch: int) -> np.ndarray:
        """Tokens of what an epoch takes of each of some groups, int64 [g]."""
        chosen = self.choose(groups, passages=passages, seed=seed, epoch=epoch)
        return self.lengths[chosen].sum(1, dtype=np.int64)

    def most_tokens(self, passages: int) -> np.ndarray:
        """Most tokens that any epoch takes of each group, int64 [groups]."""
        most = np.empty(len(self), dtype=np.int64)
        for part in _parts(len(self), self.counts.sum(1).max()):
            queries, (positives, negatives) = self.queries[part], self.counts[part].T.astype(np.int64)
            longest = -np.sort(-self._padded(queries + 1 + positives, negatives), axis=1)
            rounds, rest = np.divmod(passages - 1, np.maximum(1, negatives))
            copies = rounds[:, None] + (np.arange(longest.shape[1]) < rest[:, None])
            positive = self._padded(queries + 1, positives).max(1)
            most[part] = self.lengths[queries] + positive + (longest * copies).sum(1)
        return most

    def _padded(self, firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Tokens of the counts[i] documents from firsts[i] on in each row i, int64 [g, max(counts)]; 0 behind them."""
        numbers = np.arange(max(1, int(counts.max())))
        there = numbers < counts[:, None]
        return np.where(there, self.lengths[np.where(there, firsts[:, None] + numbers, 0)], 0).astype(np.int64)


def _parts(groups: int, most: int) -> list[slice]:
    """Slices of the groups, of which each has at most MAX_KEYS texts if none has more than `most`."""
    step = max(1, MAX_KEYS // max(1, int(most)))
    return [slice(start, start + step) for start in range(0, groups, step)]


def _orders(firsts: np.ndarray, counts: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A random order of the numbers 0, ..., counts[i] - 1 of each row i, int64 [g, max(counts)]; the rest is behind them."""
    numbers = np.arange(max(1, int(counts.max())))
    keys = keys_of(firsts[:, None] + numbers, seed, epoch)
    keys[numbers >= counts[:, None]] = np.iinfo(np.uint64).max
    return np.argsort(keys, axis=1, kind="stable")


def keys_of(documents: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A random number below 2^64 - 1 of each document, of (seed, epoch, document) alone (SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        start = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch) * np.uint64(0xD1B54A32D192ED03)
        x = (documents.astype(np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def check_groups(prefix: str, found: Groups, *, passages: int, places: int, tokenizer: Path, vocab_size: int) -> None:
    """Check that a run can train on the groups of a prefix.

    Args:
        passages: of a group, objective.passages.
        places: of a row, train.seq_length.
        tokenizer: the run's tokenizer folder, which the export of the model copies.
        vocab_size: the model's.

    Raises:
        DataError: a group has no negatives and they are needed, or may take more places than a row has; the ids exceed the
            model's vocabulary; or the tokenizer puts something else around a text than the one of the groups.
    """
    if found.vocab_size > vocab_size:
        raise DataError(
            f"data source {prefix}: its tokenizer has {found.vocab_size} ids, model.vocab_size is {vocab_size}: set "
            f"model.vocab_size to {found.vocab_size} or more"
        )
    if TextEncoder(tokenizer).affixes != found.affixes:
        raise DataError(
            f"data source {prefix}: its tokenizer puts other tokens around a text than data.tokenizer ({tokenizer}), with "
            f"which the exported model would be used: set data.tokenizer to {found.tokenizer}, or run `data groups` again"
        )
    table, where = GroupTable(prefix), DocumentTable(prefix)

    def place(group: int) -> str:
        line = where.place(int(table.queries[group]))
        return f"{line[0]}:{line[1]}" if line else f"group {group}"

    without = np.flatnonzero(table.counts[:, 1] == 0)
    if passages > 1 and len(without):
        raise DataError(
            f"data source {prefix}: {len(without):,} of {len(table):,} groups have no negative ({place(int(without[0]))}), "
            f"objective.passages is {passages}: find some with `data mine`, leave such groups out with `data groups "
            "--min-negatives 1`, or set objective.passages to 1"
        )
    most = table.most_tokens(passages)
    longest = int(most.argmax())
    if most[longest] > places:
        raise DataError(
            f"data source {prefix}: a group can take {int(most[longest]):,} places ({place(longest)}), "
            f"{int((most > places).sum()):,} of {len(most):,} more than train.seq_length ({places:,}): set seq_length to "
            f"{int(most[longest]):,}, run `data groups` with a smaller --passage-length, or set a smaller objective.passages"
        )


def notes_on_groups(prefixes: Sequence[str], passages: int) -> list[str]:
    """What a reader should know of sources of groups: whose negatives are taken more than once in an epoch."""
    notes = []
    for prefix in prefixes:
        table = GroupTable(prefix)
        few = int((table.counts[:, 1] < passages - 1).sum())
        if few:
            notes.append(
                f"data source {prefix}: {few:,} of {len(table):,} groups have fewer than {passages - 1} negatives; theirs "
                "are taken more than once in an epoch"
            )
    return notes
