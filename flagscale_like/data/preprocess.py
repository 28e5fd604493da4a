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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from flagscale_like.data.chat import copy_with_template, read_template
from flagscale_like.data.chat_shards import ChatShardMaker
from flagscale_like.data.conversations import conversations_at
from flagscale_like.data.filters import Cleaning
from flagscale_like.data.formats import format_of, printable
from flagscale_like.data.group_shards import GroupShardMaker
from flagscale_like.data.groups import groups_at
from flagscale_like.data.join_shards import join_shards
from flagscale_like.data.pair_shards import PairShardMaker
from flagscale_like.data.readers import BadLines, Piece, ReadOptions, TextUnit
from flagscale_like.data.report import Report
from flagscale_like.data.shards import (
    ChatOptions,
    GroupOptions,
    Shard,
    ShardMaker,
    ShardOptions,
    SpecialTokens,
    fingerprint,
    plan_shards,
)
from flagscale_like.data.texts import copy_with_end
from flagscale_like.errors import DataError
from flagscale_like.json_files import write_json

MAX_SHARD_BYTES, MIN_SHARD_BYTES = 64 << 20, 1 << 20


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
                report = join_shards(shards, pieces, maker, Path(prefix))
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
