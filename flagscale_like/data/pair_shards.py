"""Shards of pairs: each line of the inputs becomes the chosen and the rejected answer of a pair, two conversations.

| keys of a line | form |
|---|---|
| `prompt`, `chosen`, `rejected` | texts, a user's message and two answers of the assistant; or lists of messages |
| `chosen`, `rejected` | whole conversations, lists of messages with the same beginning |

`margin`, by how much the chosen answer is better, and `weight`, the factor on the pair's loss, may stand beside them; `tools`
too, as in `data.chat`. What the two conversations have in common is the prompt: no token of it counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flagscale_like.data.chat import (
    BadConversationError,
    Conversation,
    Encoded,
    Message,
    NothingCountsError,
    check_messages,
    tools_of,
)
from flagscale_like.data.chat_shards import CUT, ChatShardMaker
from flagscale_like.data.readers import Document, Piece
from flagscale_like.data.report import Report
from flagscale_like.errors import required

PAIR_FORMS = "prompt, chosen and rejected (texts or messages), or chosen and rejected (whole conversations of messages)"
OTHER_PROMPTS = "pairs whose prompts tokenise differently before the two answers"
MARGINS = "pairs with a margin"


@dataclass(frozen=True)
class JudgedLine(Document):
    """A line that a pair comes from, with the numbers beside its answers."""

    margin: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class PairRecord:
    """A pair as a chat template takes it. The messages of the prompt have weight 0."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0
    weight: float = 1.0


def parse_pair(text: str) -> PairRecord:
    """Read the pair of one line of JSON; other keys are not read.

    Raises:
        BadConversationError: the text is not JSON, the record has none of the known forms, a message or a number is wrong,
            the conversations do not share a prompt, or the answers are the same.
        NothingCountsError: an answer is empty.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadConversationError(f"no JSON ({error})") from None
    if not isinstance(record, Mapping):
        raise BadConversationError(f"is {type(record).__name__}, not an object with {PAIR_FORMS}")
    missing = [name for name in ("chosen", "rejected") if record.get(name) is None]
    if missing:
        found = ", ".join(map(str, record)) or "(none)"
        raise BadConversationError(f"has no {' and no '.join(missing)} (its keys are {found}): give {PAIR_FORMS}")
    prompt = _prompt(record.get("prompt"))
    sides = [prompt + _answer(record, name, len(prompt)) for name in ("chosen", "rejected")]
    shared = _shared(*sides)
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        _check_answer(name, side[shared:])
    unweighted = [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in sides[0][:shared]]
    tools = tools_of(record.get("tools"))
    numbers = (_number(record, "margin", 0.0, least=-math.inf), _number(record, "weight", 1.0, least=0.0))
    return PairRecord(*(Conversation(unweighted + side[shared:], tools) for side in sides), *numbers)


def _prompt(prompt: object) -> list[Message]:
    if prompt is None:
        return []
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt)


def _answer(record: Mapping[str, Any], name: str, before: int) -> list[Message]:
    answer = record[name]
    if not isinstance(answer, str):
        return check_messages(answer, first=before + 1)
    if not before:
        raise BadConversationError(f"{name} is a text, but there is no prompt: give {PAIR_FORMS}")
    return [{"role": "assistant", "content": answer}]


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages the conversations have in common.

    Raises:
        BadConversationError: all; none; or they part at a message that is not the assistant's.
    """
    if chosen == rejected:
        raise BadConversationError("chosen and rejected are the same")
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if not shared:
        raise BadConversationError("chosen and rejected begin with different messages: they share no prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        role = side[shared]["role"] if shared < len(side) else "no"
        if role != "assistant":
            raise BadConversationError(
                f"message {shared + 1}: here chosen and rejected part, and {name} has {role} message: they have to share all "
                "messages before the assistant's answers"
            )
    return shared


def _check_answer(name: str, messages: list[Message]) -> None:
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise NothingCountsError(f"the {name} answer is empty")


def _number(record: Mapping[str, Any], name: str, default: float, *, least: float) -> float:
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        words = "a number from 0 on" if least == 0 else "a number"
        raise BadConversationError(f"{name} is {value!r}: give {words}")
    return float(value)


class PairShardMaker(ChatShardMaker):
    """Makes shards of pairs. A pair is two documents, the chosen answer and the rejected one, from one line."""

    def documents_of(self, line: Document, piece: Piece, report: Report) -> list[tuple[Document, Encoded]]:
        """The two conversations of a line, without what follows their last counted token."""
        pair = parse_pair(line.text)
        sides = [_to_the_last_counted(self.chat.encode(c.messages, c.tools)) for c in (pair.chosen, pair.rejected)]
        fit = self.fit(sum(len(side.ids) for side in sides), line, piece, report)
        if fit == "drop":
            return []
        if fit == "cut":
            sides = _cut(sides, required(self.options_of_chat.length, "ChatOptions.length"))
            report.count(CUT)
        if np.array_equal(sides[0].ids, sides[1].ids):
            raise BadConversationError("chosen and rejected are the same tokens")
        chosen, rejected = (side.ids[: int(np.flatnonzero(side.weights)[0])] for side in sides)
        report.count(OTHER_PROMPTS, int(not np.array_equal(chosen, rejected)))
        report.count(MARGINS, int(pair.margin != 0))
        judged = JudgedLine(line.source, line.line, line.text, pair.margin, pair.weight)
        return [(judged, side) for side in sides]


def _to_the_last_counted(encoded: Encoded) -> Encoded:
    stop = int(np.flatnonzero(encoded.weights)[-1]) + 1
    return Encoded(encoded.ids[:stop], encoded.weights[:stop])


def _cut(sides: list[Encoded], length: int) -> list[Encoded]:
    """Cut the ends of two answers so that both fit a row; the shorter one only where it exceeds half of it.

    Raises:
        NothingCountsError: no token of an answer is left.
    """
    half, sizes = length // 2, [len(side.ids) for side in sides]
    cut = []
    for side, other in zip(sides, reversed(sizes), strict=True):
        limit = max(half, length - other)
        cut.append(Encoded(side.ids[:limit], side.weights[:limit]))
        if not cut[-1].weights.any():
            raise NothingCountsError(f"no token of an answer is left in {limit:,}")
    return cut
