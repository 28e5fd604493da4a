"""The reward of examples/rl/tiny.yaml: texts that can be spoken."""

from collections.abc import Sequence

from flagscale_like.rl.answers import Answer

VOWELS, CONSONANTS = set("aeiou"), set("bcdfghjklmnpqrstvwxyz")


def speakable(answers: Sequence[Answer]) -> list[float]:
    """Of each answer, half the share of its characters that are letters, and half that of its neighbours that alternate.

    A vowel and a consonant beside each other alternate. The shares are of 12 characters and 11 neighbours.
    """
    return [(_letters(answer.text) + _alternating(answer.text)) / 2 for answer in answers]


def _letters(text: str) -> float:
    return sum(character in VOWELS | CONSONANTS for character in text[:12]) / 12


def _alternating(text: str) -> float:
    pairs = [set(text[place : place + 2]) for place in range(11)]
    return sum(bool(pair & VOWELS) and bool(pair & CONSONANTS) for pair in pairs) / 11
