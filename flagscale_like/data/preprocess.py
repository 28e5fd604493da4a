"""Converts a corpus to megatron-core's .bin/.idx, and writes a table with the source file and line of each document.

`preprocess` reads text, `preprocess_chat` conversations, `preprocess_groups` groups of a query and its passages.

The inputs are divided into shards. Worker processes read, clean and tokenize one shard at a time. A shard is complete when
its report exists; after a kill, complete shards are kept and the others are made again. The shards are then joined in order,
without the duplicates, which are found over the whole corpus. Memory holds one batch of texts and tokens at a time,
and 20 bytes for each document of the corpus.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from flagscale_like.data.chat import copy_with_template, read_template
from flagscale_like.data.chat_shards import COUNTED, FRACTIONS, ChatShardMaker
from flagscale_like.data.conversations import Conversations, conversations_at
from flagscale_like.data.dedup import PERMUTATIONS, digests_of, exact_duplicates, near_duplicates
from flagscale_like.data.filters import Cleaning
from flagscale_like.data.formats import format_of, printable
from flagscale_like.data.group_shards import NEGATIVE, POSITIVE, QUERY, SCORED, GroupShardMaker
from flagscale_like.data.groups import Groups, groups_at
from flagscale_like.data.index_file import write_index
from flagscale_like.data.pair_shards import PairShardMaker
from flagscale_like.data.readers import BadLines, Piece, ReadOptions, TextUnit
from flagscale_like.data.report import EXAMPLES, Report, format_place
from flagscale_like.data.shards import (
    ChatOptions,
    GroupOptions,
    Shard,
    ShardMaker,
    ShardOptions,
    SpecialTokens,
    fingerprint,
    plan_shards,
    read_numbers,
    read_row_lengths,
)
from flagscale_like.data.texts import copy_with_end
from flagscale_like.errors import DataError
from flagscale_like.json_files import write_json

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SHARD_BYTES, MIN_SHARD_BYTES = 64 << 20, 1 << 20
TEXT_OUTPUTS = (".bin", ".documents.parquet", ".report.json", ".idx")  # .idx last: readers look for it first
CHAT_OUTPUTS = (".bin", ".mask.bin", ".documents.parquet", ".report.json", ".mask.idx", ".chat.json", ".idx")
PAIR_OUTPUTS = (".pairs.npy", *CHAT_OUTPUTS)
GROUP_OUTPUTS = (".bin", ".scores.npy", ".groups.npy", ".documents.parquet", ".report.json", ".groups.json", ".idx")


def preprocess(  # each parameter is one option of the command `preprocess`
    files: Sequence[Path],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    *,
    key: str = "text",
    unit: TextUnit = "file",
    workers: int = 1,
    bad_lines: BadLines = "stop",
    cleaning: Cleaning | None = None,
    max_document_bytes: int = 64 << 20,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    special_tokens: SpecialTokens = "text",
    add_bos: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> Report:
    """Tokenize files into PREFIX.bin, .idx, .documents.parquet and .report.json. They appear when all shards are joined.

    Row i of the table holds `source` and `line` of document i of the index. Each document ends with the tokenizer's
    end-of-text token. Documents without a token are counted and not written. The result does not depend on `workers` or
    `shard_bytes`. After an interruption, the same call continues with the complete shards in PREFIX.shards.

    Args:
        files: the input files, in order.
        tokenizer_folder: a Hugging Face tokenizer folder.
        prefix: the path of the outputs without their suffix.
        key, unit, max_document_bytes: see `readers.ReadOptions`.
        workers: number of processes; 1 works in the calling process.
        bad_lines: `stop` raises an error at a line without a document; `skip` counts such lines.
        cleaning: how documents are cleaned; None keeps every document unchanged.
        shard_bytes: input bytes of a shard; None chooses them by the size of the input and the number of workers.
        overwrite: replace the files of a prefix that is there.
        special_tokens, add_bos: see shards.ShardOptions.
        progress: called with the number of input bytes of each shard when it is complete.

    Returns:
        The counts of documents and tokens, and what was dropped.

    Raises:
        DataError: an input is bad, an output cannot be written, a worker was killed, PREFIX.shards holds shards of other
            options, no document is left, or the prefix holds conversations, or anything without `overwrite`.
    """
    _check_free(prefix, "text", overwrite=overwrite)
    options = ShardOptions(
        str(tokenizer_folder),
        ReadOptions(key=key, unit=unit, max_document_bytes=max_document_bytes),
        cleaning or Cleaning(),
        bad_lines,
        special_tokens=special_tokens,
        add_bos=add_bos,
    )
    return _write(files, options, prefix, workers=workers, shard_bytes=shard_bytes, progress=progress)


def preprocess_chat(  # most parameters are one option of the command `data chat` each
    files: Sequence[Path],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    chat: ChatOptions,
    *,
    workers: int = 1,
    bad_lines: BadLines = "stop",
    overwrite: bool = False,
    max_document_bytes: int = 64 << 20,
    shard_bytes: int | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> tuple[Report, Path]:
    """Render conversations to the files of a source of conversations; see data.conversations.

    Everything else is as `preprocess` does it: shards, workers, interruptions, table and report. If `chat.template` is not
    the tokenizer's own, a copy of the tokenizer with this template is written to PREFIX-tokenizer.

    Args:
        files: JSON lines or JSON arrays, also compressed.
        chat: how conversations become tokens.
        overwrite: replace the files of a prefix that is there.

    Returns:
        The report, and the tokenizer folder that a run on these conversations names.

    Raises:
        DataError: as `preprocess`; a line has no conversation to train on; or the prefix is there and `overwrite` is false.
    """
    _check_free(prefix, "conversations", overwrite=overwrite)
    _check_records(files, "conversations")
    options = ShardOptions(
        str(tokenizer_folder), ReadOptions(key=None, max_document_bytes=max_document_bytes), Cleaning(), bad_lines, chat
    )
    own = Path(tokenizer_folder)
    if chat.template != read_template(own):
        own = Path(f"{prefix}-tokenizer")
        copy_with_template(tokenizer_folder, chat.template, own, replace=overwrite)
    report = _write(files, options, prefix, workers=workers, shard_bytes=shard_bytes, progress=progress)
    return report, own


def preprocess_groups(  # most parameters are one option of the command `data groups` each
    files: Sequence[Path],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    groups: GroupOptions,
    *,
    end: bool = False,
    workers: int = 1,
    bad_lines: BadLines = "stop",
    overwrite: bool = False,
    max_document_bytes: int = 64 << 20,
    shard_bytes: int | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> tuple[Report, Path]:
    """Write the files of a source of groups; see data.groups. Everything else is as `preprocess` does it.

    Args:
        files: JSON lines or JSON arrays, also compressed.
        groups: how lines become groups of texts.
        end: put the end-of-text token behind each text. A copy of the tokenizer that does so is written to PREFIX-tokenizer.
        overwrite: replace the files of a prefix that is there.

    Returns:
        The report, and the tokenizer folder that a run on these groups names.

    Raises:
        DataError: as `preprocess`; a line has no group; or the prefix is there and `overwrite` is false.
    """
    _check_free(prefix, "groups", overwrite=overwrite)
    _check_records(files, "groups")
    own = Path(tokenizer_folder)
    if end:
        own = Path(f"{prefix}-tokenizer")
        copy_with_end(tokenizer_folder, own)
    options = ShardOptions(
        str(own), ReadOptions(key=None, max_document_bytes=max_document_bytes), Cleaning(), bad_lines, groups=groups
    )
    return _write(files, options, prefix, workers=workers, shard_bytes=shard_bytes, progress=progress), own


def _check_records(files: Sequence[Path], noun: str) -> None:
    for path in files:
        if format_of(path).content not in ("json lines", "json array"):
            raise DataError(f"{printable(path)}: {noun} are read from JSON lines or a JSON array of records")


def _check_free(prefix: str | Path, noun: str, *, overwrite: bool) -> None:
    """Check that a prefix can be written: nothing is there, or what is there may be replaced and is of the same kind."""
    chat = conversations_at(prefix)
    held = "groups" if groups_at(prefix) else "conversations" if chat else None
    if held is not None and held != noun:
        command = chat.command if chat else "data groups"
        raise DataError(f"{prefix}: holds {held} of `{command}`: choose another prefix, or remove its files")
    if Path(f"{prefix}.idx").is_file() and not overwrite:
        raise DataError(f"{prefix}.idx: exists: choose another prefix, or replace it with --overwrite")


def _maker_of(options: ShardOptions) -> ShardMaker:
    if options.groups is not None:
        return GroupShardMaker(options)
    if options.chat is None:
        return ShardMaker(options)
    return PairShardMaker(options) if options.chat.pairs else ChatShardMaker(options)


def _write(
    files: Sequence[Path],
    options: ShardOptions,
    prefix: str | Path,
    *,
    workers: int,
    shard_bytes: int | None,
    progress: Callable[[int], None],
) -> Report:
    maker = _maker_of(options)
    work = Path(f"{prefix}.shards")
    shards: list[Shard] = []
    try:
        with _locked(work):
            pieces = _plan(work, files, options, shard_bytes, workers)
            shards = [Shard(work, number) for number in range(len(pieces))]
            try:
                _make_missing(shards, pieces, maker, workers, progress)
                report = _join(shards, pieces, maker, Path(prefix))
            except DataError:
                if not any(shard.is_done() for shard in shards):
                    shutil.rmtree(work)  # no shard is complete, so a repeated command has nothing to continue from
                raise
            shutil.rmtree(work)
    except OSError as error:
        raise DataError(
            f"{error.filename or prefix}: {error.strerror or error}: complete shards are kept in {work}: fix the cause and "
            "repeat the command"
        ) from None
    return report


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Create the work folder and lock it for this process. The lock ends with the process, even if it is killed."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{work}: another process is writing to this folder: wait for it to end, or choose another prefix"
            ) from None
        yield


def _plan(
    work: Path, files: Sequence[Path], options: ShardOptions, shard_bytes: int | None, workers: int
) -> list[list[Piece]]:
    """Divide the files into the pieces of each shard. An interrupted run with the same options keeps its division.

    Raises:
        DataError: the work folder holds shards that were made with other options, or its plan.json cannot be read.
    """
    path, wanted = work / "plan.json", fingerprint(options, files)
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            shard_bytes = found.pop("shard_bytes")
        except (ValueError, KeyError):
            raise DataError(f"{path}: cannot be read: remove {work} to start again") from None
        different = [name for name in wanted if found.get(name) != json.loads(json.dumps(wanted[name]))]
        if different:
            raise DataError(
                f"{work}: holds shards of an interrupted run that differs in {', '.join(different)}: repeat that command, "
                "or remove the folder to start again"
            )
    else:
        total = sum(path.stat().st_size for path in files)
        share = total // (4 * workers)  # several shards for each worker, so that all workers end at about the same time
        shard_bytes = shard_bytes or max(MIN_SHARD_BYTES, min(MAX_SHARD_BYTES, share))
        write_json(path, {**wanted, "shard_bytes": shard_bytes})
    return plan_shards(files, options.read, shard_bytes)


def _make_missing(
    shards: Sequence[Shard],
    pieces: Sequence[Sequence[Piece]],
    maker: ShardMaker,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    missing = []
    for shard, parts in zip(shards, pieces, strict=True):
        if shard.is_done():
            progress(_input_bytes(parts))
        else:
            missing.append((shard, parts))
    if workers == 1 or len(missing) <= 1:
        for shard, parts in missing:
            maker.make(shard, parts)
            progress(_input_bytes(parts))
        return
    pool = ProcessPoolExecutor(
        min(workers, len(missing)), multiprocessing.get_context("spawn"), _start_worker, (maker.options,)
    )
    try:
        futures: dict[Future, Sequence[Piece]] = {pool.submit(_make, *task): task[1] for task in missing}
        for future in as_completed(futures):
            future.result()
            progress(_input_bytes(futures[future]))
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process was killed, perhaps for lack of memory: complete shards are kept: repeat the command, with "
            "fewer --workers or a smaller --max-document-mb if memory was short"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _input_bytes(pieces: Sequence[Piece]) -> int:
    return sum((Path(p.path).stat().st_size if p.end is None else p.end) - p.start for p in pieces)


_maker: ShardMaker | None = None


def _start_worker(options: ShardOptions) -> None:
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process for each core: threads would compete for it
    _maker = _maker_of(options)


def _make(shard: Shard, pieces: Sequence[Piece]) -> None:
    assert _maker is not None
    _maker.make(shard, pieces)


def _outputs_of(options: ShardOptions) -> tuple[str, ...]:
    if options.groups is not None:
        return GROUP_OUTPUTS
    return TEXT_OUTPUTS if options.chat is None else PAIR_OUTPUTS if options.chat.pairs else CHAT_OUTPUTS


def _join(shards: Sequence[Shard], pieces: Sequence[Sequence[Piece]], maker: ShardMaker, prefix: Path) -> Report:
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
