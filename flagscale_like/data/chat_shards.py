"""Shards of conversations: each line of the inputs becomes a conversation's tokens and their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from flagscale_like.data.chat import BadConversationError, ChatTokenizer, Encoded, NothingCountsError, parse_record
from flagscale_like.data.formats import printable
from flagscale_like.data.readers import BadLine, Document, Piece, PieceReader
from flagscale_like.data.report import Report
from flagscale_like.data.shards import ShardMaker, ShardOptions, in_file
from flagscale_like.errors import DataError, required

# Names of Report.counts.
COUNTED, CUT, FRACTIONS, NO_END = "counted tokens", "cut", "weights other than 0 and 1", "no special token"
ENDS = "answers that end with "
NOTHING_COUNTS = "without a counted token"


class ChatShardMaker(ShardMaker):
    """Makes shards of conversations."""

    def __init__(self, options: ShardOptions) -> None:
        super().__init__(options)
        chat = self.options_of_chat = required(options.chat, "ShardOptions.chat")
        self.chat = ChatTokenizer(options.tokenizer_folder, chat.template, train=chat.train)
        self._special = set(self.chat.tokenizer.special_texts)

    def encoded(
        self, pieces: Sequence[Piece], report: Report, lines: dict[str, int]
    ) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
        for piece in pieces:
            reader = PieceReader(piece, self.options.read)
            for found in reader:
                if isinstance(found, BadLine):
                    self.bad_line(found, piece, report)
                    continue
                report.read += 1
                for document, encoded in self._encode(found, piece, report):
                    self._count(encoded, report)
                    yield document, encoded.ids, encoded.weights
            lines[printable(piece.path)] = reader.lines

    def _encode(self, line: Document, piece: Piece, report: Report) -> list[tuple[Document, Encoded]]:
        """The documents of a line; none, and counted in `report`, if the options leave it out."""
        options = self.options_of_chat
        try:
            return self.documents_of(line, piece, report)
        except NothingCountsError as error:
            if not options.skip_empty:
                place = in_file(BadLine(line.source, line.line, str(error)), piece)
                raise DataError(f"{place}: leave such conversations out with --skip-empty") from None
            report.drop(NOTHING_COUNTS, len(line.text), (line.source, line.line, str(error)))
        except BadConversationError as error:
            self.bad_line(BadLine(line.source, line.line, str(error)), piece, report)
        return []

    def documents_of(self, line: Document, piece: Piece, report: Report) -> list[tuple[Document, Encoded]]:
        """The conversation of a line; nothing if it is longer than a row and is to be dropped."""
        options, conversation = self.options_of_chat, parse_record(line.text)
        encoded = self.chat.encode(conversation.messages, conversation.tools)
        fit = self.fit(len(encoded.ids) - 1, line, piece, report)
        if fit == "drop":
            return []
        if fit == "cut":
            end = required(options.length, "ChatOptions.length") + 1
            encoded = Encoded(encoded.ids[:end], encoded.weights[:end])
            if not encoded.weights.any():
                raise NothingCountsError(f"no token of its first {end:,} counts")
            report.count(CUT)
        return [(line, encoded)]

    def fit(self, places: int, line: Document, piece: Piece, report: Report) -> Literal["whole", "cut", "drop"]:
        """What is done with what takes so many places of a row; what is dropped is counted.

        Raises:
            DataError: it takes more than a row has, and `long` is `refuse`.
        """
        options = self.options_of_chat
        if options.length is None or places <= options.length:
            return "whole"
        if options.long == "refuse":
            place = in_file(
                BadLine(line.source, line.line, f"takes {places:,} places of a row of {options.length:,}"), piece
            )
            raise DataError(f"{place}: give a larger --length, or leave it out or cut it with --long drop or cut")
        if options.long == "drop":
            report.drop(f"longer than {options.length:,}", len(line.text), (line.source, line.line, f"{places:,}"))
        return options.long

    def _count(self, encoded: Encoded, report: Report) -> None:
        counted = np.flatnonzero(encoded.weights)
        report.count(COUNTED, len(counted))
        report.count(FRACTIONS, int((encoded.weights[counted] != 1).sum()))
        last = self.tokenizer.decode_one(int(encoded.ids[counted[-1]]))
        report.count(ENDS + (last if last in self._special else NO_END))
