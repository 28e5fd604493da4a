"""The reward of examples/rl/tiny.yaml: texts that can be spoken."""

VOWELS, CONSONANTS = set("aeiou"), set("bcdfghjklmnpqrstvwxyz")


def speakable(answers):
    """Of each answer, half the share of its characters that are letters, and half that of its neighbours that alternate.

    A vowel and a consonant beside each other alternate. The shares are of 12 characters and 11 neighbours.
    """
    return [(_letters(answer.text) + _alternating(answer.text)) / 2 for answer in answers]


def _letters(text):
    return sum(character in VOWELS | CONSONANTS for character in text[:12]) / 12


def _alternating(text):
    pairs = list(zip(text[:11], text[1:12]))  # noqa: B905  # the second begins one character later
    kinds = [({a, b} & VOWELS and {a, b} & CONSONANTS) for a, b in pairs]
    return sum(map(bool, kinds)) / 11
