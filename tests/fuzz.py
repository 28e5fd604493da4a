"""Seeded damage to values and bytes, and the bounds within which a program must answer to it."""

import copy
import random
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flagscale_like.errors import UserError

ODD = (
    *(None, True, False, -1, 0, 0.0, 1.5, 1e20, -1e300, 10**30, 2**63, float("nan"), float("inf")),
    *("", "x", "NaN", "../..", "\ud800", [], [None], [1, "x"], {}, {"x": -1}, [[[]]]),
)
MOST_BYTES = 256 << 20
MOST_S = 20.0


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def odd_json(value: Any, source: random.Random) -> Any:
    """A copy with one to three odd values, missing keys or doubled entries in it."""
    value = copy.deepcopy(value)
    for _ in range(source.randint(1, 3)):
        found = list(places(value))
        if not found:
            return source.choice(ODD)
        container, key = source.choice(found)
        how = source.random()
        if how < 0.2:
            del container[key]
        elif how < 0.3 and isinstance(container, list):
            container.insert(0, copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(source.choice(ODD))
    return value


def odd_bytes(data: bytes, source: random.Random, *, first: int = 0, last: int | None = None) -> bytes:
    """A copy with some bytes between `first` and `last` changed, cut out, doubled or set to 255."""
    content, last = bytearray(data), len(data) if last is None else min(last, len(data))
    for _ in range(source.randint(1, 3)):
        at = source.randrange(first, last)
        how, size = source.random(), source.choice((1, 2, 4, 8))
        if how < 0.5:
            content[at : at + 1] = bytes([source.randrange(256)])
        elif how < 0.7:
            content[at : at + size] = b"\xff" * size
        elif how < 0.8:
            content[at : at + size] = b"\x00" * size
        elif how < 0.9:
            del content[at : at + size]
        else:
            content[at:at] = content[at : at + size]
    return bytes(content)


@contextmanager
def answers() -> Iterator[list[str]]:
    """The block must end, within a time and a memory, or raise a UserError; yields the list of its messages.

    A message is short, and its lines say what is wrong: a traceback, or a library's own exception, is a failure.
    """
    said: list[str] = []
    tracemalloc.start()
    began = time.monotonic()
    try:
        yield said
    except UserError as error:
        said.append(str(error))
    finally:
        peak, seconds = tracemalloc.get_traced_memory()[1], time.monotonic() - began
        tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak / 2**20:.0f} MiB"
    assert seconds < MOST_S
    assert all(0 < len(text) < 4000 for text in said), said
