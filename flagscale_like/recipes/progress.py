"""How far a file is written that is written block by block: FILE.partial holds it, FILE.progress.json says how far it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flagscale_like.errors import DataError
from flagscale_like.json_files import BAD_JSON, write_json


class Progress:
    """The record of a file that is being written.

    Args:
        path: of the whole file.
        made_from: everything that the file depends on, as JSON types.
        overwrite: replace a file that is there.

    Attributes:
        partial: where the file is written; it takes its name at the end.
        found: what an interrupted call recorded; None where there is nothing to go on with.

    Raises:
        DataError: the file is there and `overwrite` is false; or it was begun with something else.
    """

    def __init__(self, path: Path, made_from: dict[str, Any], *, overwrite: bool) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._record, self._made_from = path.with_name(path.name + ".progress.json"), made_from
        if path.is_file() and not overwrite:
            raise DataError(f"{path}: exists: choose another file, or replace it with --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)
        there = self._record.is_file() and self.partial.is_file()
        self.found: dict[str, int] | None = self._read() if there else None

    def _read(self) -> dict[str, int]:
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            made_from, written = record["made_from"], {name: int(value) for name, value in record["written"].items()}
        except (*BAD_JSON, KeyError, TypeError, AttributeError):
            raise DataError(f"{self._record}: cannot be read: remove it and {self.partial} to start again") from None
        wanted = json.loads(json.dumps(self._made_from))
        different = [name for name in wanted if made_from.get(name) != wanted[name]]
        if different:
            raise DataError(
                f"{self.partial}: was begun by a call that differs in {', '.join(different)}: repeat that command, or remove "
                f"it and {self._record.name} to start again"
            )
        return written

    def note(self, **written: int) -> None:
        """Record how much is on disk, atomically."""
        write_json(self._record, {"made_from": self._made_from, "written": written})

    def finish(self) -> None:
        """Give the whole file its name."""
        self.partial.replace(self.path)
        self._record.unlink(missing_ok=True)
