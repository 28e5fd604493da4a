"""What preprocessing did: documents kept, dropped and why, and the lines that held none."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

MOST_BAD_LINES = 10_000
EXAMPLES = 5

# File, line, and what is to be said of it.
Place = tuple[str, int, str]


@dataclass
class Dropped:
    """Documents dropped for one reason; the places of the first few."""

    documents: int = 0
    characters: int = 0
    examples: list[Place] = field(default_factory=list)

    def add(self, characters: int, example: Place) -> None:
        self.documents += 1
        self.characters += characters
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """Counts of a preprocessing run, or of one shard of it.

    Attributes:
        documents, tokens: in the result; each document's end-of-text token counts.
        characters: of the documents in the result, after mending.
        read: documents read; `empty` ones among them had no token.
        dropped: by reason.
        bad_lines: how many; `bad_line_places` holds the first ten thousand.
    """

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    read: int = 0
    empty: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    bad_lines: int = 0
    bad_line_places: list[Place] = field(default_factory=list)

    def drop(self, reason: str, characters: int, example: Place) -> None:
        self.dropped.setdefault(reason, Dropped()).add(characters, example)

    def take_out(self, reason: str, documents: int, tokens: int, characters: int, examples: list[Place]) -> None:
        """Drop documents that were counted as kept."""
        if documents:
            self.documents -= documents
            self.tokens -= tokens
            self.characters -= characters
            self.dropped[reason] = Dropped(documents, characters, examples)

    def bad(self, place: Place) -> None:
        self.bad_lines += 1
        if len(self.bad_line_places) < MOST_BAD_LINES:
            self.bad_line_places.append(place)

    def add(self, other: Report) -> None:
        """Take another report's counts in."""
        for name in ("documents", "tokens", "characters", "read", "empty", "bad_lines"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad_line_places += other.bad_line_places[: MOST_BAD_LINES - len(self.bad_line_places)]
        for reason, theirs in other.dropped.items():
            ours = self.dropped.setdefault(reason, Dropped())
            ours.documents += theirs.documents
            ours.characters += theirs.characters
            ours.examples += theirs.examples[: EXAMPLES - len(ours.examples)]

    def shift(self, lines: int) -> None:
        """Count the lines of all places from `lines` lines before."""
        self.bad_line_places = [(source, line + lines, reason) for source, line, reason in self.bad_line_places]
        for entry in self.dropped.values():
            entry.examples = [(source, line + lines, note) for source, line, note in entry.examples]

    def why_nothing_is_left(self) -> str:
        """Where the documents went, in a few words."""
        parts = [f"{entry.documents:,} {reason}" for reason, entry in self.dropped.items()]
        parts += [f"{self.empty:,} empty"] * bool(self.empty) + [f"{self.bad_lines:,} bad lines"] * bool(self.bad_lines)
        return ", ".join(parts) or "there was none"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table: what, documents, characters, an example."""
        rows = [("kept", f"{self.documents:,}", f"{self.characters:,}", "")]
        for reason, entry in sorted(self.dropped.items()):
            rows.append((reason, f"{entry.documents:,}", f"{entry.characters:,}", said(entry.examples[0])))
        if self.empty:
            rows.append(("empty", f"{self.empty:,}", "0", ""))
        if self.bad_lines:
            rows.append(("bad lines", f"{self.bad_lines:,}", "", said(self.bad_line_places[0])))
        return rows

    def write(self, path: Path, **more: object) -> None:
        """Write as JSON, at once and durably."""
        write_json(path, {**more, **asdict(self)})

    def write_for_people(self, path: Path, **more: object) -> None:
        """The same with places as `file:line: why`."""
        values = asdict(self)
        values["bad_line_places"] = [said(place) for place in self.bad_line_places]
        for reason, entry in self.dropped.items():
            values["dropped"][reason]["examples"] = [said(place) for place in entry.examples]
        write_json(path, {**more, **values})

    @classmethod
    def read_from(cls, path: Path) -> Report:
        """What `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["dropped"] = {reason: Dropped(**entry) for reason, entry in values["dropped"].items()}
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


def said(place: Place) -> str:
    """A place as editors and terminals open it: `file:line: why`."""
    source, line, note = place
    return f"{source}:{line}: {note}" if note else f"{source}:{line}"


def write_json(path: Path, values: object) -> None:
    """Replace a file by a whole one: a kill leaves the old or the new."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
