"""The OpenAI-compatible interface, over a real server."""

import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn

from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.recipes.generate import TextGenerator
from flagscale_like.recipes.serve import Api
from flagscale_like.runtime.parallel import parallel_context
from tests.generation.folders import make_folder
from tests.harness import run_ranks


class Client:
    def __init__(self, port):
        self.port = port

    def send(self, method, path, body=None, raw=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, raw if raw is not None else json.dumps(body) if body is not None else None)
        return connection.getresponse()

    def ask(self, body, path="/v1/completions"):
        response = self.send("POST", path, body)
        return response.status, json.loads(response.read())

    def stream(self, body, path="/v1/completions"):
        lines = self.send("POST", path, body | {"stream": True}).read().decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def served(folder):
    """What a server answers."""
    with parallel_context(Parallel(), alone=True) as ctx:
        writer = TextGenerator(HfFolder(folder), folder, ctx, rows=4)
        server = uvicorn.Server(uvicorn.Config(Api(writer, "tiny").app(), log_level="error"))
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                return conversation(Client(listener.getsockname()[1]))
            finally:
                server.should_exit = True
                thread.join()


def conversation(client):
    asked = {"prompt": "a line", "max_tokens": 12, "temperature": 0.9, "seed": 3, "n": 2, "logprobs": 0}
    found = {"whole": client.ask(asked), "stream": client.stream(asked)}
    with ThreadPoolExecutor(9) as pool:  # more than there are rows
        found["together"] = [f.result() for f in [pool.submit(client.ask, asked) for _ in range(9)]]
    chat = {"messages": [{"role": "user", "content": "and?"}], "max_tokens": 9, "seed": 1, "logprobs": True}
    found["chat"] = client.ask(chat, "/v1/chat/completions")
    found["chat stream"] = client.stream(chat, "/v1/chat/completions")
    text = found["whole"][1]["choices"][0]["text"]
    stop = asked | {"n": 1, "stop": [text[3:5]]}
    found["stop"], found["stop stream"] = client.ask(stop), client.stream(stop)
    found["ids"] = client.ask({"prompt": [[5, 6], [7]], "max_tokens": 2})
    found["refused"] = [
        client.ask(body)
        for body in (
            {"prompt": "a", "frequency_penalty": 0.5},
            {"prompt": "a", "colour": 1},
            {"prompt": "a", "model": "gpt"},
            {"prompt": "a", "temperature": "warm"},
            {"prompt": "a", "temperature": -1},
            {"prompt": []},
            {"prompt": [999]},
            {"prompt": "many words " * 90},
            {"prompt": "a", "n": 0},
            {"prompt": "a", "logprobs": 5},
            {"prompt": "a", "n": 10**9},
            {"prompt": ["a"] * 2000},
            {"prompt": "a", "temperature": 10**400},
            {"prompt": "a", "temperature": 1e-30},
            {"prompt": "a", "seed": 2**64},
            {"prompt": "a", "stream": "no"},
            {"prompt": "half \ud83d"},
            {"prompt": "a", "stop": ["\ud83d"]},
            {"prompt": {"text": "a"}},
            {"prompt": None},
            {"prompt": [1, "a"]},
        )
    ]
    found["refused"] += [
        client.ask({"messages": messages}, "/v1/chat/completions")
        for messages in (None, "hi", [], [{}], [{"role": "user"}], [{"role": 5, "content": "a"}], [["user", "a"]],
                         [{"role": "user", "content": "\ud83d"}], [{"role": "user", "content": {"a": 1}}])
    ]  # fmt: skip
    found["refused"].append(client.ask(chat | {"logprobs": 3}, "/v1/chat/completions"))
    found["no json"] = [
        client.send("POST", "/v1/completions", raw=raw).status for raw in ("{", "[" * 100_000, "[]", b"\xff")
    ]
    found["all tokens"] = client.ask({"prompt": "a", "max_tokens": 2, "top_k": 2**70, "seed": 4})[0]
    for stream in (False, True):
        gone = http.client.HTTPConnection("127.0.0.1", client.port)
        body = {"prompt": "a", "max_tokens": 90, "seed": 2, "n": 64, "stream": stream}
        gone.request("POST", "/v1/completions", json.dumps(body))
        if stream:
            gone.getresponse().read(20)  # it has begun
        gone.close()
    for _ in range(100):
        metrics = client.send("GET", "/metrics").read().decode()
        if "texts_running 0" in metrics and "texts_waiting 0" in metrics and "prompts_total 20" in metrics:
            break
        time.sleep(0.05)
    found["metrics"] = metrics
    found["models"] = json.loads(client.send("GET", "/v1/models").read())
    found["health"] = client.send("GET", "/health").status
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    (answers,) = run_ranks(1, served, make_folder(tmp_path_factory.mktemp("served")))
    return answers


def test_answers_are_the_same_whole_in_pieces_and_among_others(found):
    status, whole = found["whole"]
    assert status == 200, whole
    texts = [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) == 2
    assert whole["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in whole["choices"])
    for number, choice in enumerate(whole["choices"]):
        pieces = [event["choices"][0] for event in found["stream"] if event["choices"][0]["index"] == number]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        streamed = [value for piece in pieces for value in piece["logprobs"]["token_logprobs"]]
        assert streamed == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
    for status, other in found["together"]:
        assert status == 200, other
        assert [choice["text"] for choice in other["choices"]] == texts


def test_chats_and_stop_strings(found):
    status, chat = found["chat"]
    assert status == 200, chat
    message = chat["choices"][0]["message"]
    deltas = [event["choices"][0]["delta"] for event in found["chat stream"]]
    assert message["role"] == deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] for delta in deltas) == message["content"]
    tokens = chat["choices"][0]["logprobs"]["content"]
    assert len(tokens) == chat["usage"]["completion_tokens"]
    assert all(one["bytes"] == (None if "\ufffd" in one["token"] else list(one["token"].encode())) for one in tokens)
    text, (_, stopped) = found["whole"][1]["choices"][0]["text"], found["stop"]
    cut = text[: text.find(text[3:5])]
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == (cut, "stop")
    assert "".join(event["choices"][0]["text"] for event in found["stop stream"]) == cut
    assert [choice["index"] for choice in found["ids"][1]["choices"]] == [0, 1]


def test_what_is_not_computed_is_refused_and_the_load_is_told(found):
    messages = [body["error"]["message"] for status, body in found["refused"] if status == 400]
    assert len(messages) == len(found["refused"]), found["refused"]
    assert "frequency_penalty is 0.5" in messages[0]
    assert "'colour' is not known" in messages[1]
    assert found["no json"] == [400] * 4
    assert found["all tokens"] == 200
    assert found["health"] == 200
    assert found["models"]["data"][0]["id"] == "tiny"
    assert "flagscale_like_texts_running 0" in found["metrics"]
    assert "flagscale_like_texts_waiting 0" in found["metrics"]
    (new,) = re.findall(r"^flagscale_like_new_tokens_total (\d+)$", found["metrics"], re.M)
    assert int(new) < 2000, "texts of clients that have gone are not drawn to their ends"
    assert "flagscale_like_new_tokens_total" in found["metrics"]
