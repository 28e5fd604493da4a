"""Cleaning of documents: repair of wrongly decoded text, limits on length, and the quality rules of Gopher."""

from __future__ import annotations

import re
from typing import Literal

from flagscale_like.arch import Frozen

Duplicates = Literal["keep", "exact", "near"]
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "‣", "-", "*", "·")
WORD = re.compile(r"\S+")


class Quality(Frozen):
    """The quality rules of Rae et al. 2021 (Gopher, appendix A.1.1) with the published limits. They suit English prose.

    Attributes:
        min_words, max_words: words of a document.
        min_mean_word_length, max_mean_word_length: characters of a word, averaged over the document.
        max_symbols_per_word: number signs per word, and ellipses per word.
        max_bullet_lines: share of the lines that start with a bullet.
        max_ellipsis_lines: share of the lines that end with an ellipsis.
        min_alphabetic_words: share of the words that contain a letter.
        min_stop_words: how many of the words the, be, to, of, and, that, have, with occur in the document.
        max_duplicate_lines: share of the lines that repeat an earlier line.
        max_duplicate_line_characters: share of the characters that are in such lines.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2
    max_duplicate_lines: float = 0.3
    max_duplicate_line_characters: float = 0.2

    def objection(self, text: str) -> str | None:
        """Name the first rule that a text breaks. None: the text breaks no rule."""
        words = WORD.findall(text)
        count = len(words)
        if count < self.min_words:
            return "too few words"
        if count > self.max_words:
            return "too many words"
        mean = sum(map(len, words)) / count
        if not self.min_mean_word_length <= mean <= self.max_mean_word_length:
            return "mean word length"
        ellipses = text.count("...") + text.count("…")
        if max(text.count("#"), ellipses) / count > self.max_symbols_per_word:
            return "too many symbols"
        if sum(any(map(str.isalpha, word)) for word in words) / count < self.min_alphabetic_words:
            return "too few words with letters"
        if len(STOP_WORDS.intersection(word.lower().strip(".,;:!?\"'()") for word in words)) < self.min_stop_words:
            return "too few stop words"
        return self._objection_to_lines([line for line in map(str.strip, text.splitlines()) if line])

    def _objection_to_lines(self, lines: list[str]) -> str | None:
        count = len(lines)
        if sum(line.startswith(BULLETS) for line in lines) / count > self.max_bullet_lines:
            return "mostly bullet points"
        if sum(line.endswith(("...", "…")) for line in lines) / count > self.max_ellipsis_lines:
            return "lines that end in an ellipsis"
        once = sum(map(len, set(lines)))
        if 1 - len(set(lines)) / count > self.max_duplicate_lines:
            return "repeated lines"
        if 1 - once / sum(map(len, lines)) > self.max_duplicate_line_characters:
            return "characters in repeated lines"
        return None


class Cleaning(Frozen):
    """How documents are cleaned before they are tokenized. With the defaults, every document is kept unchanged.

    Attributes:
        fix_text: repair text that was decoded with the wrong encoding, with ftfy (Speer 2019).
        min_characters, max_characters: drop documents that are shorter or longer.
        quality: drop documents that break these rules; None applies no rules.
        duplicates: `keep` keeps duplicates; `exact` drops all but the first document with the same text; `near` also drops
            all but the first of similar documents.
        near_threshold: the Jaccard similarity of five-word shingles from which two documents are near duplicates.
    """

    fix_text: bool = False
    min_characters: int = 0
    max_characters: int | None = None
    quality: Quality | None = None
    duplicates: Duplicates = "keep"
    near_threshold: float = 0.8

    def apply(self, text: str) -> tuple[str, str | None]:
        """Clean one document. Duplicates are found later, over the whole corpus.

        Returns:
            The repaired text, and the reason to drop the document; None keeps it.
        """
        if self.fix_text:
            import ftfy

            text = ftfy.fix_text(text)
        if len(text) < self.min_characters:
            return text, "too short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return text, "too long"
        return text, self.quality.objection(text) if self.quality else None
