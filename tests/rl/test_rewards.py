"""Rewards: functions, commands, judges and mixtures; what they refuse, and with which words."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from flagscale_like.config import JudgeReward, Reward
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.recipes.judge import read_candidates
from flagscale_like.rl.answers import Answer, Score
from flagscale_like.rl.growing_file import GrowingFile
from flagscale_like.rl.rewards.chat_server import ChatServer
from flagscale_like.rl.rewards.command import Command
from flagscale_like.rl.rewards.function import Function
from flagscale_like.rl.rewards.judge import (
    Comparison,
    Judge,
    JudgedAnswers,
    Verdict,
    build_judge,
    parse_verdict,
    read_labelled,
)
from flagscale_like.rl.rewards.mixture import WeightedSum
from tests.data.pairs import write_pairs
from tests.rl.runs import rl_config

ANSWERS = [Answer("how many?", text, {"right": 4}) for text in ("four", "fourteen", "4")]

FUNCTIONS = """
import math
import sys
import numpy as np
import torch

def lengths(answers):
    return [len(answer.text) for answer in answers]

def raises(answers):
    return [1 / (len(answer.text) - 8) for answer in answers]

def together(answers):
    if len(answers) > 1:
        raise RuntimeError("too many")
    return [0.0]

def nan(answers):
    return [math.nan if answer.text == "4" else 1.0 for answer in answers]

def short(answers):
    return [1.0]

def words(answers):
    return ["1.5" for _ in answers]

def nothing(answers):
    return None

def nested(answers):
    return np.ones((len(answers), 1))

def huge(answers):
    return [0.0, 1e300, 0.0]

def ends(answers):
    sys.exit(0)

def arrays(answers):
    return np.array([1, 2, 3], dtype=np.int32)

def numbers(answers):
    return [np.float32(0.5), True, np.bool_(False)]

def tensor(answers):
    return torch.tensor([1, 2, 3], dtype=torch.bfloat16)

class Table:
    def tolist(self):
        return [1.0, 2.0, 3.0]

def table(answers):
    return Table()

not_callable = 3
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "rules.py"
    path.write_text(FUNCTIONS)
    return path


def test_a_function_scores(functions, monkeypatch):
    assert Function(f"{functions}:lengths").scores(ANSWERS) == [Score(4.0), Score(8.0), Score(1.0)]
    for name in ("table", "arrays", "tensor"):
        assert [score.value for score in Function(f"{functions}:{name}").scores(ANSWERS)] == [1.0, 2.0, 3.0]
    assert Function(f"{functions}:numbers").scores(ANSWERS) == [Score(0.5), Score(1.0), Score(0.0)]
    monkeypatch.syspath_prepend(str(functions.parent))
    assert Function("rules:lengths").scores(ANSWERS[:1]) == [Score(4.0)]
    assert Function("rules:lengths").scores([]) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", ["ZeroDivisionError", "rules.py:11", "sample 2 of 3", "fourteen"]),
        ("together", ["RuntimeError: too many", "rules.py:15", "all 3 answers at once"]),
        ("nan", ["a score is nan", "sample 3 of 3", "how many?"]),
        ("short", ["1 scores for 3 answers"]),
        ("words", ["a score is '1.5', not a number", "sample 1 of 3"]),
        ("nothing", ["returned NoneType for 3 answers: return a list of numbers"]),
        ("nested", ["a score is [1.0], not a number"]),
        ("huge", ["a score is 1e+300, beyond 1e+12", "sample 2 of 3"]),
        ("ends", ["SystemExit: 0", "rules.py:37", "sample 1 of 3"]),
    ],
)
def test_a_function_that_fails_names_the_line_and_the_sample(functions, name, words):
    with pytest.raises(DataError) as error:
        Function(f"{functions}:{name}").scores(ANSWERS)
    assert all(word in str(error.value) for word in words), error.value


def test_a_function_that_is_not_there(functions, tmp_path):
    with pytest.raises(ConfigError, match="has no function missing; it has .*lengths"):
        Function(f"{functions}:missing")
    with pytest.raises(ConfigError, match="has no function not_callable"):
        Function(f"{functions}:not_callable")
    with pytest.raises(ConfigError, match="no_such_module cannot be imported.*PYTHONPATH"):
        Function("no_such_module:f")
    (tmp_path / "broken.py").write_text("x = 1\nimport no_such_thing\n")
    with pytest.raises(ConfigError, match="no_such_thing.*broken.py:2"):
        Function(f"{tmp_path / 'broken.py'}:f")


def command(script, *, timeout_s=20.0):
    return Command([sys.executable, "-c", script], timeout_s=timeout_s)


def test_a_command_scores():
    script = (
        "import json, sys\nfor line in sys.stdin:\n    a = json.loads(line)\n"
        "    print(json.dumps({'score': len(a['text']) + a['fields']['right']}))"
    )
    assert [score.value for score in command(script).scores(ANSWERS)] == [8.0, 12.0, 5.0]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.stderr.write('no gold\\n'); sys.exit(3)", "exit code 3: no gold"),
        ("print('{\"score\": 1}')", "printed 1 lines for 3 answers"),
        ('print(\'{"score": 1}\\n{"score": NaN}\\n{"score": 1}\')', "a score is nan, for sample 2 of 3"),
        ("print('1\\n2\\n3')", "line 1 is '1', not"),
        ("print('{\"score\": null}\\n' * 3)", "a score is None, not a number"),
    ],
)
def test_a_command_that_fails(script, words):
    with pytest.raises(DataError, match=words):
        command(script).scores(ANSWERS)


def test_a_command_that_hangs_or_is_missing():
    with pytest.raises(DataError, match="did not end within 0.2 s for 3 answers"):
        command("import time; time.sleep(60)", timeout_s=0.2).scores(ANSWERS)
    with pytest.raises(ConfigError, match="cannot be started: No such file"):
        Command(["./no-such-program"], timeout_s=1).scores(ANSWERS)


class Fixed:
    def __init__(self, scores):
        self.found = scores

    def scores(self, answers):
        return self.found[: len(answers)]


def test_a_mixture_is_the_weighted_sum():
    model = Fixed([Score(1.0, heads=(0.5, 1.5)), Score(2.0, heads=(2.0, 2.0), rejected=True, reason="outside: kl")])
    mixed = WeightedSum({"model": (2.0, model), "length": (-0.5, Fixed([Score(4.0), Score(8.0)]))}).scores(ANSWERS[:2])
    assert [score.value for score in mixed] == [0.0, 0.0]
    assert [score.rejected for score in mixed] == [False, True]
    assert mixed[1].reason == "model: outside: kl"
    assert mixed[0].heads == (0.5, 1.5)
    assert mixed[0].parts == {"model": 1.0, "length": 4.0}


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    """U+2028 and U+0085 may stand in a text of JSON as they are."""
    strange = "one\u2028two\u0085three\u2029"
    line = json.dumps({"prompt": strange, "first": "a", "second": strange}, ensure_ascii=False)
    (tmp_path / "pairs.jsonl").write_text(line + "\n" + line, encoding="utf-8")
    assert [candidate.pair[1].text for candidate in read_candidates(tmp_path / "pairs.jsonl")] == [strange] * 2
    labelled = json.dumps({"prompt": "p", "chosen": strange, "rejected": "b"}, ensure_ascii=False)
    (tmp_path / "labelled.jsonl").write_text(labelled + "\n", encoding="utf-8")
    assert read_labelled(tmp_path / "labelled.jsonl") == [Comparison("p", strange, "b")]
    script = f"print({json.dumps({'score': 2.0, 'why': strange}, ensure_ascii=False)!r})"
    assert command(f"import sys; sys.stdout.reconfigure(encoding='utf-8'); {script}").scores(ANSWERS[:1]) == [
        Score(2.0)
    ]
    growing = GrowingFile(tmp_path / "grows.jsonl", 1)
    growing.begin()
    growing.add([{"text": strange}])
    with open(tmp_path / "grows.jsonl.part", "ab") as torn:
        torn.write(b'{"text": "')
    assert growing.records() == [{"text": strange}]
    assert growing.begin() == 1
    growing.finish()
    assert growing.records() == [{"text": strange}]


# Judges


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"),
        (" b. B", "B"),
        ("**B**", "B"),
        ("Answer B is longer.\n\nA", "A"),
        ("Tie", "tie"),
        ("", ""),
        ("neither", ""),
        ("A or B", ""),
        ("ABBA", ""),
    ],
)
def test_verdicts_are_parsed(text, verdict):
    assert parse_verdict(text) == verdict


class Longer:
    """Prefers the longer answer; equal ones get the first place."""

    def __init__(self, *, always=None):
        self.questions, self.always = [], always

    def ask(self, questions):
        self.questions += questions
        return [self.always if self.always is not None else self._say(question) for question in questions]

    def _say(self, question):
        first, second = (question.split(f"Answer {letter}:\n")[1].split("\n")[0] for letter in "AB")
        return "A" if len(first) >= len(second) else "B"


def test_a_judge_is_asked_in_both_orders_and_ties_are_counted():
    longer = Longer()
    judge = Judge(longer)
    pairs = [Comparison("p {second}", "longer", "short"), Comparison("p", "x", "xyz"), Comparison("p", "ab", "cd")]
    assert judge.compare(pairs) == [Verdict.FIRST, Verdict.SECOND, Verdict.TIE]
    assert (judge.counts.asked, judge.counts.ties, judge.counts.turned, judge.counts.unparsed) == (6, 1, 1, 0)
    assert "p {second}" in longer.questions[0]
    assert longer.questions[0].index("longer") < longer.questions[0].index("short")
    assert longer.questions[1].index("short") < longer.questions[1].index("longer")


def test_verdicts_that_cannot_be_parsed_have_a_limit():
    pairs = [Comparison("p", "a", "bb")] * 5
    judge = Judge(Longer(always="I cannot say"))
    assert judge.compare(pairs) == [Verdict.UNPARSED] * 5  # too few to tell
    with pytest.raises(DataError, match="20 of 20 verdicts cannot be parsed, more than unparsed_limit .*I cannot say"):
        judge.compare(pairs)
    assert Judge(Longer(always="?"), unparsed_limit=1.0).compare(pairs * 4) == [Verdict.UNPARSED] * 20


def test_a_judge_as_a_reward_is_the_share_of_wins():
    answers = [Answer("p", text) for text in ("a", "bbb", "cc")] + [Answer("q", "d"), Answer("q", "e")]
    scores = JudgedAnswers(Judge(Longer()), opponents=2).scores(answers)
    assert [score.value for score in scores] == [0.0, 1.0, 0.5, 0.5, 0.5]
    (alone,) = JudgedAnswers(Judge(Longer()), opponents=1).scores(answers[:1])
    assert (alone.value, alone.reason) == (0.5, "no other answer to compare with")


def test_the_agreement_with_a_labelled_set_is_said_and_has_a_limit(tmp_path):
    said = []
    lines = [
        {"prompt": "p", "chosen": "long answer", "rejected": "short"},
        {"prompt": "p", "chosen": "s", "rejected": "long answer"},
        {"prompt": "p", "chosen": "ab", "rejected": "cd"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
         "chosen": [{"role": "assistant", "content": "abc"}], "rejected": [{"role": "assistant", "content": "d"}]},
    ]  # fmt: skip
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_labelled(path)[-1] == Comparison("system: s\n\nuser: u", "abc", "d")
    options = JudgeReward(kind="judge", url="http://localhost:1", labelled=str(path))
    build_judge(options, Longer(), said.append)
    assert said == ["the judge agrees with 66.7% of the labelled pairs that it decides (4 pairs, 1 ties, 0 not parsed)"]
    with pytest.raises(ConfigError, match="fewer than reward.agreement"):
        build_judge(options.model_copy(update={"agreement": 0.9}), Longer(), said.append)
    path.write_text(json.dumps(lines[0]) + '\n{"prompt": "p"}\n')
    with pytest.raises(DataError, match="labelled.jsonl:2: has no chosen"):
        read_labelled(path)
    write_pairs(path, 30)
    assert len(read_labelled(path)) == 30


class Server(ThreadingHTTPServer):
    """Notes what it is asked. mode: how it answers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.requests, self.seen, self.mode = threading.Lock(), [], set(), "plain"


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that prefers the longer answer; the first request of each question gets 503."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        server: Any = self.server  # a Server
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            again = question in server.seen
            server.seen.add(question)
        if server.mode == "redirect":
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status = {"flaky": 200 if again else 503, "refuses": 400}.get(server.mode, 200)
        content = {"choices": [{"message": {"content": Longer()._say(question)}}]}
        text = b"<html>" if server.mode == "html" else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()


def judge_at(server, **options):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    return JudgeReward(kind="judge", url=url, model="m", timeout_s=5, **options)


def test_a_server_is_asked(server, monkeypatch):
    server.mode = "flaky"
    monkeypatch.setattr("flagscale_like.rl.rewards.chat_server.FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Judge(ChatServer(judge_at(server, api_key_env="JUDGE_KEY")))
    pairs = [Comparison("p", "a" * n, "bbb") for n in range(1, 6)]
    assert judge.compare(pairs) == [Verdict.SECOND] * 2 + [Verdict.TIE] + [Verdict.FIRST] * 2
    path, key, body = server.requests[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "m", 0)
    assert len(server.requests) == 20  # each question twice


@pytest.mark.parametrize(
    ("mode", "words"),
    [("refuses", "status 400"), ("html", "'<html>', which is no chat completion"), ("redirect", "status 307")],
)
def test_a_server_that_does_not_answer(server, mode, words):
    server.mode = mode
    with pytest.raises(DataError, match=words):
        ChatServer(judge_at(server)).ask(["Answer A:\na\nAnswer B:\nb\n"])
    assert len(server.requests) == 1


def test_no_server_and_no_key(server, monkeypatch):
    monkeypatch.setattr("flagscale_like.rl.rewards.chat_server.FIRST_WAIT_S", 0.01)
    options = JudgeReward(kind="judge", url="http://127.0.0.1:9/v1", retries=1, timeout_s=2)
    with pytest.raises(DataError, match=r"no answer after 2 requests: .*refused"):
        ChatServer(options).ask(["x"])
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY is not set"):
        ChatServer(judge_at(server, api_key_env="JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", "secret\n")
    with pytest.raises(ConfigError, match="JUDGE_KEY holds more than printable ASCII") as found:
        ChatServer(judge_at(server, api_key_env="JUDGE_KEY"))
    assert "secret" not in str(found.value)


# Configuration


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "judge"}, "either url, of a server, or path"),
        ({"kind": "judge", "url": "localhost:8000"}, "must begin with http"),
        ({"kind": "judge", "url": "http://x", "agreement": 0.5}, "name its file in labelled"),
        ({"kind": "function", "function": "rules"}, "pattern"),
        ({"kind": "mixture", "sources": []}, "at least 1"),
        ({"kind": "mixture", "sources": [{"kind": "model", "path": "a"}] * 2}, "'model' twice"),
    ],
)
def test_options_that_make_no_reward_are_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(Reward).validate_python(values)


@pytest.mark.parametrize(
    ("rl", "words"),
    [
        ({"reward": {"kind": "model"}}, "reward.path is not given"),
        ({"outside": {"action": "clamp"}}, "rl.reward has none, or several"),
        (
            {"reward": {"kind": "judge", "url": "http://x"}, "rollout": {"samples": 1}, "algorithm": "ppo"},
            "give 2 or more",
        ),
        ({"rounds": {"count": 1, "iterations": 1}}, "rounds.judge is not given"),
        (
            {
                "rounds": {
                    "count": 1,
                    "iterations": 1,
                    "reward_model": "x.yaml",
                    "judge": {"kind": "function", "function": "a:b"},
                }
            },
            "rounds renew the one reward model",
        ),
        (
            {
                "reward": {"kind": "model", "path": "x"},
                "outside": {"action": "clamp", "kl": 9},
                "kl": {"coefficient": 0},
            },
            "kl.coefficient 0 keeps none",
        ),
        ({"outside": {"action": "clamp", "scores": [0.9, 0.1]}}, "two quantiles that rise"),
    ],
)
def test_groups_of_rl_that_do_not_fit_are_refused(rl, words, tmp_path):
    with pytest.raises(ValidationError, match=words):
        rl_config(tmp_path / "run", tmp_path, rl)
