"""Asks an OpenAI-compatible server for chat completions."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flagscale_like.config import JudgeReward
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.json_files import BAD_JSON

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


class ChatServer:
    """A server with the endpoint URL/chat/completions. Answers are drawn at temperature 0.

    Args:
        options: url, model, api_key_env, max_new_tokens, timeout_s, concurrent and retries.

    Raises:
        ConfigError: the key's environment variable is not set, or holds what no header can.
    """

    def __init__(self, options: JudgeReward) -> None:
        assert options.url is not None
        self.options, self.url = options, options.url.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if options.api_key_env is not None:
            key = os.environ.get(options.api_key_env)
            if not key:
                raise ConfigError(f"judge {self.url}: the environment variable {options.api_key_env} is not set")
            if not (key.isascii() and key.isprintable()):  # http.client would show it in what it raises
                raise ConfigError(
                    f"judge {self.url}: the environment variable {options.api_key_env} holds more than printable ASCII, such "
                    "as an end of line: set it to the key alone"
                )
            self.headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, questions: Sequence[str]) -> list[str]:
        """The answer to each question, `concurrent` at a time.

        Raises:
            DataError: the server refuses a question, gives no answer after all retries, or one that is no chat completion.
        """
        with ThreadPoolExecutor(self.options.concurrent) as pool:
            return list(pool.map(self._ask, questions))

    def _ask(self, question: str) -> str:
        body = {
            "model": self.options.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.options.max_new_tokens,
        }
        request = urllib.request.Request(self.url, json.dumps(body).encode("utf-8"), self.headers, method="POST")
        answer = self._send(request)
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        except (*BAD_JSON, KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(f"judge {self.url}: answered {answer[:200]!r}, which is no chat completion")
        return text

    def _send(self, request: urllib.request.Request) -> str:
        wait = FIRST_WAIT_S
        for attempt in range(self.options.retries + 1):
            try:
                with self._opener.open(request, timeout=self.options.timeout_s) as response:
                    return response.read().decode("utf-8", errors="replace")
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {error.read()[:200].decode('utf-8', errors='replace')!r}"
                if error.code != 429 and error.code < 500:
                    raise DataError(f"judge {self.url}: {problem}") from None
                wait = _asked_for(error) or wait
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", None) or error) or type(error).__name__
            if attempt < self.options.retries:
                time.sleep(min(wait, LONGEST_WAIT_S))
                wait *= 2
        raise DataError(f"judge {self.url}: no answer after {self.options.retries + 1} requests: {problem}")


def _asked_for(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait for, in Retry-After; 0 where it does not."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return 0.0
