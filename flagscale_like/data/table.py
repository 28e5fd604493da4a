"""DocumentTable: the source file and line of each document of a .bin/.idx pair."""

from __future__ import annotations

from pathlib import Path


class DocumentTable:
    """Reads PREFIX.documents.parquet one row group at a time. A prefix that another tool wrote may have no such file."""

    def __init__(self, prefix: str | Path) -> None:
        self.path = Path(f"{prefix}.documents.parquet")
        self._file = None
        self._held: tuple[int, list[dict]] = (-1, [])

    def place(self, document: int) -> tuple[str, int] | None:
        """Return the source file and the line (or parquet row, counted from 1) of a document.

        None: the file or the row does not exist.
        """
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
