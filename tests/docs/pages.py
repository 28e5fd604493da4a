"""The commands and messages of the documentation, as its pages write them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.harness import REPOSITORY

PAGES = [*sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "README.md", REPOSITORY / "README.zh.md"]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|run|run long): (?P<why>.*?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```", re.M | re.S
)
PROGRAMS = ("flagscale-like", "launch/", "bash launch/", "python ", "make ", "torchrun", "sbatch", "kubectl", "pip ")
SYNOPSIS = re.compile(r"\[(--|KEY)")  # what may be left out is in brackets


@dataclass(frozen=True)
class Command:
    """A line that a reader may type. `not_run` is the reason why no test does."""

    page: str
    text: str
    not_run: str = ""
    long: bool = False

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


@dataclass(frozen=True)
class Message:
    """An error as the troubleshooting page shows it, and the command that it is from."""

    arguments: str
    text: str


def commands() -> list[Command]:
    """Every command in a block without a language, in the order of the pages."""
    found = []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if block["kind"] not in ("", "bash"):
                continue
            why = block["why"] if block["mark"] == "not run" else ""
            for line in block["text"].splitlines():
                program = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
                if not program.startswith(PROGRAMS):
                    continue
                synopsis = "a synopsis" if SYNOPSIS.search(line) else ""
                found.append(Command(page.name, line, why or synopsis, block["mark"] == "run long"))
    return found


def messages(page: Path) -> list[Message]:
    """The errors of a page, each below `<!-- run: ARGUMENTS -->`."""
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Message(b["why"], b["text"].strip()) for b in blocks if b["mark"] == "run" and b["kind"] == "text"]
