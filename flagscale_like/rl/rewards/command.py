"""A program as a reward: a JSON line in for each answer, a JSON line out with its score."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from flagscale_like.errors import ConfigError, DataError
from flagscale_like.json_files import BAD_JSON, lines_of
from flagscale_like.rl.answers import Answer, Score
from flagscale_like.rl.rewards.checked import checked_values, show


class Command:
    """A program that is started once for the answers of each call.

    Each line of its input is {"prompt", "text", "fields", "finish"}; each line of its output {"score"}, in the same order.

    Args:
        command: the program and its arguments.
        timeout_s: how long it may take.
    """

    def __init__(self, command: Sequence[str], *, timeout_s: float) -> None:
        self.command, self.timeout_s = list(command), timeout_s
        self.name = f"reward command {self.command[0]}"

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        """See RewardSource.

        Raises:
            ConfigError: there is no such program.
            DataError: it takes too long, ends with another code than 0, or prints something else.
        """
        lines = [
            json.dumps({"prompt": a.prompt, "text": a.text, "fields": dict(a.fields), "finish": a.finish}, default=str)
            for a in answers
        ]
        try:
            done = subprocess.run(
                self.command,
                input="".join(line + "\n" for line in lines).encode("utf-8"),
                capture_output=True,
                timeout=self.timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise DataError(
                f"{self.name}: did not end within {self.timeout_s:g} s for {len(answers)} answers: give it a larger timeout_s"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.name}: cannot be started: {error.strerror}") from None
        if done.returncode:
            said = done.stderr.decode("utf-8", errors="replace").strip().splitlines()[-3:]
            raise DataError(
                f"{self.name}: ended with exit code {done.returncode}: {' | '.join(said) or 'it said nothing'}"
            )
        return self._read(answers, lines_of(done.stdout.decode("utf-8", errors="replace")))

    def _read(self, answers: Sequence[Answer], lines: list[str]) -> list[Score]:
        lines = [line for line in lines if line.strip()]
        if len(lines) != len(answers):
            raise DataError(f"{self.name}: printed {len(lines)} lines for {len(answers)} answers: print one for each")
        values = [self._score(line, answers, number) for number, line in enumerate(lines)]
        return [Score(value) for value in checked_values(answers, values, self.name)]

    def _score(self, line: str, answers: Sequence[Answer], number: int) -> Any:
        try:
            return json.loads(line)["score"]
        except (*BAD_JSON, KeyError, TypeError):
            raise DataError(
                f'{self.name}: line {number + 1} is {line[:100]!r}, not {{"score": number}}, for {show(answers, number)}'
            ) from None
