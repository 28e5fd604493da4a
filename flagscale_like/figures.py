"""How figures are written: in the log, on the pages of the report, and where a command prints them."""

from __future__ import annotations


def fixed(value: float) -> str:
    """Four decimals. What rounds to zero has no sign: a loss whose advantages add up to nothing is not -0.0000."""
    return f"{value:z.4f}"


def short(value: float) -> str:
    """Four significant digits; zero has no sign."""
    return f"{value:z.4g}"
