"""Packs of rollouts, how they are dealt to ranks, and what an iteration keeps between two starts."""

import json

import pytest
import torch

from flagscale_like.arch import ModelArch
from flagscale_like.errors import DataError
from flagscale_like.generation.rollout import Rollout
from flagscale_like.model.spec import ModelSpec
from flagscale_like.rl.answers import Score
from flagscale_like.rl.packs import Deal, pack, places_of, unpack
from flagscale_like.rl.prompts import Prompts, Row, Words, read_prompts
from flagscale_like.rl.scoring import Scored
from flagscale_like.rl.state import RlState
from tests.rl.runs import make_folder, rl_config

SPEC = ModelSpec(
    arch=ModelArch(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, vocab_size=50),
    seq_length=16,
    micro_batch_size=2,
)


def rollout(prompt, ids, number=0):
    return Rollout(number, 0, prompt, ids, [-0.5] * len(ids), [-0.25] * len(ids), "stop", 3)


def test_what_belongs_to_a_token_lies_at_the_place_that_predicts_it():
    rollouts = [rollout([5, 6, 7], [8, 9]), rollout([4], [3]), rollout([1, 2], [3, 4, 5])]
    advantages = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])]
    row = pack(rollouts, {"advantages": advantages}, 16)
    assert row["documents"].tolist() == [0, 4, 5, 9, 16]
    assert row["tokens"].tolist()[:9] == [5, 6, 7, 8, 4, 1, 2, 3, 4]
    assert row["labels"].tolist()[:9] == [6, 7, 8, 9, 3, 2, 3, 4, 5]
    drawn = row["loss_mask"].bool()
    assert row["labels"][drawn].tolist() == [8, 9, 3, 3, 4, 5]
    assert row["extras"]["advantages"][0, drawn].tolist() == [1, 2, 3, 4, 5, 6]
    found = unpack(row["extras"]["advantages"], rollouts, [[0, 1, 2]])
    assert [found[number].tolist() for number in range(3)] == [own.tolist() for own in advantages]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_rollout_is_dealt_once_and_all_ranks_have_as_many_micro_batches(ranks):
    places = [int(n) for n in torch.randint(1, 17, (23,), generator=torch.Generator().manual_seed(ranks))]
    deal = Deal.of(places, SPEC, ranks)
    dealt = [deal.micro_batches(rank) for rank in range(ranks)]
    members = [number for own in dealt for rows in own for row in rows for number in row]
    assert sorted(members) == list(range(23))
    assert len({len(own) for own in dealt}) == 1
    assert all(len(rows) == 2 and sum(places[n] for n in row) <= 16 for own in dealt for rows in own for row in rows)
    assert Deal.of([], SPEC, ranks).micro_batches(ranks - 1) == [[[], []]]


def test_rollouts_that_wait_come_back_as_they_were():
    state, scored = (
        RlState(0.125),
        Scored(rollout([1, 2], [3, 4], 7), 5, Score(0.75, (0.5, 1.0), False, "x", {"a": 2.0})),
    )
    state.waiting = [scored]
    again = RlState(0.0)
    again.load(json.loads(json.dumps(state.state())))
    assert (again.coefficient, again.waiting) == (0.125, [scored])
    assert places_of(again.waiting[0].rollout) == 3


def test_prompts_have_each_row_once_an_epoch_and_go_on_where_they_were():
    rows = [Row(str(number), (number,)) for number in range(5)]
    prompts = Prompts(rows, seed=3)
    first = prompts.take(5)
    assert [number for number, _ in first] == list(range(5))
    assert sorted(row.text for _, row in first) == list("01234")
    state = prompts.state()
    rest = prompts.take(7)
    again = Prompts(rows, seed=3)
    again.load(state)
    assert again.take(7) == rest
    assert [row for _, row in rest[:5]] != [row for _, row in first]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "2: "),
        ("[1]", "2: is list, not an object"),
        ('{"text": "a"}', "2: has neither: give `prompt`, a text, or `messages`"),
        ('{"prompt": "a", "messages": []}', "2: has prompt and messages"),
        ('{"prompt": 3}', "2: prompt is int, not a text"),
        ('{"prompt": ""}', "2: is empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no chat template"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, says):
    folder = make_folder(tmp_path)
    (folder / "prompts.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    config = rl_config(tmp_path / "run", folder)
    with pytest.raises(DataError) as problem:
        read_prompts(config, Words(config))
    assert says in str(problem.value)
