"""Joins a corpus's complete shards into the files of a source, without the duplicates, which are found over all shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from flagscale_like.data.chat_shards import COUNTED, FRACTIONS, ChatShardMaker
from flagscale_like.data.conversations import Conversations
from flagscale_like.data.dedup import PERMUTATIONS, digests_of, exact_duplicates, near_duplicates
from flagscale_like.data.filters import Cleaning
from flagscale_like.data.formats import printable
from flagscale_like.data.group_shards import NEGATIVE, POSITIVE, QUERY, SCORED, GroupShardMaker
from flagscale_like.data.groups import Groups
from flagscale_like.data.index_file import write_index
from flagscale_like.data.readers import Piece
from flagscale_like.data.report import EXAMPLES, Report, format_place
from flagscale_like.data.shards import Shard, ShardMaker, ShardOptions, read_numbers, read_row_lengths
from flagscale_like.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_OUTPUTS = (".bin", ".documents.parquet", ".report.json", ".idx")  # .idx last: readers look for it first
CHAT_OUTPUTS = (".bin", ".mask.bin", ".documents.parquet", ".report.json", ".mask.idx", ".chat.json", ".idx")
PAIR_OUTPUTS = (".pairs.npy", *CHAT_OUTPUTS)
GROUP_OUTPUTS = (".bin", ".scores.npy", ".groups.npy", ".documents.parquet", ".report.json", ".groups.json", ".idx")


def _outputs_of(options: ShardOptions) -> tuple[str, ...]:
    if options.groups is not None:
        return GROUP_OUTPUTS
    return TEXT_OUTPUTS if options.chat is None else PAIR_OUTPUTS if options.chat.pairs else CHAT_OUTPUTS


def join_shards(shards: Sequence[Shard], pieces: Sequence[Sequence[Piece]], maker: ShardMaker, prefix: Path) -> Report:
    """Write the outputs from complete shards, without the duplicates.

    Raises:
        DataError: no document is left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    report, lengths = Report(), []
    outputs = _outputs_of(maker.options)
    partial = {suffix: Path(f"{prefix}{suffix}.partial") for suffix in outputs}
    originals = _find_duplicates(shards, maker.options.cleaning, shards[0].rows.parent if shards else prefix)
    places = _DocumentPlaces(shards, pieces)
    try:
        names = pa.dictionary(pa.int32(), pa.string())
        schema = pa.schema([("source", names), ("line", pa.int64())])
        with open(partial[".bin"], "wb") as tokens, pq.ParquetWriter(partial[".documents.parquet"], schema) as table:
            first = 0
            for number, shard in enumerate(shards):
                own = Report.read_from(shard.report)
                own.shift(places.offset(number))
                rows = places.rows(number)
                counts = read_row_lengths(shard)
                keep = np.ones(len(counts), dtype=bool)
                if originals is not None:
                    here = originals[first : first + len(counts)]
                    keep = here == np.arange(first, first + len(counts))
                    characters = pq.read_table(shard.rows, columns=["characters"]).column(0).to_numpy()
                    gone = np.flatnonzero(~keep)
                    examples = [
                        (*places.of(first + int(row)), f"as {format_place((*places.of(int(here[row])), ''))}")
                        for row in gone[:EXAMPLES]
                    ]
                    own.drop_counted(
                        "duplicate", len(gone), int(counts[gone].sum()), int(characters[gone].sum()), examples
                    )
                _copy(shard.tokens, tokens, counts, keep, maker.dtype.itemsize)
                table.write_table(rows.filter(pa.array(keep)).cast(schema))
                lengths.append(counts[keep])
                report.add(own)
                first += len(counts)
        if not report.documents:
            for shard in shards:
                shard.remove()
            raise DataError(f"{prefix}: no document is left of {len(places.files)} files: {report.describe_dropped()}")
        _finish(partial, lengths, shards, maker, report)
        Path(f"{prefix}.idx").unlink(missing_ok=True)  # an older .idx does not describe the new .bin
        for suffix in outputs:
            os.replace(partial[suffix], f"{prefix}{suffix}")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return report


def _finish(
    partial: Mapping[str, Path],
    lengths: Sequence[np.ndarray],
    shards: Sequence[Shard],
    maker: ShardMaker,
    report: Report,
) -> None:
    """Write the outputs other than the tokens and the table of documents."""
    write_index(partial[".idx"], lengths, maker.dtype)
    settings: dict[str, object] = {"tokenizer": str(maker.tokenizer.folder)}
    if isinstance(maker, ChatShardMaker):
        _write_chat(partial, lengths, shards, maker, report)
        settings |= {"chat": asdict(maker.options_of_chat)}
    elif isinstance(maker, GroupShardMaker):
        _write_groups(partial, shards, maker, report)
        settings |= {"groups": asdict(maker.options_of_groups)}
    else:
        settings |= {"cleaning": maker.options.cleaning.model_dump(mode="json")}
    report.write_readable(partial[".report.json"], **settings)


def _write_chat(
    partial: Mapping[str, Path],
    lengths: Sequence[np.ndarray],
    shards: Sequence[Shard],
    maker: ChatShardMaker,
    report: Report,
) -> None:
    """Write what makes the prefix a source of conversations. Weights that are all 0 or 1 take a byte each."""
    dtype = np.dtype(np.float32 if report.counts.get(FRACTIONS) else np.uint8)
    with open(partial[".mask.bin"], "wb") as target:
        for shard in shards:
            with open(shard.weights, "rb") as source:
                while len(part := np.fromfile(source, dtype=np.float32, count=1 << 20)):
                    part.astype(dtype).tofile(target)
    write_index(partial[".mask.idx"], lengths, dtype)
    chat, words = maker.options_of_chat, maker.tokenizer
    counted, length = report.counts[COUNTED], chat.length
    Conversations(str(words.folder), words.vocab_size, chat.template, chat.train, length, counted, chat.pairs).write(
        partial[".chat.json"]
    )
    if chat.pairs:
        values = np.concatenate([read_numbers(shard, maker.options.columns) for shard in shards])
        with open(partial[".pairs.npy"], "wb") as file:
            np.save(file, values[::2])  # the two answers of a pair have the same


def _write_groups(partial: Mapping[str, Path], shards: Sequence[Shard], maker: GroupShardMaker, report: Report) -> None:
    """Write what makes the prefix a source of groups."""
    sides, scores = np.concatenate([read_numbers(shard, maker.options.columns) for shard in shards]).T
    firsts = np.flatnonzero(sides == QUERY)
    counts = [np.add.reduceat(sides == side, firsts, dtype=np.int32) for side in (POSITIVE, NEGATIVE)]
    for suffix, values in ((".groups.npy", np.stack(counts, axis=1)), (".scores.npy", np.ascontiguousarray(scores))):
        with open(partial[suffix], "wb") as file:
            np.save(file, values)
    options, words, affixes = maker.options_of_groups, maker.tokenizer, maker.texts.affixes
    Groups(
        tokenizer=str(words.folder),
        vocab_size=words.vocab_size,
        before=list(affixes.before),
        after=list(affixes.after),
        groups=len(firsts),
        scored=report.counts[SCORED],
        query_length=options.query_length,
        passage_length=options.passage_length,
        query_instruction=options.query_instruction,
        passage_instruction=options.passage_instruction,
    ).write(partial[".groups.json"])


class _DocumentPlaces:
    """The source file and line of each document. Shard tables count lines from the shard's start; here lines count from the
    start of the file.
    """

    def __init__(self, shards: Sequence[Shard], pieces: Sequence[Sequence[Piece]]) -> None:
        self._shards, self._offsets, before = shards, [], {}
        for shard, parts in zip(shards, pieces, strict=True):
            self._offsets.append(before.get(printable(parts[0].path), 0) if parts[0].start else 0)
            for path, lines in shard.lines().items():
                before[path] = before.get(path, 0) + lines
        self.files = set(before)
        self._firsts: np.ndarray | None = None

    def offset(self, number: int) -> int:
        """Lines of the file before this shard's first line. A shard that starts inside a file reads no other file."""
        return self._offsets[number]

    def rows(self, number: int) -> pa.Table:
        """The columns `source` and `line` of a shard's documents."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        table = pq.read_table(self._shards[number].rows, columns=["source", "line"])
        return table.set_column(1, "line", pc.add(table["line"], self._offsets[number]))

    def of(self, document: int) -> tuple[str, int]:
        """Return the file and line of a document, whose number counts over all shards."""
        if self._firsts is None:
            self._firsts = np.cumsum([0, *(len(read_row_lengths(shard)) for shard in self._shards)])
        number = int(np.searchsorted(self._firsts, document, side="right")) - 1
        row = self.rows(number).slice(document - int(self._firsts[number]), 1).to_pylist()[0]
        return row["source"], row["line"]


def _find_duplicates(shards: Sequence[Shard], cleaning: Cleaning, work: Path) -> np.ndarray | None:
    """For each document of all shards, the number of the document that it duplicates, or its own number.

    None: duplicates are kept.
    """
    import pyarrow.parquet as pq

    if cleaning.duplicates == "keep" or not shards:
        return None
    parts = [digests_of(pq.read_table(s.rows, columns=["digest"]).column(0).to_pylist(), 16) for s in shards]
    digests = np.concatenate(parts)
    originals = exact_duplicates(digests)
    if cleaning.duplicates == "near" and len(digests):
        path = work / "signatures.bin"
        with open(path, "wb") as file:
            for shard in shards:
                for batch in pq.ParquetFile(shard.rows).iter_batches(columns=["signature"]):
                    file.write(b"".join(batch.column(0).to_pylist()))
        signatures = np.memmap(path, dtype=np.uint32, mode="r", shape=(len(digests), PERMUTATIONS))
        originals = near_duplicates(signatures, cleaning.near_threshold)[originals]
        del signatures
        path.unlink()
    return originals


def _copy(source: Path, target: BinaryIO, counts: np.ndarray, keep: np.ndarray, item_bytes: int) -> None:
    """Append the token bytes of the documents to keep to `target`.

    Args:
        counts: [n], tokens of each document.
        keep: [n] bool.
        item_bytes: bytes of a token.
    """
    ends = np.cumsum(counts, dtype=np.int64) * item_bytes
    with open(source, "rb") as file:
        for first, last in _true_runs(keep):
            start, end = (int(ends[first - 1]) if first else 0), int(ends[last - 1])
            file.seek(start)
            while start < end:
                chunk = file.read(min(end - start, 1 << 22))
                target.write(chunk)
                start += len(chunk)


def _true_runs(keep: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of each run of consecutive true values."""
    edges = np.flatnonzero(np.diff(np.r_[False, keep, False]))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
