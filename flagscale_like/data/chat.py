"""Conversations: reads a record of a data set as messages, and renders messages to tokens with the weight of each.

Three forms of a record are known by their keys:

| keys | form |
|---|---|
| `messages` | a list of {role, content}, perhaps with weight, tool_calls, reasoning_content, tool_call_id, name |
| `prompt`, `completion` | two texts, a user's and the assistant's; or two lists of messages |
| `conversations` | ShareGPT: a list of {from, value}, perhaps with `system` beside it |

`tools`, a list of JSON schemas or the same as text, goes to the chat template with any of them.

A token counts if the assistant writes it. If the chat template marks these parts by {% generation %}, the marks decide, as in
transformers. Otherwise the conversation is rendered up to each answer: what one more message adds behind the generation
prompt is the answer. Renderings are compared as text, and the parts are mapped to tokens by the tokenizer's offsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError
from flagscale_like.json_files import write_json

Message = dict[str, Any]
Train = Literal["all", "last"]

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of the roles.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
FORMS = (
    "messages [{role, content}], prompt with completion (text or messages), or ShareGPT's conversations [{from, value}]"
)
REASONING = ("reasoning_content", "reasoning", "thinking")
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"


class BadConversationError(ValueError):
    """A record that is not a conversation to train on. The message is the reason; the caller adds file and line."""


class NothingCountsError(BadConversationError):
    """A conversation without a token to train on."""


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them. An assistant's message may have a `weight`; without one it is 1."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        ids: int32 [n].
        weights: float32 [n], the weight of each token as a label; 0: the token does not count. The first is always 0,
            because nothing comes before it.
    """

    ids: np.ndarray
    weights: np.ndarray


def parse_record(text: str) -> Conversation:
    """Read the conversation of one line of JSON.

    Raises:
        BadConversationError: the text is not JSON, or the record has none of the known forms.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadConversationError(f"no JSON ({error})") from None
    return conversation_of(record)


def conversation_of(record: object) -> Conversation:
    """Read the conversation of a record; its keys decide on the form, and other keys are not read.

    Raises:
        BadConversationError: the record has none of the known forms, or more than one; or a message is wrong.
    """
    if not isinstance(record, Mapping):
        raise BadConversationError(f"is {type(record).__name__}, not an object with {FORMS}")
    forms = [name for name in ("messages", "prompt", "conversations") if record.get(name) is not None]
    if len(forms) != 1:
        found = f"has {' and '.join(forms)}" if forms else f"has the keys {', '.join(map(str, record)) or '(none)'}"
        raise BadConversationError(f"{found}: give one of {FORMS}")
    if forms == ["messages"]:
        messages = check_messages(record["messages"])
    elif forms == ["prompt"]:
        messages = _prompt_and_completion(record)
    else:
        messages = _share_gpt(record)
    return Conversation(messages, tools_of(record.get("tools")))


def _prompt_and_completion(record: Mapping[str, Any]) -> list[Message]:
    prompt, completion = record["prompt"], record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [m | ({"weight": 0.0} if m["role"] == "assistant" else {}) for m in check_messages(prompt)]
        return before + check_messages(completion, first=len(before) + 1)
    kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise BadConversationError(f"prompt and completion are {kinds}: give two texts, or two lists of messages")


def _share_gpt(record: Mapping[str, Any]) -> list[Message]:
    turns, messages = record["conversations"], []
    if not isinstance(turns, list):
        raise BadConversationError(f"conversations is {type(turns).__name__}, not a list")
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise BadConversationError(f"message {number}: needs `from` and `value`")
        if turn["from"] not in SPEAKERS:
            raise BadConversationError(f"message {number}: unknown role {turn['from']!r}: give {', '.join(SPEAKERS)}")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"], **rest})
    return check_messages(messages)


def check_messages(messages: object, *, first: int = 1) -> list[Message]:
    """Check messages, and copy them. A content in parts becomes one text.

    Args:
        first: number of the first message in errors.

    Raises:
        BadConversationError: with the message's number: an unknown role, a content that is not text, or a weight that is
            no number from 0 on or is not an assistant's.
    """
    if not isinstance(messages, list) or not messages:
        raise BadConversationError(f"the messages are {type(messages).__name__}, not a list of one or more")
    return [_checked(message, number) for number, message in enumerate(messages, start=first)]


def _checked(message: object, number: int) -> Message:
    if not isinstance(message, Mapping):
        raise BadConversationError(
            f"message {number}: is {type(message).__name__}, not an object with role and content"
        )
    role, content, weight = message.get("role"), message.get("content"), message.get("weight", 1)
    if role not in ROLES:
        raise BadConversationError(f"message {number}: unknown role {role!r}: give {', '.join(ROLES)}")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise BadConversationError(f"message {number}: the content has parts that are not text")
        content = "".join(part["text"] for part in content)
    if content is None and role == "assistant" and any(message.get(key) for key in ("tool_calls", *REASONING)):
        content = ""
    if not isinstance(content, str):
        raise BadConversationError(f"message {number}: the content is {type(content).__name__}, not text")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise BadConversationError(f"message {number}: weight is {weight!r}: give a number from 0 on")
    if "weight" in message and weight and role != "assistant":
        raise BadConversationError(
            f"message {number}: weight {weight} on a {role}'s message: only an assistant's counts"
        )
    return {**message, "content": content}


def tools_of(tools: object) -> list[Any] | None:
    """The tools of a record: a list of JSON schemas, or the same as text.

    Raises:
        BadConversationError: it is something else.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise BadConversationError(f"tools is text, but no JSON ({error})") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise BadConversationError("tools is no list of JSON schemas")
    return tools or None


def read_template(folder: str | Path) -> str | None:
    """The chat template of a tokenizer folder: chat_template.jinja, or `chat_template` of tokenizer_config.json.

    None: the folder has none. Of several named templates, `default`.
    """
    path = Path(folder) / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = Path(folder) / "tokenizer_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def read_template_file(path: Path) -> str:
    """The text of a chat template's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat template {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


class ChatTokenizer:
    """Renders conversations by a chat template, and encodes them with the weight of each token.

    Args:
        folder: a Hugging Face tokenizer folder.
        template: the chat template; None takes the folder's.
        train: which of the assistant's messages count: `all`, or the `last`.

    Attributes:
        template: the chat template.
        tokenizer: the tokenizer of the folder.

    Raises:
        DataError: the folder holds no readable tokenizer, or one without offsets; there is no chat template, or it is no
            valid one.
    """

    def __init__(self, folder: str | Path, template: str | None = None, *, train: Train = "all") -> None:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        self.tokenizer, self.train = Tokenizer(folder), train
        self.tokenizer.encode_with_offsets("")  # refuse now a tokenizer that has none
        found = template if template is not None else read_template(folder)
        if found is None:
            raise DataError(
                f"tokenizer {folder}: has no chat template: give one with --template FILE (for a run of task rl, "
                "rl.template), or put it there as chat_template.jinja"
            )
        self.template = found
        # Any: transformers' annotation leaves out what it returns where the parts are marked.
        self._render: Any = render_jinja_template
        self._error, self._marked = TemplateError, bool(MARKS.search(found))
        self._special, self._ends = self.tokenizer.special_tokens, self.tokenizer.special_texts
        try:
            render_jinja_template(conversations=[], chat_template=found)
        except TemplateError as error:
            raise DataError(
                f"the chat template is not valid Jinja, line {getattr(error, 'lineno', 1)}: {error}"
            ) from None

    def text(self, messages: Sequence[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """Render messages as text. `prompt` adds the generation prompt, behind which the assistant's answer begins.

        Raises:
            BadConversationError: the template refuses the messages.
        """
        return self._rendered(messages, tools, prompt=prompt)[0]

    @property
    def end(self) -> int | None:
        """The id of the special token that ends an answer. None: the template writes none."""
        try:
            found = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except BadConversationError:
            return None
        last = int(found.ids[np.flatnonzero(found.weights)[-1]])
        return last if self.tokenizer.decode_one(last) in self._ends else None

    def encode(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Encoded:
        """Encode a conversation.

        Args:
            messages: as `check_messages` returns them; `weight` is of an assistant's message and does not go to the template.

        Raises:
            NothingCountsError: the conversation has no token to train on.
            BadConversationError: the template refuses the messages, or renders an answer differently once others follow.
        """
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not answers:
            raise NothingCountsError("has no assistant's message")
        counted = answers[-1:] if self.train == "last" else answers
        weight_of = {i: float(messages[i].get("weight", 1)) for i in counted}
        plain = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
        if self._marked:
            text, spans = self._marked_spans(plain, tools, answers, weight_of)
        else:
            text, spans = self._prefix_spans(plain, tools, weight_of)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadConversationError(
                f"has an unpaired surrogate in {text[error.start - 20 : error.start]!r}..."
            ) from None
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        weights = weights_of(offsets, [_without_empty_thought(text, span) for span in spans])
        weights[:1] = 0
        if not weights.any():
            raise NothingCountsError("no token counts: every answer is empty or has weight 0")
        return Encoded(ids, weights)

    def _rendered(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [start, end) of each part that the template marks."""
        try:
            texts, marks = self._render(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=prompt,
                **self._special,
            )
        except (self._error, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadConversationError(f"the chat template refuses it: {str(error).splitlines()[0]}") from None
        return texts[0], [*marks[0]] if self._marked else []

    def _marked_spans(
        self, messages: list[Message], tools: list[Any] | None, answers: list[int], weight_of: Mapping[int, float]
    ) -> tuple[str, list[tuple[int, int, float]]]:
        text, marks = self._rendered(messages, tools, prompt=False)
        if len(marks) == len(answers):
            return text, [(*mark, weight_of.get(i, 0.0)) for mark, i in zip(marks, answers, strict=True)]
        if len(weight_of) < len(answers) or set(weight_of.values()) != {1.0}:
            raise BadConversationError(
                f"the chat template marks {len(marks)} parts for {len(answers)} of the assistant's messages: with such a "
                "template, all messages count alike"
            )
        return text, [(*mark, 1.0) for mark in marks]

    def _prefix_spans(
        self, messages: list[Message], tools: list[Any] | None, weight_of: Mapping[int, float]
    ) -> tuple[str, list[tuple[int, int, float]]]:
        whole, spans = self.text(messages, tools), []
        for i, weight in weight_of.items():
            if not weight:
                continue
            upto = self.text(messages[: i + 1], tools) if i + 1 < len(messages) else whole
            if not whole.startswith(upto):
                raise BadConversationError(
                    f"message {i + 1}: the chat template renders this answer differently once other messages follow: give a "
                    "template with {% generation %} marks, or train on the last answer alone (--train last)"
                )
            head = self.text(messages[:i], tools, prompt=True)
            if not upto.startswith(head):
                raise BadConversationError(
                    f"message {i + 1}: the chat template renders this answer without its own generation prompt: give a "
                    "template with {% generation %} marks"
                )
            spans.append((len(head), len(head) + self._answer_length(upto[len(head) :]), weight))
        return whole, spans

    def _answer_length(self, answer: str) -> int:
        """Without the white space that a template writes behind the token that ends an answer."""
        stripped = answer.rstrip()
        return len(stripped if stripped.endswith(self._ends) else answer)


def _without_empty_thought(text: str, span: tuple[int, int, float]) -> tuple[int, int, float]:
    start, end, weight = span
    found = EMPTY_THOUGHT.match(text, start, end)
    return found.end() if found else start, end, weight


def weights_of(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, float]]) -> np.ndarray:
    """The weight of each token, float32 [n]: of the span [start, end) that the token overlaps, 0 where there is none.

    Args:
        offsets: [start, end) of each token in characters, in order.
        spans: (start, end, weight), in order, without overlap.
    """
    weights = np.zeros(len(offsets), dtype=np.float32)
    if len(offsets) and spans:
        starts, ends = np.array(offsets).T
        for start, end, weight in spans:
            weights[(starts < end) & (ends > start) & (ends > starts)] = weight
    return weights


def copy_tokenizer_files(folder: str | Path, target: Path) -> None:
    """Copy the files beside which a tokenizer's changed file is written.

    Raises:
        OSError: a file cannot be read or written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(folder).iterdir()):
        if (
            path.is_file()
            and path.suffix in (".json", ".model", ".txt", ".py")
            and not path.name.endswith(".index.json")
        ):
            (target / path.name).write_bytes(path.read_bytes())


def copy_with_template(folder: str | Path, template: str, target: Path, *, replace: bool = False) -> None:
    """Write a copy of a tokenizer folder whose chat template is `template`, so that a model's export carries it.

    If answers end with another token than texts, generation_config.json says that both end a generation.

    Args:
        replace: write the template into a `target` that has another one.

    Raises:
        DataError: a file cannot be written, or `target` is there with another template.
    """
    if target.is_dir() and read_template(target) == template:
        return
    if target.exists() and not replace:
        raise DataError(f"{target}: is there with another chat template: remove it, or choose another prefix")
    try:
        copy_tokenizer_files(folder, target)
        (target / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        chat, path = ChatTokenizer(target), target / GENERATION_FILE
        if chat.end not in (None, chat.tokenizer.eod):
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_json(path, {**found, "eos_token_id": [chat.tokenizer.eod, chat.end]})
    except OSError as error:
        raise DataError(f"{error.filename or target}: cannot be written: {error.strerror or error}") from None
