"""What is under way: which texts have which rows of the cache, and what the next step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from flagscale_like.generation.rollout import Prompt, Rollout, Sampling
from flagscale_like.generation.sampling import text_key
from flagscale_like.model.kv_cache import KeyValueCache, PromptPart


@dataclass(eq=False)
class Text:
    """A text under way.

    Attributes:
        key: from which its random numbers are counted.
        room: tokens that it may have with its prompt.
    """

    rollout: Rollout
    sampling: Sampling
    key: int
    room: int

    @property
    def length(self) -> int:
        """Its tokens, with the prompt's."""
        return len(self.rollout.prompt_ids) + len(self.rollout.ids)


@dataclass(eq=False)
class Group:
    """A prompt's texts that have no row yet.

    Attributes:
        waiting: the texts, the first sample first.
        done: tokens of the prompt that are computed.
        held: once the prompt is computed while texts still wait, a copy of its keys and values.
        logits: then also the logits after its last token, [1, v], on the last stage.
    """

    prompt: Prompt
    waiting: deque[Text]
    done: int = 0
    held: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class Plan:
    """What a step computes.

    Attributes:
        decoding: the texts in rows 0, 1, ... whose next token's logits it computes.
        prompts: parts of prompts, with the group of each.
        placed: each group whose first tokens are drawn, the first row, and the texts that get the rows from it on.
    """

    decoding: list[Text] = field(default_factory=list)
    prompts: list[tuple[PromptPart, Group]] = field(default_factory=list)
    placed: list[tuple[Group, int, list[Text]]] = field(default_factory=list)


class Schedule:
    """Texts in the order in which they came: as many at a time as the cache has rows.

    A text that ends leaves its row to the last one, so that the texts under way always fill the first rows. At most one
    prompt is computed in part; its row is the one behind them.

    Args:
        most_tokens: of a step, more than the cache has rows. Longer prompts are computed in parts.

    Attributes:
        running: texts of the first rows.
        waiting: groups with texts that have no row.
    """

    def __init__(self, cache: KeyValueCache, most_tokens: int) -> None:
        self.cache, self.most_tokens = cache, most_tokens
        self.running: list[Text] = []
        self.waiting: deque[Group] = deque()

    def add(self, prompt: Prompt, sampling: Sampling, room: int, version: int) -> list[Text]:
        """A prompt's texts; they wait."""
        texts = [
            Text(
                Rollout(prompt.number, sample, prompt.ids, version=version),
                sampling,
                text_key(sampling.seed, prompt.number, sample),
                min(room, len(prompt.ids) + sampling.max_new_tokens),
            )
            for sample in range(prompt.samples)
        ]
        self.waiting.append(Group(prompt, deque(texts)))
        return texts

    @property
    def count(self) -> int:
        """Texts that have not ended."""
        return len(self.running) + sum(len(group.waiting) for group in self.waiting)

    def plan(self) -> Plan:
        """The next step: a token of each running text, and of the prompts that wait as much as there is room for."""
        plan = Plan(decoding=list(self.running))
        row, budget, at = len(self.running), self.most_tokens - len(self.running), len(self.running)
        for group in self.waiting:
            free = self.cache.rows - row
            if not free:
                break
            if group.held is None:
                count = min(len(group.prompt.ids) - group.done, budget)
                if not count:
                    break
                part = PromptPart(row, group.done, at, count, len(group.prompt.ids))
                plan.prompts.append((part, group))
                budget, at = budget - count, at + count
                if group.done + count < part.length:
                    break
            texts = list(group.waiting)[:free]
            plan.placed.append((group, row, texts))
            row += len(texts)
        return plan

    def computed(self, plan: Plan, logits: Tensor | None) -> None:
        """Take over what a plan's step has computed: texts get their rows, and share their prompt's keys.

        Args:
            logits: a row for each of plan.placed; None on other stages than the last.
        """
        for part, group in plan.prompts:
            group.done += part.count
        for index, (group, first, texts) in enumerate(plan.placed):
            places, rows = len(group.prompt.ids), slice(first, first + len(texts))
            if group.held is not None:
                self.cache.put(group.held, rows)
            elif len(texts) > 1:
                self.cache.copy(first, slice(first + 1, rows.stop), places)
            for _ in texts:
                group.waiting.popleft()
            if group.waiting and group.held is None:
                group.held = self.cache.take_out(first, places)
                group.logits = None if logits is None else logits[index : index + 1].clone()
            self.running += texts
        while self.waiting and not self.waiting[0].waiting:
            self.waiting.popleft()

    def remove(self, ended: Callable[[Text], bool]) -> list[Text]:
        """Free the rows of the running texts that have ended; returns these, in the order of their rows."""
        gone = [text for text in self.running if ended(text)]
        partial = self._computed_in_part()
        for row in reversed(range(len(self.running))):
            if not ended(self.running[row]):
                continue
            last = len(self.running) - 1
            if row != last:
                self.running[row] = self.running[last]
                self.cache.copy(last, row_slice(row), self.running[row].length)
            self.running.pop()
            if partial:
                self.cache.copy(last + 1, row_slice(last), partial)
        return gone

    def drop(self, texts: set[Text]) -> None:
        """Drop texts, wherever they are."""
        self.remove(texts.__contains__)
        for group in list(self.waiting):
            group.waiting = deque(text for text in group.waiting if text not in texts)
            if not group.waiting:
                self.waiting.remove(group)

    def _computed_in_part(self) -> int:
        """Tokens that are computed of the prompt that is computed in part, in the row behind the running texts."""
        first = self.waiting[0] if self.waiting else None
        return first.done if first is not None and first.held is None else 0


def row_slice(row: int) -> slice:
    """One row, as a slice."""
    return slice(row, row + 1)
