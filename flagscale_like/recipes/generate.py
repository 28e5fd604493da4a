"""Texts from a model: a prompt's continuation, a conversation's answer, and files of prompts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from flagscale_like.checkpoint.adapters import identities
from flagscale_like.checkpoint.companions import Sampling as FolderSampling
from flagscale_like.checkpoint.store import WeightSource
from flagscale_like.config import Parallel
from flagscale_like.data.chat import BadConversationError, ChatTokenizer, check_messages
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Rollout, Sampling
from flagscale_like.generation.sampling import check_sampling
from flagscale_like.model.spec import ModelSpec, Precision
from flagscale_like.runtime.parallel import ParallelContext

# What a row of a file may say of its own sampling, and the type of each.
ROW_OPTIONS = {"max_new_tokens": int, "temperature": float, "top_p": float, "top_k": int, "seed": int}
OWN_FIELDS = ("completion", "finish", "number", "sample", "tokens", "logprob", "of")  # of a line that is written


@dataclass(frozen=True)
class Wishes:
    """What is asked of a text; None: as the model's folder says."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int = 0


class TextGenerator:
    """Text in, text out: a model with its tokenizer and generation settings.

    Args:
        source: the weights.
        folder: of the tokenizer.
        rows: texts that are under way at a time.

    Attributes:
        own: the engine that draws the tokens.
        found: the folder's generation settings.
    """

    def __init__(
        self,
        source: WeightSource,
        folder: Path,
        ctx: ParallelContext,
        *,
        rows: int = 32,
        room: int = 0,
        precision: Precision = "fp32",
    ) -> None:
        self.words, self.folder, self.found = Tokenizer(folder), folder, FolderSampling.of(folder)
        layout = ctx.layout if ctx.world_size > 1 else Parallel()
        spec = ModelSpec(arch=source.arch, parallel=layout, precision=precision, lora=getattr(source, "lora", None))
        self.own = OwnEngine(Engine.build(spec, ctx, source=source), rows=rows, room=room, decode=self.words.decode)
        self._chats: ChatTokenizer | None = None

    @property
    def chats(self) -> ChatTokenizer:
        """The tokenizer's chat template.

        Raises:
            DataError: it has none.
        """
        if self._chats is None:
            self._chats = ChatTokenizer(self.folder)
        return self._chats

    def prompt_of(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """A text's tokens, begun as the tokenizer begins one; the token that ends a text for an empty text.

        Raises:
            ConfigError: add_bos, and the tokenizer has no token that begins a text.
        """
        begin = [] if add_bos is False else self.words.before_text
        if add_bos and not begin:
            if self.words.bos is None:
                raise ConfigError(f"tokenizer {self.folder}: names no bos_token, which --add-bos writes")
            begin = [self.words.bos]
        return begin + self.words.encode_batch([text])[0] or [self.words.eod]

    def chat_prompt(self, messages: object) -> list[int]:
        """The tokens of a conversation up to where the answer begins.

        Raises:
            DataError: the tokenizer has no chat template, or this is no conversation.
        """
        try:
            text = self.chats.text(check_messages(messages), prompt=True)
        except BadConversationError as error:
            raise DataError(f"messages: {error}") from None
        return self.words.encode_batch([text])[0]

    def sampling(self, wishes: Wishes, *, chat: bool = False) -> Sampling:
        """What the engine is asked for. A text ends at the tokens that end one for the tokenizer, its folder or its template.

        Raises:
            ConfigError: a number is out of its range.
        """
        ends = {self.words.eod, *self.found.stop, *([self.chats.end] if chat else [])}
        vocab = self.own.engine.spec.arch.vocab_size
        given = {name: getattr(wishes, name) for name in ("temperature", "top_p", "top_k")}
        numbers = {name: getattr(self.found, name) if value is None else value for name, value in given.items()}
        sampling = Sampling(
            wishes.max_new_tokens,
            stop=tuple(sorted(token for token in ends if token is not None and token < vocab)),
            stop_strings=wishes.stop_strings,
            seed=wishes.seed,
            **numbers,
        )
        check_sampling(sampling, vocab)
        return sampling

    def text_of(self, rollout: Rollout, sampling: Sampling) -> str:
        """What a rollout adds to its prompt, without what ended it."""
        ids = rollout.ids[:-1] if rollout.finish == "stop" and rollout.ids[-1] in sampling.stop else rollout.ids
        text = self.words.continuation(rollout.prompt_ids, ids)
        return cut_at(text, sampling.stop_strings) if rollout.finish == "stop" else text


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.find(one) for one in stop_strings if one in text), default=len(text))]


# Files of prompts


@dataclass(frozen=True)
class Row:
    """A row of a file of prompts.

    Attributes:
        number: of the line, from 0.
        fields: what it holds.
        of: a hash of everything that its texts depend on.
    """

    number: int
    fields: Mapping[str, Any]
    prompt: Prompt
    sampling: Sampling
    of: str


def read_rows(path: Path, writer: TextGenerator, wishes: Wishes, samples: int, source: WeightSource) -> list[Row]:
    """The prompts of a JSONL file: `prompt` (a text) or `messages`, and sampling options of its own.

    Raises:
        DataError: a line is no such row; before anything is generated.
        ConfigError: sampling options are out of their range, or a prompt leaves no room.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    model, found = identities(source), []
    for number, line in enumerate(lines):
        where = f"{path}, line {number + 1}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: is no JSON ({error})") from None
        if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
            raise DataError(f'{where}: give an object with either "prompt" (a text) or "messages"')
        taken = [name for name in OWN_FIELDS if name in fields]
        if taken:
            raise DataError(f"{where}: has the field {taken[0]!r}, which is written with the answer: rename it")
        own = {
            name: _option(fields[name], kind, f"{where}: {name}")
            for name, kind in ROW_OPTIONS.items()
            if name in fields
        }
        chat = "messages" in fields
        if not chat and not isinstance(fields["prompt"], str):
            raise DataError(f"{where}: prompt is no text")
        try:
            ids = writer.chat_prompt(fields["messages"]) if chat else writer.prompt_of(fields["prompt"])
            sampling = writer.sampling(dataclasses.replace(wishes, **own), chat=chat)
            prompt = Prompt(ids, number, samples)
            writer.own.check(prompt, sampling)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{where}: {error}") from None
        of = json.dumps([model, ids, dataclasses.astuple(sampling)])
        found.append(Row(number, fields, prompt, sampling, xxhash.xxh3_64_hexdigest(of.encode())))
    if not found:
        raise DataError(f"{path}: holds no prompt")
    return found


def _option(value: object, kind: type, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise DataError(f"{where} is {value!r}, which is no {'number' if kind is float else 'whole number'}")
    return kind(value)


def answered(path: Path, rows: Sequence[Row]) -> set[tuple[int, int]]:
    """(row, sample) of the answers that a file has already. A line that a kill has torn is cut off.

    Raises:
        DataError: it holds something else, or answers of another model, other prompts or other settings.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    expected, found = {row.number: row.of for row in rows}, set()
    for number, line in enumerate(whole.splitlines()):
        try:
            record = json.loads(line)
            name, of = (int(record["number"]), int(record["sample"])), record["of"]
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}, line {number + 1}: is no answer of this command: give another --out") from None
        if expected.get(name[0]) != of:
            raise DataError(
                f"{path}, line {number + 1}: has another model, prompt or sampling than is asked for now: give another --out"
            )
        found.add(name)
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return found


def answers(writer: TextGenerator, rows: Sequence[Row], done: set[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The lines of the texts that are not done, as they end. This rank's prompts: of its replicas, each takes some."""
    own, ctx = writer.own, writer.own.engine.ctx
    texts = {}
    for row in rows[ctx.replica_rank :: ctx.replicas]:
        added = own.add(row.prompt, row.sampling)
        texts |= dict.fromkeys(added, row)
        own.cancel(text for text in added if (row.number, text.rollout.sample) in done)
    with own.forward.ready():
        while own.schedule.count:
            for text in own.step():
                if text.rollout.finish:
                    yield _record(writer, texts[text], text.rollout)


def _record(writer: TextGenerator, row: Row, rollout: Rollout) -> dict[str, Any]:
    return {
        **row.fields,
        "completion": writer.text_of(rollout, row.sampling),
        "finish": rollout.finish,
        "number": row.number,
        "sample": rollout.sample,
        "tokens": len(rollout.ids),
        "logprob": sum(rollout.raw_logprobs),
        "of": row.of,
    }


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line in one write, so that the ranks' lines do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(record, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(file)
