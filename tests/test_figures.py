"""How figures are written: zero has no sign, and losses are written in one place."""

import math
import re

import pytest

from flagscale_like.figures import fixed, short
from tests.harness import REPOSITORY


@pytest.mark.parametrize(
    ("value", "decimals", "digits"),
    [
        (-1e-9, "0.0000", "-1e-09"),
        (-0.0, "0.0000", "0"),
        (-4.9e-5, "0.0000", "-4.9e-05"),
        (-5.1e-5, "-0.0001", "-5.1e-05"),
        (12.34567, "12.3457", "12.35"),
        (math.nan, "nan", "nan"),
    ],
)
def test_zero_has_no_sign(value, decimals, digits):
    assert (fixed(value), short(value)) == (decimals, digits)


def test_four_decimals_are_written_by_fixed_alone():
    paths = (REPOSITORY / "flagscale_like").rglob("*.py")
    assert {path.name for path in paths if re.search(r"\{[^{}]*:[^{}]*\.4f\}", path.read_text())} == {"figures.py"}
