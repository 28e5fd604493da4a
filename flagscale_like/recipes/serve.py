"""A model behind an OpenAI-compatible interface: completions, chat, streams, log-probabilities, and figures of the load.

The interface is that of https://platform.openai.com/docs/api-reference, as far as it makes sense here. A field that is not
known, or that asks for something that is not computed, is refused with status 400 and not ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from flagscale_like.errors import ConfigError, DataError, UserError
from flagscale_like.generation.rollout import Prompt, Rollout, Sampling
from flagscale_like.generation.service import Request, Service
from flagscale_like.json_files import BAD_JSON
from flagscale_like.recipes.generate import TextGenerator, Wishes, cut_at

CONTEXT = 8  # tokens before a piece of text that are decoded with it
COMMON = {"model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "logprobs", "user"}
FIELDS = {"completion": COMMON | {"prompt"}, "chat": COMMON | {"messages", "max_completion_tokens", "top_logprobs"}}
# Fields that clients send with the value that changes nothing.
NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "best_of": 1,
    "echo": False,
    "suffix": None,
    "logit_bias": None,
    "tools": None,
    "stream_options": None,
    "response_format": {"type": "text"},
}
DEFAULT_TOKENS = {"completion": 16, "chat": 256}
MOST_TEXTS = 1024  # of one request: each waits in memory for its row


@dataclass
class Asked:
    """A checked request.

    Attributes:
        kind: `completion` or `chat`.
        prompts: token ids of each.
        logprobs: whether the answer has those of the drawn tokens.
    """

    kind: str
    prompts: list[list[int]]
    samples: int
    sampling: Sampling
    stream: bool
    logprobs: bool


class Pieces:
    """A text as its tokens come: each call gives what can be shown, and keeps back what may become a stop string."""

    def __init__(self, writer: TextGenerator, rollout: Rollout, sampling: Sampling) -> None:
        self.writer, self.rollout, self.sampling = writer, rollout, sampling
        self.ids = list(rollout.prompt_ids[-CONTEXT:])
        self.first, self.read, self.taken = 0, len(self.ids), 0
        self.held = ""

    def next(self, count: int, finish: str) -> str:
        """What the tokens up to the first `count` add to the last call's.

        Args:
            finish: what ended the text with them; empty where it goes on.
        """
        sampling = self.sampling
        new, self.taken = self.rollout.ids[self.taken : count], count
        ended = finish == "stop"
        self.ids += new[:-1] if ended and new and new[-1] in sampling.stop else new
        decode = self.writer.words.decode
        before, whole = decode(self.ids[self.first : self.read]), decode(self.ids[self.first :])
        if finish or not whole.endswith("\ufffd"):  # else a character is not complete
            self.held += whole[len(before) :] if whole.startswith(before) else whole
            self.first, self.read = self.read, len(self.ids)
        if ended:
            self.held = cut_at(self.held, sampling.stop_strings)
        keep = 0 if finish else _may_become(self.held, sampling.stop_strings)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def _may_become(text: str, stop_strings: Sequence[str]) -> int:
    """Characters at the text's end with which a stop string may begin."""
    longest = max((len(one) for one in stop_strings), default=0)
    ends = range(min(longest, len(text)), 0, -1)
    return next((n for n in ends if any(one.startswith(text[-n:]) for one in stop_strings)), 0)


class Api:
    """The endpoints of one model.

    Args:
        name: of the model, in answers.
    """

    def __init__(self, writer: TextGenerator, name: str) -> None:
        self.writer, self.name, self.service = writer, name, Service(writer.own)
        self.started = time.time()

    def app(self) -> Starlette:
        """The ASGI application. The engine's thread runs as long as it does."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.service.start()
            yield
            await asyncio.to_thread(self.service.stop)

        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            lifespan=lifespan,
        )

    async def completions(self, request: HttpRequest) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, "completion")

    async def chat(self, request: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, "chat")

    async def models(self, _: HttpRequest) -> Response:
        """GET /v1/models: the one that is served."""
        entry = {"id": self.name, "object": "model", "created": int(self.started), "owned_by": "flagscale_like"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, _: HttpRequest) -> Response:
        """GET /health: 200 while the engine runs."""
        problem = self.service.problem
        body = {"status": "ok"} if problem is None else {"status": "failed", "error": str(problem)}
        return JSONResponse(body, status_code=200 if problem is None else 500)

    async def metrics(self, _: HttpRequest) -> Response:
        """GET /metrics, in Prometheus' text format."""
        own, figures = self.service.own, self.service.own.figures
        rows = (
            ("texts_running", "gauge", "Texts that are being drawn.", self.service.running),
            ("texts_waiting", "gauge", "Texts that wait for a row.", self.service.waiting),
            ("rows", "gauge", "Most texts that are drawn at a time.", own.cache.rows),
            ("cache_bytes", "gauge", "Memory of the keys and values.", own.cache.nbytes),
            ("prompts_total", "counter", "Prompts that were taken.", self.service.requests),
            ("prompt_tokens_total", "counter", "Tokens of prompts that were computed.", figures.prompt_tokens),
            ("new_tokens_total", "counter", "Tokens that were drawn.", figures.new_tokens),
            ("steps_total", "counter", "Passes of the model.", figures.steps),
        )
        lines = [
            f"# HELP flagscale_like_{name} {text}\n# TYPE flagscale_like_{name} {kind}\nflagscale_like_{name} {value}\n"
            for name, kind, text, value in rows
        ]
        return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: HttpRequest, kind: str) -> Response:
        try:
            asked = self._asked(await _body(request), kind)
            running = Running(self, asked)
        except UserError as error:
            return _refused(str(error), 400)
        except RuntimeError as error:
            return _refused(str(error), 500)
        if asked.stream:
            return StreamingResponse(running.stream(), media_type="text/event-stream")
        return await running.whole(request)

    def _asked(self, body: Mapping[str, Any], kind: str) -> Asked:
        """Check a request.

        Raises:
            UserError: something in it cannot be given.
        """
        for name, value in body.items():
            if name in FIELDS[kind]:
                continue
            if name not in NEUTRAL:
                raise ConfigError(f"the field {name!r} is not known here")
            if value is not None and value != NEUTRAL[name] and value not in ({}, []):
                raise ConfigError(f"{name} is {value!r}, which is not computed here: leave it out")
        if body.get("model") not in (None, self.name):
            raise ConfigError(f"the model {body['model']!r} is not served here: it is {self.name!r}")
        logprobs = body.get("logprobs")
        if (kind == "completion" and logprobs not in (None, 0)) or body.get("top_logprobs"):
            raise ConfigError("log-probabilities are of the drawn tokens alone: give logprobs 0, or with chat true")
        stop = body.get("stop") or []
        wishes = Wishes(
            _number(body, "max_completion_tokens", int, _number(body, "max_tokens", int, DEFAULT_TOKENS[kind])),
            _number(body, "temperature", float, None),
            _number(body, "top_p", float, None),
            _number(body, "top_k", int, None),
            tuple(_texts([stop] if isinstance(stop, str) else stop, "stop")),
            _number(body, "seed", int, secrets.randbits(63)),
        )
        chat = kind == "chat"
        prompts = [self.writer.chat_prompt(body.get("messages"))] if chat else self._prompts(body.get("prompt"))
        asked = Asked(
            kind,
            prompts,
            _number(body, "n", int, 1),
            self.writer.sampling(wishes, chat=chat),
            _flag(body, "stream"),
            _flag(body, "logprobs") if chat else logprobs is not None and logprobs is not False,
        )
        if len(prompts) * asked.samples > MOST_TEXTS:
            raise ConfigError(
                f"{len(prompts)} prompts with n {asked.samples} each are more than {MOST_TEXTS} texts: send several requests"
            )
        for number, ids in enumerate(prompts):
            self.writer.own.check(Prompt(ids, number, asked.samples), asked.sampling)
        return asked

    def _prompts(self, prompt: object) -> list[list[int]]:
        """The ids of a text, some texts, some tokens, or lists of tokens."""
        several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        found = []
        for one in several:
            if isinstance(one, str):
                found.append(self.writer.prompt_of(one))
            elif isinstance(one, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in one):
                found.append(one)
            else:
                raise DataError("prompt: give a text, a list of texts, a list of token ids, or a list of such lists")
        return found


class Running:
    """A request that is being answered."""

    def __init__(self, api: Api, asked: Asked) -> None:
        self.api, self.asked = api, asked
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue()
        self.name = f"{'chatcmpl' if asked.kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        self.left = len(asked.prompts) * asked.samples
        self.requests: list[Request] = [
            api.service.ask(Prompt(ids, number, asked.samples), asked.sampling, self._tell)
            for number, ids in enumerate(asked.prompts)
        ]

    def _tell(self, event: Rollout | Exception) -> None:
        """On the engine's thread, which goes on with the rollout: pass on how far it is."""
        so_far = (len(event.ids), event.finish) if isinstance(event, Rollout) else (0, "")
        with contextlib.suppress(RuntimeError):  # the server's loop has ended
            self.loop.call_soon_threadsafe(self.events.put_nowait, (event, *so_far))

    async def _texts(self) -> AsyncIterator[tuple[int, Rollout, int, str]]:
        """(choice, rollout, its tokens so far, what ended it) at every token, until all texts have ended."""
        try:
            while self.left:
                event, count, finish = await self.events.get()
                if isinstance(event, Exception):
                    raise event
                self.left -= bool(finish)
                yield event.prompt * self.asked.samples + event.sample, event, count, finish
        finally:
            for request in self.requests:
                self.api.service.cancel(request)

    async def whole(self, request: HttpRequest) -> Response:
        """The answer in one piece. Nothing more is drawn once the client has gone."""

        async def collect() -> dict[int, Rollout]:
            return {choice: rollout async for choice, rollout, _, finish in self._texts() if finish}

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        answered, left = asyncio.create_task(collect()), asyncio.create_task(gone())
        await asyncio.wait([answered, left], return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            answered.cancel()
            return _refused("the client has gone", 499)
        left.cancel()
        try:
            found = answered.result()
        except Exception as error:  # of the engine
            return _refused(f"{type(error).__name__}: {error}", 500)
        choices = [self._choice(choice, found[choice]) for choice in sorted(found)]
        prompt = sum(map(len, self.asked.prompts))
        new = sum(len(rollout.ids) for rollout in found.values())
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return JSONResponse(self._envelope(choices) | {"usage": usage})

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: a piece of text each, and [DONE]."""
        pieces: dict[int, Pieces] = {}
        shown: dict[int, int] = {}  # tokens of each
        try:
            async for choice, rollout, count, finish in self._texts():
                if choice not in pieces:
                    pieces[choice] = Pieces(self.api.writer, rollout, self.asked.sampling)
                text = pieces[choice].next(count, finish)
                if text or finish or self.asked.logprobs:
                    first, shown[choice] = shown.get(choice, 0), count
                    yield _event(self._envelope([self._piece(choice, text, finish or None, rollout, first, count)]))
        except Exception as error:  # of the engine: the answer has begun, so it is said in the stream
            yield _event({"error": {"message": f"{type(error).__name__}: {error}", "type": "server_error"}})
            return
        yield "data: [DONE]\n\n"

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion" if self.asked.kind == "chat" else "text_completion"
        if self.asked.stream and self.asked.kind == "chat":
            kind += ".chunk"
        return {
            "id": self.name,
            "object": kind,
            "created": int(time.time()),
            "model": self.api.name,
            "choices": choices,
        }

    def _choice(self, choice: int, rollout: Rollout) -> dict[str, Any]:
        text = self.api.writer.text_of(rollout, self.asked.sampling)
        logprobs = self._logprobs(rollout, 0, len(rollout.ids))
        body = {"message": {"role": "assistant", "content": text}} if self.asked.kind == "chat" else {"text": text}
        return {"index": choice, **body, "logprobs": logprobs, "finish_reason": rollout.finish}

    def _piece(  # the parts of one event
        self, choice: int, text: str, finish: str | None, rollout: Rollout, first: int, stop: int
    ) -> dict[str, Any]:
        role = {"role": "assistant"} if first == 0 else {}
        body = {"delta": {**role, "content": text}} if self.asked.kind == "chat" else {"text": text}
        return {
            "index": choice,
            **body,
            "logprobs": self._logprobs(rollout, first, stop),
            "finish_reason": finish,
        }

    def _logprobs(self, rollout: Rollout, first: int, stop: int) -> dict[str, Any] | None:
        """Of the drawn tokens, at the temperature and without top-k and top-p."""
        if not self.asked.logprobs:
            return None
        names = [self.api.writer.words.decode([token], special=True) for token in rollout.ids[first:stop]]
        values = rollout.raw_logprobs[first:stop]
        if self.asked.kind == "chat":
            rows = [
                {"token": name, "logprob": value, "bytes": _bytes_of(name), "top_logprobs": []}
                for name, value in zip(names, values, strict=True)
            ]
            return {"content": rows}
        return {"tokens": names, "token_logprobs": values, "top_logprobs": None, "text_offset": None}


def _bytes_of(token: str) -> list[int] | None:
    """The bytes of a token's text; None for one that is a part of a character, whose text does not say which."""
    return None if "\ufffd" in token else list(token.encode())


async def _body(request: HttpRequest) -> dict[str, Any]:
    try:
        body = await request.json()
    except BAD_JSON as error:
        raise DataError(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise DataError("the body is no JSON object")
    return body


def _number(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise ConfigError(f"{name} is {value!r}, which is no {'number' if kind is float else 'whole number'}")
    try:
        return kind(value)
    except OverflowError:
        raise ConfigError(f"{name} is larger than a number can be") from None


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}: give true or false")
    return bool(value)


def _texts(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{name}: give a text or a list of texts")
    return value


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _refused(message: str, status: int) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)
