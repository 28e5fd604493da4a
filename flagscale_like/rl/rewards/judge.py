"""A language model that says which of two answers is better: RLAIF (Lee et al. 2023)."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Protocol

from flagscale_like.config import JudgeReward
from flagscale_like.data.chat import BadConversationError
from flagscale_like.data.pair_shards import parse_pair
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.json_files import lines_of
from flagscale_like.rl.answers import Answer, Score
from flagscale_like.rl.rewards.checked import AskedByMain, on_main
from flagscale_like.runtime.parallel import ParallelContext

INSTRUCTION = """Two answers to the same prompt follow. Which one is better?

Prompt:
{prompt}

Answer A:
{first}

Answer B:
{second}

Say nothing but the letter of the better answer, A or B."""
PLACES = ("{prompt}", "{first}", "{second}")

VERDICT = re.compile(r"\b(A|B|TIE|Tie|tie)\b")
FEW = 20  # verdicts from which on the share of unparsed ones is held against its limit


class Verdict(Enum):
    """Which of two answers a judge finds better, asked in both orders."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    UNPARSED = "unparsed"


class Asker(Protocol):
    """What answers questions. All ranks call it alike."""

    def ask(self, questions: Sequence[str]) -> list[str]:
        """One text for each question."""
        ...


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt."""

    prompt: str
    first: str
    second: str


@dataclass
class Counts:
    """What a judge has said so far.

    Attributes:
        asked: questions, two for each pair.
        unparsed: answers to them that name neither or both.
        ties: pairs without a better answer.
        turned: of them, those where the judge chose the same place in both orders.
    """

    asked: int = 0
    unparsed: int = 0
    ties: int = 0
    turned: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name):,}" for field in fields(self))


class Judge:
    """Asks which of two answers is better, in both orders.

    A verdict counts if the judge chooses the same answer in both orders. Otherwise the pair is a tie.

    Args:
        instruction: the question, in which {prompt}, {first} and {second} are replaced.
        unparsed_limit: share of the verdicts that may not be parsed.

    Attributes:
        counts: of all that was asked.
    """

    def __init__(self, asker: Asker, *, instruction: str = INSTRUCTION, unparsed_limit: float = 0.1) -> None:
        self.asker, self.instruction, self.unparsed_limit = asker, instruction, unparsed_limit
        self.counts = Counts()

    def compare(self, pairs: Sequence[Comparison]) -> list[Verdict]:
        """The verdict on each pair.

        Raises:
            DataError: the judge cannot be asked, or too many verdicts cannot be parsed.
        """
        questions = [
            self._question(*texts) for p in pairs for texts in ((p, p.first, p.second), (p, p.second, p.first))
        ]
        texts = self.asker.ask(questions)
        choices = [parse_verdict(text) for text in texts]
        self.counts.asked += len(choices)
        self.counts.unparsed += choices.count("")
        share = self.counts.unparsed / max(1, self.counts.asked)
        if self.counts.asked >= FEW and share > self.unparsed_limit:
            last = next((text for text, choice in zip(texts, choices, strict=True) if not choice), "")
            raise DataError(
                f"judge: {self.counts.unparsed} of {self.counts.asked} verdicts cannot be parsed, more than unparsed_limit "
                f"({self.unparsed_limit:g}); one is {last[:200]!r}: change the instruction, max_new_tokens or the limit"
            )
        return [self._verdict(*both) for both in zip(choices[0::2], choices[1::2], strict=True)]

    def _question(self, pair: Comparison, first: str, second: str) -> str:
        texts = dict(zip(PLACES, (pair.prompt, first, second), strict=True))
        pattern = "|".join(map(re.escape, PLACES))  # at once, so that a text with {second} in it stays as it is
        return re.sub(pattern, lambda found: texts[found[0]], self.instruction)

    def _verdict(self, one: str, other: str) -> Verdict:
        if not one or not other:
            return Verdict.UNPARSED
        if one != other and "tie" not in (one, other):  # A and then B, or B and then A: the same answer
            return Verdict.FIRST if one == "A" else Verdict.SECOND
        self.counts.ties += 1
        self.counts.turned += one == other != "tie"
        return Verdict.TIE


def parse_verdict(text: str) -> str:
    """`A`, `B` or `tie`, by the last line that names exactly one of them; empty where none does."""
    for line in reversed(text.splitlines()):
        found = {"tie" if name.lower() == "tie" else name for name in VERDICT.findall(line)}
        if found:
            return found.pop() if len(found) == 1 else ""
    return ""


@dataclass(frozen=True)
class Agreement:
    """A judge against pairs whose better answer is known.

    Attributes:
        agreed: share of the decided pairs on which both agree; 0 where none is decided.
        ties, unparsed: pairs that the judge did not decide.
    """

    pairs: int
    agreed: float
    ties: int
    unparsed: int

    def __str__(self) -> str:
        return (
            f"the judge agrees with {self.agreed:.1%} of the labelled pairs that it decides ({self.pairs} pairs, "
            f"{self.ties} ties, {self.unparsed} not parsed)"
        )


def agreement(judge: Judge, labelled: Sequence[Comparison]) -> Agreement:
    """Ask a judge about pairs of which the first answer is the better one. The judge sees both orders, and no label."""
    verdicts = judge.compare(labelled)
    right, wrong = verdicts.count(Verdict.FIRST), verdicts.count(Verdict.SECOND)
    decided = right + wrong
    ties, unparsed = verdicts.count(Verdict.TIE), verdicts.count(Verdict.UNPARSED)
    return Agreement(len(labelled), right / decided if decided else 0.0, ties, unparsed)


def read_labelled(path: Path) -> list[Comparison]:
    """The pairs of a file of JSON lines, the chosen answer first; see data.pair_shards.

    Raises:
        DataError: the file cannot be read, or a line is no pair.
    """
    pairs = []
    try:
        lines = lines_of(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_pair(line)
        except BadConversationError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        sides = [side.messages for side in (record.chosen, record.rejected)]
        matches = itertools.takewhile(lambda both: both[0].get("content") == both[1].get("content"), zip(*sides))
        shared = sum(1 for _ in matches)
        texts = [_text(messages) for messages in (sides[0][:shared], sides[0][shared:], sides[1][shared:])]
        pairs.append(Comparison(*texts))
    if not pairs:
        raise DataError(f"{path}: holds no pair")
    return pairs


def _text(messages: Sequence[dict]) -> str:
    """Messages as a judge reads them: a single one as it is, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def prompt_text(answer: Answer) -> str:
    """The prompt of an answer as a judge reads it: without the marks of a chat template."""
    return _text([dict(message) for message in answer.messages]) if answer.messages else answer.prompt


class JudgedAnswers:
    """A judge as a reward: the share of comparisons with other answers of the prompt that an answer wins.

    The answers of a prompt stand in a ring, and each is compared with the next `opponents`. A win is 1; a tie, and a pair
    without a parsed verdict, half. An answer that makes up for another one (rl.max_refills), and comes alone, gets half, too.
    """

    def __init__(self, judge: Judge, *, opponents: int) -> None:
        self.judge, self.opponents = judge, opponents

    @functools.cached_property
    def outside(self) -> AskedByMain | None:
        """The same for a judge that runs outside of the ranks, as a source that one rank asks; None where it does not."""
        asker = self.judge.asker
        if not isinstance(asker, AskedOnce):
            return None
        judge = Judge(asker.asker, instruction=self.judge.instruction, unparsed_limit=self.judge.unparsed_limit)
        return AskedByMain(JudgedAnswers(judge, opponents=self.opponents), asker.ctx)

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        """See RewardSource.

        Raises:
            DataError: see Judge.compare().
        """
        groups: dict[tuple, list[int]] = defaultdict(list)
        for number, answer in enumerate(answers):
            groups[(answer.prompt, *answer.prompt_ids)].append(number)
        pairs: dict[tuple[int, int], None] = {}  # in their order
        for members in groups.values():
            for place, step in itertools.product(range(len(members)), range(1, self.opponents + 1)):
                other = (place + step) % len(members)
                if other != place:
                    one, two = members[place], members[other]
                    pairs[min(one, two), max(one, two)] = None
        verdicts = self.judge.compare(
            [Comparison(prompt_text(answers[i]), answers[i].text, answers[j].text) for i, j in pairs]
        )
        wins: dict[int, list[float]] = defaultdict(list)
        for (i, j), verdict in zip(pairs, verdicts, strict=True):
            first = {Verdict.FIRST: 1.0, Verdict.SECOND: 0.0}.get(verdict, 0.5)
            wins[i].append(first)
            wins[j].append(1.0 - first)
        return [
            Score(sum(own) / len(own)) if own else Score(0.5, reason="no other answer to compare with")
            for own in (wins[number] for number in range(len(answers)))
        ]


@dataclass(frozen=True)
class AskedOnce:
    """An asker that is not spread over the ranks: rank 0 asks it."""

    asker: Asker
    ctx: ParallelContext

    def ask(self, questions: Sequence[str]) -> list[str]:
        """See Asker."""
        return on_main(self.ctx, lambda: self.asker.ask(questions))


def build_judge(options: JudgeReward, asker: Asker, say: Callable[[str], None]) -> Judge:
    """A judge, compared with its labelled set where it has one. All ranks call it alike.

    Raises:
        ConfigError: the instruction lacks a place, or the judge agrees with too few of the labelled pairs.
        DataError: see read_labelled() and Judge.compare().
    """
    judge = Judge(asker, instruction=read_instruction(options), unparsed_limit=options.unparsed_limit)
    if options.labelled is not None:
        found = agreement(judge, read_labelled(Path(options.labelled)))
        say(str(found))
        if found.agreed < options.agreement:
            raise ConfigError(f"{found}, fewer than reward.agreement ({options.agreement:g}): choose another judge")
    return judge


def read_instruction(options: JudgeReward) -> str:
    """The question that a judge is asked.

    Raises:
        ConfigError: its file cannot be read, or lacks one of the places.
    """
    if options.instruction is None:
        return INSTRUCTION
    path = Path(options.instruction)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if missing := [place for place in PLACES if place not in text]:
        raise ConfigError(f"{path}: has no {' and no '.join(missing)}, where the prompt and the two answers go")
    return text
