"""The table beside a .bin/.idx: from a document's number to its file and line."""

from __future__ import annotations

from pathlib import Path


class DocumentTable:
    """PREFIX.documents.parquet, read a row group at a time; a prefix that was made elsewhere may have none."""

    def __init__(self, prefix: str | Path) -> None:
        self.path = Path(f"{prefix}.documents.parquet")
        self._file = None
        self._held: tuple[int, list[dict]] = (-1, [])

    def place(self, document: int) -> tuple[str, int] | None:
        """Source file and line (or parquet row), from 1; None where there is no table, or no such row."""
        import pyarrow.parquet as pq

        if self._file is None:
            if not self.path.is_file():
                return None
            self._file = pq.ParquetFile(self.path)
        for group in range(self._file.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if document < rows:
                if self._held[0] != group:
                    self._held = (group, self._file.read_row_group(group).to_pylist())
                row = self._held[1][document]
                return row["source"], row["line"]
            document -= rows
        return None
