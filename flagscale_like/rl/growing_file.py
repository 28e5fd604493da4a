"""A file of records that is made in parts: a kill loses at most the part that was under way."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagscale_like.json_files import BAD_JSON, lines_of


class GrowingFile:
    """JSON lines that are added part by part. NAME.part grows; once it is whole it takes its name.

    Args:
        path: of the whole file.
        size: records of a part; the last one may have fewer.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._part = path.with_name(path.name + ".part")

    @property
    def whole(self) -> bool:
        """Whether the file is complete."""
        return self.path.is_file()

    def records(self) -> list[dict[str, Any]]:
        """What is there, of whole parts."""
        if self.whole:
            return [json.loads(line) for line in lines_of(self.path.read_text(encoding="utf-8"))]
        found = []
        if self._part.is_file():
            text = self._part.read_text(encoding="utf-8", errors="replace")
            *whole, _ = text.split("\n")  # behind the last end of a line is nothing, or a torn one
            for line in whole:
                try:
                    found.append(json.loads(line))
                except BAD_JSON:
                    break
        return found[: len(found) // self.size * self.size]

    def begin(self) -> int:
        """Drop what a kill left of a part. Returns the number of whole parts."""
        if self.whole:
            return -(-len(self.records()) // self.size)
        kept = self.records()
        self._part.parent.mkdir(parents=True, exist_ok=True)
        self._write("wb", kept)
        return len(kept) // self.size

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Add a part; it is on disk when this returns."""
        self._write("ab", records)

    def finish(self) -> None:
        """The file is whole."""
        os.replace(self._part, self.path)

    def _write(self, mode: str, records: Sequence[dict[str, Any]]) -> None:
        with open(self._part, mode) as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
