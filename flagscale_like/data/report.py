"""The report of preprocessing: documents kept, documents dropped by reason, and lines without a document."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flagscale_like.json_files import write_json

MAX_BAD_LINES = 10_000
EXAMPLES = 5

# (file, line, note)
Place = tuple[str, int, str]


@dataclass
class Dropped:
    """The documents dropped for one reason.

    Attributes:
        documents, characters: how many.
        examples: the places of the first EXAMPLES documents.
    """

    documents: int = 0
    characters: int = 0
    examples: list[Place] = field(default_factory=list)

    def add(self, characters: int, example: Place) -> None:
        """Count one document."""
        self.documents += 1
        self.characters += characters
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """Counts of a preprocessing run, or of one shard of it.

    Attributes:
        documents, tokens: in the output. The end-of-text token of each document is counted.
        characters: characters of the documents in the output, after cleaning.
        read: documents read.
        empty: documents read that have no token; they are not in the output.
        dropped: the dropped documents, by reason.
        bad_lines: lines without a document.
        bad_line_places: the places of the first MAX_BAD_LINES of these lines.
        counts: further counts of what is in the output, by name.
        largest_id: the largest token id in the output; -1 without tokens.
    """

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    read: int = 0
    empty: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    bad_lines: int = 0
    bad_line_places: list[Place] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    largest_id: int = -1

    def count(self, name: str, number: int = 1) -> None:
        """Add to one of `counts`."""
        self.counts[name] = self.counts.get(name, 0) + number

    def drop(self, reason: str, characters: int, example: Place) -> None:
        """Count a document that is dropped before it was counted as kept."""
        self.dropped.setdefault(reason, Dropped()).add(characters, example)

    def drop_counted(self, reason: str, documents: int, tokens: int, characters: int, examples: list[Place]) -> None:
        """Move documents that were counted as kept to the dropped ones."""
        if documents:
            self.documents -= documents
            self.tokens -= tokens
            self.characters -= characters
            self.dropped[reason] = Dropped(documents, characters, examples)

    def bad(self, place: Place) -> None:
        """Count a line without a document."""
        self.bad_lines += 1
        if len(self.bad_line_places) < MAX_BAD_LINES:
            self.bad_line_places.append(place)

    def add(self, other: Report) -> None:
        """Add the counts of another report to this one."""
        for name in ("documents", "tokens", "characters", "read", "empty", "bad_lines"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_id = max(self.largest_id, other.largest_id)
        self.bad_line_places += other.bad_line_places[: MAX_BAD_LINES - len(self.bad_line_places)]
        for name, number in other.counts.items():
            self.count(name, number)
        for reason, theirs in other.dropped.items():
            ours = self.dropped.setdefault(reason, Dropped())
            ours.documents += theirs.documents
            ours.characters += theirs.characters
            ours.examples += theirs.examples[: EXAMPLES - len(ours.examples)]

    def shift(self, lines: int) -> None:
        """Add `lines` to the line number of every place."""
        self.bad_line_places = [(source, line + lines, reason) for source, line, reason in self.bad_line_places]
        for entry in self.dropped.values():
            entry.examples = [(source, line + lines, note) for source, line, note in entry.examples]

    def describe_dropped(self) -> str:
        """How many documents were dropped for each reason, were empty, or were bad lines."""
        parts = [f"{entry.documents:,} {reason}" for reason, entry in self.dropped.items()]
        parts += [f"{self.empty:,} empty"] * bool(self.empty) + [f"{self.bad_lines:,} bad lines"] * bool(self.bad_lines)
        return ", ".join(parts) or "the files hold none"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The rows of a table with the columns: what, documents, characters, example."""
        rows = [("kept", f"{self.documents:,}", f"{self.characters:,}", "")]
        for reason, entry in sorted(self.dropped.items()):
            rows.append((reason, f"{entry.documents:,}", f"{entry.characters:,}", format_place(entry.examples[0])))
        if self.empty:
            rows.append(("empty", f"{self.empty:,}", "0", ""))
        if self.bad_lines:
            rows.append(("bad lines", f"{self.bad_lines:,}", "", format_place(self.bad_line_places[0])))
        return rows

    def write(self, path: Path, **more: object) -> None:
        """Write this report and the entries of `more` as JSON, atomically. `read_from` reads it back."""
        write_json(path, {**more, **asdict(self)})

    def write_readable(self, path: Path, **more: object) -> None:
        """Write like `write`, with each place as the text `file:line: note`."""
        values = asdict(self)
        values["bad_line_places"] = [format_place(place) for place in self.bad_line_places]
        for reason, entry in self.dropped.items():
            values["dropped"][reason]["examples"] = [format_place(place) for place in entry.examples]
        write_json(path, {**more, **values})

    @classmethod
    def read_from(cls, path: Path) -> Report:
        """Read a report that `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["dropped"] = {reason: Dropped(**entry) for reason, entry in values["dropped"].items()}
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


def format_place(place: Place) -> str:
    """A place as `file:line: note`, the form that editors and terminals recognise."""
    source, line, note = place
    return f"{source}:{line}: {note}" if note else f"{source}:{line}"
