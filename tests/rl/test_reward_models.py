"""Reward models as rewards: alike on every layout, of the right role and tokenizer; their validation; the guard."""

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from flagscale_like.checkpoint.opened import open_adapted
from flagscale_like.config import FunctionReward, ModelReward, Outside
from flagscale_like.data.chat import ChatTokenizer
from flagscale_like.data.pair_shards import parse_pair
from flagscale_like.data.preprocess import preprocess_chat
from flagscale_like.data.shards import ChatOptions
from flagscale_like.errors import CheckpointError, ConfigError, DataError
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Rollout
from flagscale_like.recipes.score import score_pairs
from flagscale_like.rl import scoring
from flagscale_like.rl.answers import Answer, Score
from flagscale_like.rl.early import AskedInThread, early_form
from flagscale_like.rl.guard import Candidates, Guard, Place, Why, answer_of, record_of, shares
from flagscale_like.rl.guarding import build_guarding
from flagscale_like.rl.rewards import Surroundings, build_reward, model
from flagscale_like.rl.rewards.judge import AskedOnce, Judge, JudgedAnswers
from flagscale_like.rl.rewards.model import RewardModel
from flagscale_like.rl.validation import NAME, Validation, at_level
from flagscale_like.runtime.parallel import ParallelContext, parallel_context
from flagscale_like.training.plan import Progress
from tests import faults
from tests.data.chats import CHATML, make_tokenizer
from tests.data.pairs import write_pairs
from tests.harness import run_ranks, tiny_config
from tests.rl.runs import make_folder, numbers, rl_config, run_all

LAYOUTS = ({"tp": 2, "sp": True}, {"pp": 2}, {})
ROWS = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`pairs`, their tokenizer `tok`; `reward`, a run of a reward model with three heads; `policy`, a language model's."""
    folder = tmp_path_factory.mktemp("rewards")
    tokenizer = make_tokenizer(folder / "tok")
    write_pairs(folder / "pairs.jsonl", 60)
    preprocess_chat([folder / "pairs.jsonl"], tokenizer, folder / "pairs", ChatOptions(CHATML, pairs=True))
    run_ranks(1, train_both, folder)
    return folder


def train_both(folder):
    shared = {"model__vocab_size": 300, "model__num_layers": 2, "train__steps": 2, "checkpoint": {"interval": 2}}
    data = {"sources": [{"path": str(folder / "pairs")}], "tokenizer": str(folder / "tok"), "split": "70,30,0"}
    reward = {"objective": {"kind": "reward", "heads": 3}, "data": data, "train__seq_length": 128}
    rates = {"optimizer": {"lr": 1e-2, "warmup_steps": 0}, "train__eval_interval": 2, "train__eval_steps": 1}
    said, error = faults.train_and_listen(
        tiny_config(folder / "reward", **shared, **reward, **rates, train__global_batch_size=4)
    )
    assert error is None, error
    assert [line for line in said if line.startswith("validated on 18 pairs of the validation split: accuracy")], said
    faults.train_run(tiny_config(folder / "policy", **shared))


def answers_of(folder):
    """The answers of the file of pairs as a policy with the same tokenizer gives them, chosen and rejected in turn."""
    chat, found = ChatTokenizer(folder / "tok", CHATML), []
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        pair = parse_pair(line)
        for side in (pair.chosen, pair.rejected):
            *prompt, answer = side.messages
            encoded = chat.encode(side.messages)
            start, stop = (int(np.flatnonzero(encoded.weights)[at]) for at in (0, -1))
            found.append(
                Answer(
                    chat.text(prompt, prompt=True),
                    answer["content"],
                    prompt_ids=encoded.ids[:start].tolist(),
                    ids=encoded.ids[start : stop + 1].tolist(),
                    finish="stop",
                    messages=prompt,
                )
            )
    return found


def no_engine(options):
    raise AssertionError("no judge is asked for")


def score_on(folder, layouts):
    """The scores of the pairs' answers under `score`, by tokens and by text, on each layout; and of a function on rank 0."""
    from flagscale_like.config import Parallel

    found, answers = [], answers_of(folder)
    for layout in layouts:
        with parallel_context(Parallel(**layout)) as ctx:
            around = Surroundings(ctx, ROWS, folder / "tok", open_engine=no_engine, say=lambda line: None)
            own = {}
            for tokens in ("same", "text"):
                options = ModelReward(kind="model", path=str(folder / "reward"), tokenizer=tokens)
                own[tokens] = build_reward(options, around).scores(answers)
            rules = FunctionReward(kind="function", function=f"{folder / 'rules.py'}:rules")
            own["rules"] = build_reward(rules, around).scores(answers[:2])
            source = open_adapted(folder / "reward", adapter=None).source
            scored = score_pairs(source, str(folder / "pairs"), ctx, seq_length=ROWS)
            found.append((own, None if scored is None else scored.values))
    return found


def test_reward_models_score_alike_on_every_layout_and_as_score_does(folder):
    (folder / "rules.py").write_text(
        "import os\ndef rules(answers):\n    return [int(os.environ['RANK'])] * len(answers)\n"
    )
    ((alone, scored),) = run_ranks(1, score_on, folder, [{}])[0]
    heads = np.array([score.heads for score in alone["same"]])
    assert heads.shape == (120, 3)
    np.testing.assert_allclose(heads, scored.reshape(120, 3), rtol=1e-5)
    np.testing.assert_allclose([score.value for score in alone["same"]], heads.mean(-1), rtol=1e-6)
    assert [score.heads for score in alone["text"]] == [score.heads for score in alone["same"]]
    ranks = run_ranks(2, score_on, folder, LAYOUTS)
    for own, other, layout in zip(*ranks, LAYOUTS, strict=True):
        assert own[0] == other[0]  # the same scores on both ranks
        assert [score.value for score in own[0]["rules"]] == [0.0, 0.0]  # rank 0 was asked
        np.testing.assert_allclose([score.heads for score in own[0]["same"]], heads, rtol=1e-5, err_msg=str(layout))


SCORED = {
    "algorithm": "ppo",
    "epochs": 2,
    "kl": {"coefficient": 0.05},
    "rollout": {"samples": 4, "rows": 3, "max_new_tokens": 20, "stop_strings": ["e", "o", "t"]},  # of many lengths
}


EARLY = (
    ({"pp": 2}, {}),
    ({}, {}),
    ({"tp": 2, "sp": True, "ep": 2}, {"model__experts": {"count": 4, "top_k": 2, "ffn_hidden_size": 48}}),
    ({"tp": 2}, {"rollout": {"engine": "refit"}}),
)


def early_and_late(folder):
    """Of each run: what happened until the last rollout was there; its numbers, and those of one that scores at the end."""
    source = {"kind": "model", "path": str(folder / "reward")}
    other = {"kind": "function", "name": "small", "weight": 0.5, "function": "tests.rl.runs:small_ids"}
    rl = SCORED | {"reward": {"kind": "mixture", "sources": [source, other]}}
    data = {"prompts": [str(folder / "words/prompts.jsonl")], "tokenizer": str(folder / "tok")}
    changes = {"data": data, "model__vocab_size": 300, "train__global_batch_size": 12, "train__seq_length": 64}
    found = []
    for number, (layout, own) in enumerate(EARLY):
        happened: list[str] = []
        with ExitStack() as patched:
            for owner, name, said in (
                (RewardModel, "own_scores", lambda *_: "reward"),
                (scoring, "token_numbers", lambda _, objective, *__: objective.metric),
                (OwnEngine, "sleep", lambda *_: "drawn"),
            ):
                patched.enter_context(patch.object(owner, name, noted(happened, getattr(owner, name), said)))
            rl = rl | {"rollout": SCORED["rollout"] | own.get("rollout", {})}
            own = changes | {name: value for name, value in own.items() if name != "rollout"} | {"parallel": layout}
            runs = [run_once(folder / f"early {number}", folder, rl, **own)]
            patched.enter_context(patch.object(scoring, "early_form", no_form))
            patched.enter_context(patch.object(scoring.PassRoom, "is_full", lambda *_: False))
            runs.append(run_once(folder / f"late {number}", folder, rl, **own))
        found.append((happened[: happened.index("drawn") + 1], runs))
    return found


def noted(happened, function, said):
    """The function, which leaves a word in a list when it is called."""
    return lambda *given: (happened.append(said(*given)), function(*given))[1]


def run_once(run_dir, folder, rl, **changes):
    """One iteration; its numbers."""
    ((_, error),) = run_all([rl_config(run_dir, folder, rl, train__steps=1, **changes)])
    assert error is None, error
    return numbers(run_dir)


def no_form(*_, **__):
    return None


def test_models_score_while_others_are_drawn_and_what_they_would_score_at_the_end(folder):
    """Reward model, reference, critic and policy, on copies with different numbers of rollouts (two prompts, and one).

    Also with experts that each copy has for itself. A copy of the weights that draws (refit) is gone before a model scores.
    """
    make_folder(folder / "words")
    ranks = run_ranks(2, early_and_late, folder)
    for rank, own in enumerate(ranks):
        for number, (happened, (early, late)) in enumerate(own):
            passes = {name: happened.count(name) for name in ("reward", "log-probability", "value")}
            # The copy with one prompt draws four rollouts, which fill a row just at the end.
            busy = number != 1 or rank == 0
            assert not busy or all(passes.values()) == (number < 3), (number, rank, happened)
            assert number < 3 or not any(passes.values()), happened
            if rank == 0:
                assert early[0].keys() == late[0].keys()
                assert early[0] == pytest.approx(late[0], rel=1e-4, abs=1e-5)
    assert "reward/model" in ranks[0][0][1][0][0]


class Longer:
    """A judge that finds the longer answer better."""

    def ask(self, questions):
        sides = [question.split("Answer A:\n")[1].split("\n\nAnswer B:\n") for question in questions]
        return ["A" if len(a) > len(b.split("\n\nSay")[0]) else "B" for a, b in sides]


class Alone(ParallelContext):
    """A world of one, without torch.distributed."""

    is_main, rank = True, 0

    def __init__(self): ...

    def broadcast(self, value):
        return value


def test_a_judge_behind_a_url_is_asked_as_soon_as_a_prompts_rollouts_are_there():
    ctx, texts = Alone(), {0: "a", 1: "abc", 2: "ab"}
    rollouts = [Rollout(prompt, sample, [prompt]) for sample in (2, 0, 1) for prompt in (7, 8)]

    def answer_of(one):
        return Answer(f"prompt {one.prompt}", texts[one.sample], prompt_ids=one.prompt_ids)

    judged = JudgedAnswers(Judge(AskedOnce(Longer(), ctx)), opponents=1)
    early = early_form(judged, answer_of, lambda prompt: 3, is_first=True)
    assert isinstance(early, AskedInThread)
    for rollout in rollouts[:-1]:
        early.add(rollout)
    assert len(early._asked) == 1  # prompt 7, while one of prompt 8 is drawn
    early.add(rollouts[-1])
    whole = sorted(rollouts, key=lambda one: (one.prompt, one.sample))
    wanted = judged.scores([answer_of(one) for one in whole])
    found = early.finish()
    assert [found[one.prompt, one.sample] for one in whole] == wanted
    assert sorted({score.value for score in wanted}) == [0.0, 0.5, 1.0]
    own = JudgedAnswers(Judge(Longer()), opponents=1)  # a judge on the ranks
    assert early_form(own, answer_of, lambda prompt: 3, is_first=True) is None


def build_all(folder, changed):
    """What building rewards says, and how it fails, by name."""
    found = {}
    with parallel_context(tiny_config("x").parallel) as ctx:
        for name, values, tokenizer, rows in (
            ("another role", {"path": str(folder / "policy")}, folder / "tok", ROWS),
            ("another tokenizer", {"path": str(folder / "reward")}, changed, ROWS),
            ("retokenised", {"path": str(folder / "reward"), "tokenizer": "text"}, changed, ROWS),
            ("unknown", {"path": str(folder / "reward")}, None, ROWS),
            ("missing", {"path": str(folder / "nowhere")}, None, ROWS),
            ("short rows", {"path": str(folder / "reward")}, folder / "tok", 16),
        ):
            said = []
            around = Surroundings(ctx, rows, tokenizer, open_engine=no_engine, say=said.append)
            try:
                source = build_reward(ModelReward.model_validate({"kind": "model", **values}), around)
                assert isinstance(source, model.RewardModel)
                source.scores([Answer("p", "t", prompt_ids=[1] * 12, ids=[2] * 8)])
                assert source.scores([]) == []
                for weight in source.engine.model.parameters():
                    weight.data.fill_(math.nan)
                source.scores([Answer("p", "t", prompt_ids=[1], ids=[2])])
            except (CheckpointError, ConfigError, DataError) as error:
                said.append(f"{type(error).__name__}: {error}")
            found[name] = said
        source = open_adapted(folder / "reward", adapter=None).source
        for name, damage in (
            ("record", None),
            ("weights", weights_of_another),
            ("damaged", cut),
            ("gone", Path.unlink),
        ):
            try:
                if damage is not None:
                    damage(source.folder / NAME)
                record = Validation.read(source)
                found[name] = [str(record), record.pairs, len(record.bands), len(record.disagreement), len(record.kl)]
            except CheckpointError as error:
                found[name] = [str(error)]
        scored = score_pairs(source, str(folder / "pairs"), ctx, seq_length=ROWS)
        scored.keep(source, "pairs")
        found["kept"] = [str(Validation.read(source))]
        policy = score_pairs(
            open_adapted(folder / "policy", adapter=None).source, str(folder / "pairs"), ctx, seq_length=ROWS
        )
        scored.keep(source, str(folder / "pairs"), policy)
        record = Validation.read(source)
        reward = {"kind": "model", "path": str(folder / "reward")}
        default = rl_config("x", folder, {"reward": reward})
        notes = []
        found["guards"] = [build_guarding(default, ctx, Progress(), notes).guard.options.action]
        (source.folder / NAME).rename(source.folder / "away")
        found["guards"] += [build_guarding(default, ctx, Progress(), notes), *notes]
        (source.folder / "away").rename(source.folder / NAME)
        no_model = rl_config("x", folder)
        found["guards"] += [build_guarding(no_model, ctx, Progress(), notes), len(notes)]
        found["surprise"] = [record.surprise[0], record.surprise[-1], policy.surprise(str(folder / "pairs"))]
    return found


def weights_of_another(path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"weights": [record["weights"][0] | {"xxh3": "0"}]}))


def cut(path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"scores": record["scores"][::-1]}))


def test_rewards_of_another_role_tokenizer_or_record_are_refused(folder, tmp_path):
    changed = tmp_path / "other"
    shutil.copytree(folder / "tok", changed)
    words = json.loads((changed / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:-1]
    (changed / "tokenizer.json").write_text(json.dumps(words))
    found = run_ranks(1, build_all, folder, changed)[0]
    assert "is a language model, not a reward model" in found["another role"][-1]
    assert "another tokenizer" in found["another tokenizer"][-1]
    assert "ConfigError" in found["another tokenizer"][-1]
    assert "tokenised again" in found["retokenised"][-2]
    assert "a score is nan, for sample 1 of 1" in found["retokenised"][-1]
    assert "not verified" in found["unknown"][0]
    assert "CheckpointError" in found["missing"][-1]
    assert "20 tokens, and a row has 16 places, for sample 1 of 1" in found["short rows"][-1]
    assert found["record"][1:] == [18, 10, 201, 0]
    assert "is about other weights" in found["weights"][0]
    assert "is damaged (ValueError: scores are not 201 numbers that rise)" in found["damaged"][0]
    assert "score --checkpoint" in found["gone"][0]
    assert found["kept"][0].startswith("60 pairs of pairs: accuracy")
    on, off, note, no_model, notes = found["guards"]
    assert (on, off, no_model, notes) == ("clamp", None, None, 1)  # by default: on where the reward model was validated
    assert note.startswith("the guard on exploration is off: ")
    assert "has no reward_validation.json: `score --keep` makes one" in note
    least, most, surprise = found["surprise"]
    assert (least, most) == (min(surprise), max(surprise))
    # A model that has learned nothing finds all of its 300 tokens about as likely.
    assert 0.5 * math.log(300) < least < most < 2 * math.log(300)


# The guard, without a model


def a_record(**changes):
    """Scores from -1 to 1; chosen answers win but for the highest tenth, where they lose."""
    draw = np.random.default_rng(0)
    values = draw.uniform(-1, 1, (2000, 2))
    values.sort(1)
    values = values[:, ::-1]  # chosen, rejected
    top = values[:, 0] > np.quantile(values[:, 0], 0.9)
    values[top] = values[top][:, ::-1]
    noise = draw.uniform(0, 0.1, (2000, 2, 1)) * [-1.0, 1.0]
    return Validation.measure(values[..., None] + noise, "a test", **changes)


def test_what_a_record_says():
    record = a_record(kl=range(101))
    assert record.accuracy == pytest.approx(0.9)
    assert [band.accuracy for band in record.bands] == [1.0] * 9 + [0.0]
    assert at_level(record.scores, 0.995) == pytest.approx(0.99, abs=0.01)
    assert at_level(record.disagreement, 0.5) == pytest.approx(0.05, abs=0.005)
    assert at_level(record.kl, 0.5) == 50.0
    assert record.band_of(-9).accuracy == 1.0
    assert record.band_of(9).accuracy == 0.0
    for values in (np.zeros((0, 2, 1)), np.full((3, 2, 1), np.nan)):
        with pytest.raises(CheckpointError, match="cannot be validated on nothing"):
            Validation.measure(values, "nothing")


SCORES = [
    Score(0.2, (0.2, 0.2)),
    Score(5.0, (5.0, 5.0)),
    Score(-5.0, (-5.0, -5.0)),
    Score(0.3, (-2.0, 2.6)),
    Score(0.4),
]


def guarded(action, **options):
    return Guard(Outside(action=action, kl=10.0, **options), a_record()).apply(
        SCORES, [*[Place(kl=0.0)] * 4, Place(kl=11.0)]
    )


def test_the_guard_clamps_rejects_or_penalises():
    record = a_record()
    low, median = (at_level(record.scores, level) for level in (0.005, 0.5))
    found = guarded("clamp")
    assert found.why == [(), ("high",), ("low",), ("disagreement",), ("kl",)]
    assert [score.value for score in found.scores] == pytest.approx([0.2, median, low, median, median])
    assert shares(found.why) == {
        "outside/share": 0.8, "outside/high": 0.2, "outside/low": 0.2, "outside/band": 0.0, "outside/disagreement": 0.2,
        "outside/surprise": 0.0, "outside/kl": 0.2,
    }  # fmt: skip
    assert found.scores[1].reason == "outside: high"
    rejected = guarded("reject").scores
    assert [score.rejected for score in rejected] == [False, True, False, True, True]  # a bad answer stays punished
    penalised = [score.value for score in guarded("penalise", penalty=2.0).scores]
    cost = 2.0 * record.deviation
    assert penalised == pytest.approx([0.2, median - cost, low, median - cost, median - cost])
    assert guarded("off").scores == SCORES
    assert Guard(Outside(action="clamp"), record).apply(SCORES[-1:]).why == [()]  # nothing bounds the log-ratio
    assert guarded("clamp", accuracy=0.5).why[1] == ("high", "band")


def test_what_the_reference_does_not_expect_is_outside():
    record = a_record(surprise=np.linspace(1.0, 2.0, 201))
    places = [Place(surprise=value) for value in (1.5, 1.99, 2.5)] + [Place()]

    def why(**options):
        return Guard(Outside(action="clamp", **options), record).apply([Score(0.2)] * 4, places).why

    assert why() == [(), (), ("surprise",), ()]
    assert why(surprise=0.9) == [(), ("surprise",), ("surprise",), ()]
    assert why(surprise=1.0) == [()] * 4
    assert Guard(Outside(), a_record()).apply([Score(0.2)] * 4, places).why == [()] * 4  # nothing is known of it


def test_a_bound_on_the_log_ratio_is_given_or_is_what_was_validated():
    record, places = a_record(kl=range(101)), [Place(kl=60.0), Place(kl=99.9)]

    def why(bound, record=record):
        return Guard(Outside(action="clamp", kl=bound), record).apply([Score(0.2)] * 2, places).why

    assert why(None) == [(), ()]
    assert why(50.0) == [("kl",), ("kl",)]
    assert why("validated") == [(), ("kl",)]  # beyond the quantile 0.995
    assert why("validated", a_record()) == [(), ()]


def test_the_guard_changes_the_models_part_of_a_mixture_alone():
    guard = Guard(Outside(action="clamp"), a_record(), part=("model", 2.0))
    (score,) = guard.apply([Score(2.0 * 5.0 - 3.0, parts={"model": 5.0, "length": -3.0})]).scores
    assert score.value == pytest.approx(2.0 * at_level(a_record().scores, 0.5) - 3.0)


def test_rollouts_outside_are_kept_the_newest_first(tmp_path):
    kept = Candidates(tmp_path / "outside.jsonl", keep=3)
    answers = [Answer("p", f"text {n}", {"n": n}, [1, 2], [n], "stop") for n in range(5)]
    assert kept.since(0) == []
    for step in (1, 2, 3):
        why: list[tuple[Why, ...]] = [("high",) if n in (step, step + 1) else () for n in range(5)]
        assert kept.add(step, answers, [Score(1.0)] * 5, why) == 2
    assert [(r["step"], r["text"]) for r in kept.since(0)] == [(3, "text 4"), (3, "text 3")]
    assert record_of(answer_of(kept.since(2)[0])) == record_of(answers[4])
    assert answer_of(record_of(answers[1])).ids == [1]
    kept.go_back(2)
    assert {record["step"] for record in kept.since(0)} <= {1, 2}
    for step in range(4, 10):
        kept.add(step, answers, [Score(1.0)] * 5, [("kl",)] * 5)
    assert len((tmp_path / "outside.jsonl").read_text().splitlines()) <= 6
