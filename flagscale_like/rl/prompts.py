"""The prompts of a run: read from JSON lines, made tokens of, and handed out in an order that the seed decides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_like.config import RunConfig
from flagscale_like.data.chat import BadConversationError, ChatTokenizer, check_messages, read_template_file, tools_of
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.generation.rollout import Rollout
from flagscale_like.json_files import BAD_JSON, lines_of
from flagscale_like.rl.answers import Answer
from flagscale_like.training.parts import Part


@dataclass(frozen=True)
class Row:
    """A prompt of the data set.

    Attributes:
        text: as the policy reads it, with the chat template's marks where there is one.
        ids: its tokens.
        fields: the other columns of its line.
        messages: the prompt as a chat; empty where it is a text.
    """

    text: str
    ids: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()


class Words:
    """The policy's tokenizer: what makes tokens of prompts, and text of what was drawn.

    Attributes:
        stop: the tokens that end a rollout: the end of a text, and of an answer where prompts are messages.
    """

    def __init__(self, config: RunConfig) -> None:
        self.folder, template = config.data.tokenizer, config.required_rl.template
        self.tokenizer = Tokenizer(config.data.required_tokenizer)
        self._template = read_template_file(Path(template)) if template else None
        self._chat: ChatTokenizer | None = None
        self._special = set(self.tokenizer.special_texts)
        self.stop: tuple[int, ...] = (self.tokenizer.eod,)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"data.tokenizer {self.folder} has {self.tokenizer.vocab_size} tokens, and model.vocab_size is "
                f"{config.model.vocab_size}: it is another model's tokenizer"
            )

    def row(self, record: Mapping[str, Any]) -> Row:
        """The prompt of a line.

        Raises:
            ValueError: the line has neither a `prompt` nor `messages`, or both, or they cannot be read.
        """
        named = [name for name in ("prompt", "messages") if record.get(name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"has {' and '.join(named) or 'neither'}: give `prompt`, a text, or `messages`, one of them"
            )
        fields = {name: value for name, value in record.items() if name != named[0]}
        if named == ["messages"]:
            text = self._of_messages(record)
            ids = self.tokenizer.encode_with_offsets(text)[0].tolist()
        else:
            text = record["prompt"]
            if not isinstance(text, str):
                raise ValueError(f"prompt is {type(text).__name__}, not a text")
            ids = [*self.tokenizer.before_text, *self.tokenizer.encode_batch([text])[0]]
        if not ids:
            raise ValueError("is empty: a prompt needs a token to begin with")
        return Row(text, tuple(ids), fields, record.get("messages") or ())

    def _of_messages(self, record: Mapping[str, Any]) -> str:
        if self._chat is None:
            self._chat = ChatTokenizer(self.tokenizer.folder, self._template)
            self.stop = tuple(dict.fromkeys((*self.stop, *([self._chat.end] if self._chat.end is not None else []))))
        try:
            messages = check_messages(record["messages"])
            return self._chat.text(messages, tools_of(record.get("tools")), prompt=True)
        except BadConversationError as error:
            raise ValueError(str(error)) from None

    def text_of(self, ids: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
        """What a reward reads of a rollout: its text, without the token or string that ended it."""
        text = self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.stop else ids)
        found = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
        return text[: min(found)] if found else text

    def answer(self, row: Row, rollout: Rollout, stop_strings: Sequence[str] = ()) -> Answer:
        """A rollout of a prompt as a reward sees it."""
        text = self.text_of(rollout.ids, stop_strings)
        return Answer(row.text, text, row.fields, row.ids, tuple(rollout.ids), rollout.finish, row.messages)


def read_prompts(config: RunConfig, words: Words, files: Sequence[str] | None = None) -> list[Row]:
    """The prompts of some files, or of data.prompts, file by file.

    Raises:
        DataError: a file cannot be read or has no prompt; or a line is no prompt, or leaves no room for
            rl.rollout.max_new_tokens. The message names file and line.
    """
    rows, new = [], config.required_rl.rollout.max_new_tokens
    room = config.train.seq_length - new
    if config.model.longest_sequence:
        room = min(room, config.model.longest_sequence - new)
    for path in map(Path, config.data.prompts if files is None else files):
        try:
            lines = lines_of(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"prompts {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        before = len(rows)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode("utf-8")  # raises for half a character, such as \ud83d
                if not isinstance(record, Mapping):
                    raise ValueError(f"is {type(record).__name__}, not an object with `prompt` or `messages`")
                row = words.row(record)
            except BAD_JSON as error:
                raise DataError(f"{path}:{number}: {error}") from None
            if len(row.ids) > room:
                raise DataError(
                    f"{path}:{number}: the prompt has {len(row.ids)} tokens, and train.seq_length "
                    f"({config.train.seq_length}) less rl.rollout.max_new_tokens ({new}) leaves room for {room}: shorten it, "
                    "or raise train.seq_length"
                )
            rows.append(row)
        if len(rows) == before:
            raise DataError(f"prompts {path}: holds no prompt")
    return rows


class Prompts(Part):
    """Hands out prompts without end: every epoch has each once, in an order drawn from the seed and the epoch alone.

    Attributes:
        position: prompts handed out since the run began; a checkpoint keeps it.
    """

    name = "prompts"

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        self.rows, self.seed, self.position = rows, seed, 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, count: int) -> list[tuple[int, Row]]:
        """The next `count` prompts, each with its position: a number that no other prompt of the run has."""
        taken = []
        for position in range(self.position, self.position + count):
            epoch, place = divmod(position, len(self.rows))
            if epoch != self._epoch:
                draw = np.random.RandomState(np.array([self.seed, epoch], dtype=np.uint32))  # the same with every numpy
                self._epoch, self._order = epoch, draw.permutation(len(self.rows))
            taken.append((position, self.rows[self._order[place]]))
        self.position += count
        return taken

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["position"])
