"""Rules of quality and duplicates: each rule alone, near duplicates against their true resemblance."""

import random

import numpy as np
import pytest

from flagscale_like.data.dedup import digests_of, exact_duplicates, minhash_signature, near_duplicates, text_digest
from flagscale_like.data.filters import Cleaning, Quality

PROSE = "\n".join(
    f"Sentence {i} of the story has words that flow, and it goes to the place of number {i * i} with a friend."
    for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "objection"),
    [
        (PROSE, None),
        ("few words", "too few words"),
        ("", "too few words"),
        ("word " * 100_001, "too many words"),
        (PROSE.replace(" ", ""), "too few words"),
        ("ab cd " * 60, "mean word length"),
        ("incomprehensibilities " * 60, "mean word length"),
        (PROSE.replace(" ", " #"), "too many symbols"),
        (PROSE.replace(" ", " ... ", 30), "too many symbols"),
        ("the 123 4567 of 8901 2345 " * 30, "too few words with letters"),
        ("katze maus hund vogel igel " * 20, "too few stop words"),
        ("\n".join("- " + line for line in PROSE.split("\n")), "mostly bullet points"),
        ("\n".join(line + "..." if i % 2 else line for i, line in enumerate(PROSE.split("\n"))), "lines that end in"),
        (PROSE + "\n" + PROSE, "repeated lines"),
        (PROSE + "\n" + PROSE.split("\n")[0] * 9 + "\n" + PROSE.split("\n")[0] * 9, "characters in repeated lines"),
    ],
)
def test_each_rule_of_quality_objects_to_what_it_is_for(text, objection):
    found = Quality().objection(text)
    assert found == objection if objection is None else found.startswith(objection)


def test_cleaning_does_nothing_unless_asked():
    assert Cleaning().apply("\ufb01n sch\u00c3\u00b6n") == ("\ufb01n sch\u00c3\u00b6n", None)
    assert Cleaning(fix_text=True).apply("sch\u00c3\u00b6n") == ("sch\u00f6n", None)
    assert Cleaning(max_characters=3).apply("long")[1] == "too long"


def test_exact_duplicates_name_the_first():
    digests = digests_of([text_digest(t) for t in "abcabda"], 16)
    assert exact_duplicates(digests).tolist() == [0, 1, 2, 0, 1, 5, 0]


def test_near_duplicates_are_found_by_resemblance_and_nothing_else_is():
    source = random.Random(1)
    vocabulary = [f"w{i}" for i in range(5000)]
    texts, wanted = [], []
    for number in range(60):
        words = source.choices(vocabulary, k=400)
        texts.append(" ".join(words))
        wanted.append(len(wanted))
        if number % 3 == 0:  # two words changed: (396 - 10) / (396 + 10) = 0.95 of the shingles are shared
            words[50], words[300] = "changed", "too"
            texts.append("  ".join(words).upper())
            wanted.append(len(wanted) - 1)
        elif number % 3 == 1:  # every tenth word changed: half of the shingles differ
            texts.append(" ".join("x" if i % 10 == 0 else w for i, w in enumerate(words)))
            wanted.append(len(wanted))
    signatures = digests_of([minhash_signature(t) for t in texts], 512).view(np.uint32)
    assert near_duplicates(signatures, 0.8).tolist() == wanted


def test_near_duplicates_can_be_asked_to_be_almost_equal():
    signatures = np.tile(np.arange(128, dtype=np.uint32), (4, 1))
    signatures[1, 100] = 0  # 127 of 128 agree
    signatures[3, [0, 100]] = 7  # 126
    assert near_duplicates(signatures, 0.99).tolist() == [0, 0, 0, 3]
    assert near_duplicates(signatures, 1.0).tolist() == [0, 1, 0, 3]


def test_a_signature_estimates_the_resemblance():
    words = [f"w{i}" for i in range(1000)]
    a, b = (np.frombuffer(minhash_signature(" ".join(w)), np.uint32) for w in (words[:700], words[300:]))
    shared, union = 396, 696 * 2 - 396
    assert abs(float(np.mean(a == b)) - shared / union) < 0.12
