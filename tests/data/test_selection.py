"""Dynamic data selection: shares kept exactly, weights that follow the scores, and nothing that depends on the layout."""

import random
from typing import Any

import pytest

from flagscale_like.config import Selection
from flagscale_like.data.draws import DrawnOrder, read_draws
from flagscale_like.data.selection import Mixture, MixtureSampler
from flagscale_like.errors import DataError
from tests.harness import tiny_config


def totals(*losses, deviation=0.0, samples=4):
    """Of a step in which each source gave so many samples, with this mean and deviation of their losses."""
    return [
        [loss * samples for loss in losses],
        [(loss**2 + deviation**2) * samples for loss in losses],
        [samples] * len(losses),
    ]


def shares(mixture, samples):
    mixture.draw(samples)
    return [sum(source == s for source, _ in mixture.plan) / samples for s in range(len(mixture.prior))]


def after(options, rounds, scores=None, losses=None):
    """A mixture of two sources, after so many changes."""
    mixture = Mixture(options, [1, 1])
    for turn in range(rounds):
        for _ in range(options.interval):
            mixture.draw(8)
            due = mixture.note(totals(*(losses(turn) if losses else (1.0, 1.0))))
        assert due
        mixture.change(scores(turn) if scores else None)
    return mixture


def test_samples_are_drawn_by_weight_in_turn_and_each_source_in_its_order():
    mixture = Mixture(Selection(floor=1e-9), [3, 1])
    assert shares(mixture, 400) == [0.75, 0.25]
    assert [index for source, index in mixture.plan if source == 1] == list(range(100))
    for end in range(1, 400):  # never more than a sample off
        assert abs(sum(source == 0 for source, _ in mixture.plan[:end]) - 0.75 * end) <= 1
    mixture.draw(1)
    assert mixture.plan[0][1] == mixture.drawn[mixture.plan[0][0]] - 1 >= 100


def test_the_source_that_makes_progress_is_preferred_to_the_one_that_does_not():
    mixture = after(Selection(), 20, losses=lambda turn: (5.0 * 0.95**turn, 6.0 + 0.01 * (-1) ** turn))
    useful, noise = mixture.weights
    assert useful > 0.9
    assert noise == pytest.approx(1 - useful)
    assert noise > 0.1 / 2  # bounded away from zero


def test_once_no_source_makes_progress_chance_moves_nothing():
    mixture = after(Selection(), 20, losses=lambda turn: (5.0 * 0.95**turn, 6.0))
    found, chance = mixture.weights, random.Random(0)
    for _ in range(60 * mixture.options.interval):
        if mixture.note(totals(chance.gauss(1.9, 0.1), chance.gauss(6.0, 0.1), deviation=0.6)):
            mixture.change()
    assert mixture.weights == pytest.approx(found, abs=0.1)


def test_progress_is_scored_where_it_has_a_standard_error():
    mixture = Mixture(Selection(interval=1), [1, 1])
    for losses in ([3.0, 3.0], [1.0, 1.0]):
        mixture.note([[losses[0], 2 * losses[1]], [losses[0] ** 2, 2 * losses[1] ** 2 + 2 * 0.5**2], [1, 2]])
        mixture.change()
    assert mixture.scores == [None, 4.0]
    assert mixture.losses[0] == pytest.approx(0.7 * 3 + 0.3 * 1)
    # of losses 0.5 and 1.5: variance 0.5, of the mean 0.25; by the weight of a half
    assert mixture.errors == [None, pytest.approx(1.0)]


def test_the_rule_of_the_loss_itself_prefers_what_is_hard():
    mixture = after(Selection(rule="loss"), 20, losses=lambda turn: (2.0, 6.0))
    assert mixture.weights[1] > 0.8


def test_the_rule_of_the_target_follows_the_scores_it_is_given_and_comes_back():
    options = Selection(rule="target", target="x", floor=0.2)
    mixture = after(options, 30, scores=lambda turn: [0.5, -0.1])
    assert mixture.weights == [pytest.approx(0.9, abs=0.01), pytest.approx(0.1, abs=0.01)]
    assert mixture.weights[1] >= 0.1
    for _ in range(30):
        mixture.change([-0.1, 0.5])
    assert mixture.weights[1] > 0.85


def test_a_score_that_could_not_be_taken_changes_nothing_of_its_source():
    options = Selection(rule="target", target="x")
    mixture = after(options, 3, scores=lambda turn: [0.5, -0.1] if turn != 1 else [None, -0.1])
    assert mixture.scores == [pytest.approx(0.5), pytest.approx(-0.1)]
    assert mixture.weights[0] > 0.5


def test_a_step_whose_loss_is_not_finite_is_not_counted():
    mixture = Mixture(Selection(interval=2), [1, 1])
    assert not mixture.note(totals(float("nan"), 1.0))
    assert mixture.note(totals(2.0, 1.0))
    assert mixture.change() == {0: 2.0, 1: 1.0}


def test_a_restored_mixture_goes_on_as_the_saved_one():
    import json

    options = Selection(interval=3)
    one, two = (after(options, 5, losses=lambda turn: (3 / (turn + 1), 4.0)) for _ in range(2))
    one.draw(5)
    one.note(totals(2.3, 4.5))
    other = Mixture(options, [1, 1])
    other.load(json.loads(json.dumps(one.state())))
    for mixture in (one, other):
        mixture.draw(7)
        mixture.note(totals(1.7, 2.5))
        mixture.note(totals(1.7, 2.0))
        mixture.change()
        mixture.draw(50)
    assert one.plan == other.plan
    assert one.state() == other.state() != two.state()


def test_an_older_state_without_errors_and_totals_is_taken():
    state = after(Selection(), 3, losses=lambda turn: (3 / (turn + 1), 4.0)).state()
    mixture = Mixture(Selection(), [1, 1])
    mixture.load({name: value for name, value in state.items() if name not in ("errors", "totals")})
    assert mixture.state() == {**state, "errors": [None, None]}


def test_the_draw_is_followed_from_where_selection_began_and_no_further_than_the_journal_reaches(tmp_path):
    mixture, read = Mixture(Selection(interval=2), [3, 1]), []
    train = tiny_config(tmp_path).train  # 8 samples a step
    for step in range(5):
        if step % 2 == 0:
            mixture.draw_state(800 + 8 * step, train).append_to(tmp_path)
        mixture.draw(8)
        read += mixture.plan
        if mixture.note(totals(3.0 - step, 2.0)):
            mixture.change()
    parts: list[Any] = [range(1000)] * 2  # the order asks for their lengths alone
    order = DrawnOrder(parts, read_draws(tmp_path))
    assert [order.place(800 + i) for i in range(40)] == read
    for unknown in (799, 800 + 48):
        with pytest.raises(DataError, match="up to the last step of the run"):
            order.place(unknown)


def test_an_older_journal_counts_from_the_first_sample(tmp_path):
    (tmp_path / "draws.jsonl").write_text('{"weights": [0.5, 0.5], "credits": [0.0, 0.0], "drawn": [5, 3]}\n')
    assert [(state.position, state.until) for state in read_draws(tmp_path)] == [(8, None)]


def test_another_number_of_sources_is_refused_by_name():
    with pytest.raises(DataError, match="has 2 sources, data.sources lists 3"):
        Mixture(Selection(), [1, 1, 1]).load(Mixture(Selection(), [1, 1]).state())


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (2, 2), (1, 4)])
def test_every_data_parallel_size_reads_the_plan(micro, dp):
    mixture = Mixture(Selection(), [2, 1])
    samplers = [iter(MixtureSampler(mixture, micro, rank, dp)) for rank in range(dp)]
    for _ in range(3):
        mixture.draw(8)
        found = []
        for _ in range(8 // (micro * dp)):
            for sampler in samplers:
                found += next(sampler)
        assert found == mixture.plan
