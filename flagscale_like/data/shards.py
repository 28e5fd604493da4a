"""Shards of a corpus: reads, cleans and tokenizes the inputs of one shard. The shard is complete when its report exists.

`ShardMaker` makes them of text, `chat_shards.ChatShardMaker` of conversations, `group_shards.GroupShardMaker` of groups.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import xxhash

from flagscale_like.data.chat import Train
from flagscale_like.data.dedup import minhash_signature, text_digest
from flagscale_like.data.filters import Cleaning
from flagscale_like.data.formats import printable
from flagscale_like.data.index_file import token_dtype
from flagscale_like.data.readers import BadLine, BadLines, Document, Piece, PieceReader, ReadOptions, can_split
from flagscale_like.data.report import Report
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError, required

BATCH_CHARACTERS = 1 << 18


SpecialTokens = Literal["text", "ids", "error"]


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become tokens.

    Attributes:
        template: the text of the chat template.
        train: which of the assistant's messages count.
        length: places of a row, train.seq_length. A conversation of n tokens takes n - 1: its last token is only a label.
        long: what happens to a conversation that takes more places: `refuse` ends with an error, `drop` leaves it out, `cut`
            keeps its beginning.
        skip_empty: leave out a conversation without a counted token; without it, such a conversation is an error.
        pairs: a line is a pair of answers, whose two conversations share a row; see pair_shards.
    """

    template: str
    train: Train = "all"
    length: int | None = None
    long: Literal["refuse", "drop", "cut"] = "refuse"
    skip_empty: bool = False
    pairs: bool = False


@dataclass(frozen=True)
class GroupOptions:
    """How groups of a query and its passages become tokens.

    Attributes:
        query_length, passage_length: most tokens of a text, with what the tokenizer puts around it; None: no limit.
        query_instruction, passage_instruction: put before each text, where its line has no instruction of its own.
        min_negatives: leave out groups with fewer.
    """

    query_length: int | None = None
    passage_length: int | None = None
    query_instruction: str = ""
    passage_instruction: str = ""
    min_negatives: int = 0


@dataclass(frozen=True)
class ShardOptions:
    """The options that the content of a shard depends on, in addition to its pieces.

    Attributes:
        tokenizer_folder: a Hugging Face tokenizer folder.
        read: how files are read.
        cleaning: how documents are cleaned.
        bad_lines: `stop` raises an error at a line without a document; `skip` counts it.
        chat: how lines become conversations.
        groups: how lines become groups of a query and its passages. Neither: the documents are text.
        special_tokens: what the text of a special token, such as <|endoftext|>, becomes inside a document: ordinary text
            (`text`), that token (`ids`), or a bad line (`error`).
        add_bos: begin each document with the token that begins a text.
    """

    tokenizer_folder: str
    read: ReadOptions
    cleaning: Cleaning
    bad_lines: BadLines
    chat: ChatOptions | None = None
    special_tokens: SpecialTokens = "text"
    add_bos: bool = False
    groups: GroupOptions | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The numbers that the table of a shard holds beside each document; attributes of the documents."""
        if self.groups is not None:
            return ("side", "score")
        return ("margin", "weight") if self.chat is not None and self.chat.pairs else ()


def plan_shards(files: Sequence[Path], read: ReadOptions, shard_bytes: int) -> list[list[Piece]]:
    """Divide the files into shards of about `shard_bytes`, each a list of pieces, in the order of the files.

    A large file of lines becomes several shards; small files share one. A file that `can_split` refuses is one piece of any
    size, because it can only be read from its start.
    """
    shards: list[list[Piece]] = []
    held: list[Piece] = []
    held_bytes = 0
    for path in files:
        size = path.stat().st_size
        if size > shard_bytes and can_split(path, read.unit):
            shards += [held] if held else []
            held, held_bytes = [], 0
            count = -(-size // shard_bytes)
            edges = [size * i // count for i in range(count + 1)]
            shards += [[Piece(str(path), a, b)] for a, b in zip(edges[:-1], edges[1:], strict=True)]
            continue
        held.append(Piece(str(path)))
        held_bytes += size
        if held_bytes >= shard_bytes:
            shards.append(held)
            held, held_bytes = [], 0
    return shards + ([held] if held else [])


class Shard:
    """The paths of a shard's files in the work folder.

    N.bin has the tokens, N.parquet one row for each document. Of conversations, N.weights has the float32 weight of each
    token. N.json, the report, is written last.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.tokens, self.rows, self.weights, self.report = (
            folder / f"{number:06d}{suffix}" for suffix in (".bin", ".parquet", ".weights", ".json")
        )

    def sizes(self) -> list[int]:
        """The bytes of the files beside the report."""
        files = [self.tokens, self.rows] + ([self.weights] if self.weights.is_file() else [])
        return [path.stat().st_size for path in files]

    def is_done(self) -> bool:
        """Whether the report exists and the other files have the sizes that it states."""
        try:
            sizes = json.loads(self.report.read_text(encoding="utf-8"))["sizes"]
            return sizes == self.sizes()
        except (OSError, ValueError, KeyError):
            return False

    def remove(self) -> None:
        """Remove the shard's files."""
        for path in (self.report, self.tokens, self.rows, self.weights):
            path.unlink(missing_ok=True)

    def lines(self) -> dict[str, int]:
        """The number of lines that the shard read of each input file."""
        return json.loads(self.report.read_text(encoding="utf-8"))["lines"]


class ShardMaker:
    """Makes shards. It holds the tokenizer, which is loaded once in each process."""

    def __init__(self, options: ShardOptions) -> None:
        self.options = options
        self.tokenizer = Tokenizer(options.tokenizer_folder, special=options.special_tokens == "ids")
        self._forbidden = self.tokenizer.special_texts if options.special_tokens == "error" else ()
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        if options.add_bos and self.tokenizer.bos is None:
            raise DataError(f"tokenizer {options.tokenizer_folder}: names no bos_token, which --add-bos writes")
        self._begin = [required(self.tokenizer.bos, "bos")] if options.add_bos else []

    def make(self, shard: Shard, pieces: Sequence[Piece]) -> Report:
        """Write one shard and return its report.

        Raises:
            DataError: a line holds no document and `bad_lines` is `stop`, an input cannot be read, or an output cannot be
                written.
        """
        report, lines = Report(), {}
        try:
            shard.remove()
            with (
                open(shard.tokens, "wb") as tokens,
                _RowWriter(shard.rows, self.options) as rows,
                self._weights_file(shard) as masks,
            ):
                for document, ids, weights in self.encoded(pieces, report, lines):
                    tokens.write(ids.astype(self.dtype).tobytes())
                    if masks is not None:
                        masks.write(required(weights, "weights").astype(np.float32).tobytes())
                    rows.add(document, len(ids))
                    report.documents += 1
                    report.tokens += len(ids)
                    report.largest_id = max(report.largest_id, int(ids.max()))
                    report.characters += len(document.text)
                for file in (tokens, masks):
                    if file is not None:
                        file.flush()
                        os.fsync(file.fileno())
            report.write(shard.report, sizes=shard.sizes(), lines=lines)
        except DataError:
            shard.remove()
            raise
        except OSError as error:
            shard.remove()
            raise DataError(
                f"{error.filename or shard.tokens}: cannot be written: {error.strerror or error}: complete shards are kept: "
                "fix the cause and repeat the command"
            ) from None
        return report

    def _weights_file(self, shard: Shard) -> contextlib.AbstractContextManager[BinaryIO | None]:
        return open(shard.weights, "wb") if self.options.chat else contextlib.nullcontext()

    def encoded(
        self, pieces: Sequence[Piece], report: Report, lines: dict[str, int]
    ) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
        """Yield each document to keep with its token ids and, of a conversation, their weights.

        Args:
            report: counts the other documents.
            lines: gets the number of lines of each file.
        """
        for batch in _batches(self._documents(pieces, report, lines)):
            for document, ids in zip(batch, self.tokenizer.encode_many([d.text for d in batch]), strict=True):
                if len(ids):
                    whole = np.concatenate((self._begin, ids, [self.tokenizer.eod])).astype(np.int32)
                    yield document, whole, None
                else:
                    report.empty += 1

    def _documents(self, pieces: Sequence[Piece], report: Report, lines: dict[str, int]) -> Iterator[Document]:
        """Yield the documents to keep, cleaned. Count the others in `report`, and the lines of each file in `lines`."""
        for piece in pieces:
            reader = PieceReader(piece, self.options.read)
            for found in reader:
                if isinstance(found, BadLine):
                    self.bad_line(found, piece, report)
                    continue
                if self._forbidden and (token := next((t for t in self._forbidden if t in found.text), None)):
                    bad = BadLine(
                        found.source, found.line, f"holds the special token {token!r} (--special-tokens error)"
                    )
                    self.bad_line(bad, piece, report)
                    continue
                report.read += 1
                text, objection = self.options.cleaning.apply(found.text)
                if objection:
                    report.drop(objection, len(text), (found.source, found.line, ""))
                else:
                    yield Document(found.source, found.line, text)
            lines[printable(piece.path)] = reader.lines

    def bad_line(self, found: BadLine, piece: Piece, report: Report) -> None:
        """Count a line without a document.

        Raises:
            DataError: `bad_lines` is `stop`.
        """
        if self.options.bad_lines == "stop":
            raise DataError(f"{in_file(found, piece)}: fix the line, or skip such lines with --bad-lines skip")
        report.bad((found.source, found.line, found.reason))


def in_file(bad: BadLine, piece: Piece) -> BadLine:
    """Change the line number of a bad line from counting within the piece to counting within the file."""
    if not piece.start:
        return bad
    before, left = 0, piece.start
    with open(piece.path, "rb") as file:
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            before += part.count(b"\n")
            left -= len(part)
    # A line that crosses into this piece belongs to the previous one. Its line feed is after piece.start and not counted yet.
    with open(piece.path, "rb") as file:
        file.seek(piece.start - 1)
        before += file.read(1) != b"\n"
    return BadLine(bad.source, before + bad.line, bad.reason)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group the documents into batches of BATCH_CHARACTERS characters or slightly more."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _RowWriter:
    """Writes a shard's table: source, line, tokens and characters of each document; digest and signature if needed; and the
    numbers that ShardOptions.columns names.
    """

    ROWS = 4096

    def __init__(self, path: Path, options: ShardOptions) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa, self._duplicates = pa, options.cleaning.duplicates
        self._columns = options.columns
        names = pa.dictionary(pa.int32(), pa.string())
        fields = [("source", names), ("line", pa.int64()), ("tokens", pa.int32()), ("characters", pa.int64())]
        fields += [("digest", pa.binary(16))] if self._duplicates != "keep" else []
        fields += [("signature", pa.binary())] if self._duplicates == "near" else []
        fields += [(name, pa.float32()) for name in self._columns]
        self._schema = pa.schema(fields)
        self._file = open(path, "wb")  # noqa: SIM115
        self._writer = pq.ParquetWriter(self._file, self._schema)
        self._rows: list[tuple[Any, ...]] = []

    def add(self, document: Document, tokens: int) -> None:
        row: list[Any] = [document.source, document.line, tokens, len(document.text)]
        row += [text_digest(document.text)] if self._duplicates != "keep" else []
        row += [minhash_signature(document.text)] if self._duplicates == "near" else []
        row += [getattr(document, name) for name in self._columns]
        self._rows.append(tuple(row))
        if len(self._rows) >= self.ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else [[]] * len(self._schema)
        arrays = [self._pa.array(list(c), f.type) for c, f in zip(columns, self._schema, strict=True)]
        self._writer.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows = []

    def __enter__(self) -> _RowWriter:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            if failed is None:
                self._flush()
            # After a failed write, closing fails again: suppress that error, so that the first one is reported.
            with contextlib.suppress(*([OSError] if failed else [])):
                self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def fingerprint(options: ShardOptions, files: Sequence[Path]) -> dict[str, Any]:
    """Everything that the shards depend on, as JSON types. A resumed run must have the same fingerprint."""
    tokenizer = {
        path.name: xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in sorted(Path(options.tokenizer_folder).iterdir())
        if path.is_file() and path.suffix in (".json", ".model", ".txt")
    }
    stats = [(printable(path), path.stat()) for path in files]
    return {
        "tokenizer": tokenizer,
        "read": asdict(options.read),
        "cleaning": options.cleaning.model_dump(mode="json"),
        "bad_lines": options.bad_lines,
        "special_tokens": options.special_tokens,
        **({"add_bos": True} if options.add_bos else {}),
        "chat": asdict(options.chat) if options.chat else None,
        "groups": asdict(options.groups) if options.groups else None,
        "inputs": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def read_row_lengths(shard: Shard) -> np.ndarray:
    """Read the number of tokens of each document of a shard, int32."""
    import pyarrow.parquet as pq

    return pq.read_table(shard.rows, columns=["tokens"]).column(0).to_numpy().astype(np.int32)


def read_numbers(shard: Shard, columns: Sequence[str]) -> np.ndarray:
    """Read the numbers beside each document of a shard, float32 [documents, columns]; see ShardOptions.columns."""
    import pyarrow.parquet as pq

    table = pq.read_table(shard.rows, columns=list(columns))
    return np.stack([column.to_numpy() for column in table.columns], axis=1).astype(np.float32)
