"""Records that fit together, and planted faults: each is found, and named with both places in the code."""

import functools
from dataclasses import replace
from typing import Any

import pytest

from flagscale_like.errors import DataError
from flagscale_like.rehearsal.matching import direction, match
from flagscale_like.rehearsal.record import Event, RankRecord

P2P = "megatron/core/pipeline_parallel/p2p_communication.py"


def reduction(group, line=10, *, numel=8, name="tp", **more):
    shape: dict[str, Any] = {"dtype": "float32", "shape": (numel,), "bytes": 4 * numel}
    return Event("collective", "all_reduce", f"model.py:{line} forward", group, name, **{**shape, **more})


def message(kind, peer, line=20, *, group=(0, 1), handle=None, where=None, **more):
    shape: dict[str, Any] = {
        "dtype": "bfloat16",
        "shape": (4, 2),
        "bytes": 16,
        "asynchronous": handle is not None,
        "handle": handle,
    }
    op = {"send": "isend", "receive": "irecv"}[kind]
    return Event(kind, op, where or f"pipe.py:{line} exchange", group, "pp", peer, **{**shape, **more})


def wait(handle):
    return Event("wait", "wait", "pipe.py:30 wait", handle=handle)


def records(*events, stages=None):
    """One record for each rank, from its events."""
    stages = stages or [0] * len(events)
    return [RankRecord(rank, len(events), list(own), [0], stages[rank]) for rank, own in enumerate(events)]


def problem(*events, **more):
    (found,) = match(records(*events, **more)).problems
    return found


TP = (0, 1)


def test_ranks_that_do_the_same_fit_together():
    own = [Event("compute", "aten::mm", "model.py:1 forward"), reduction(TP), reduction(TP, 11, name="dp")]
    matched = match(records(own, own))
    assert matched.problems == []
    assert matched.meetings[0][1] is matched.meetings[1][1]
    assert matched.meetings[0][1].places == {(0, "collective"): 1, (1, "collective"): 1}
    matched.raise_problems()


def test_a_rank_that_skips_a_reduction_is_named_with_the_line_at_which_the_ranks_part():
    whole = [reduction(TP, line) for line in (10, 11, 12)]
    found = problem(whole, [whole[0], whole[2]])
    assert "rank 1 does not take part: it has asked 2 times" in found.text
    assert "the first lines that differ: rank 0 model.py:11 forward, rank 1 model.py:12 forward" in found.text
    with pytest.raises(DataError, match="rank 1 does not take part"):
        match(records(whole, [whole[0], whole[2]])).raise_problems()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bytes": 64, "shape": (16,)}, "different sizes meet"),
        ({"dtype": "bfloat16", "bytes": 32}, "different dtypes meet"),
        ({"op": "broadcast"}, "different operations meet"),
    ],
)
def test_what_meets_has_one_size_dtype_and_operation(change, words):
    other = replace(reduction(TP, 55), **change)
    found = problem([reduction(TP)], [other])
    assert found.text.startswith(f"{words}: rank 0 asks for all_reduce float32[8] over tp ranks [0, 1] at model.py:10")
    assert found.places == {0: "model.py:10 forward", 1: "model.py:55 forward"}


def test_tokens_that_go_to_experts_may_differ_in_number():
    sent = [replace(reduction(TP, name="ep"), op="all_to_all_single", bytes=size) for size in (8, 24)]
    assert match(records([sent[0]], [sent[1]])).problems == []


def test_another_order_of_two_groups_is_a_hang_if_they_block_and_a_danger_if_not():
    one, other = reduction(TP, 10), reduction(TP, 11, name="dp")
    problems = match(records([one, other], [other, one])).problems
    order, hang = (found.text for found in problems)
    assert order.startswith("ranks 0 and 1 use two groups in different orders, which may hang: all_reduce")
    assert hang.startswith(
        "a hang: rank 0 waits in all_reduce float32[8] over tp ranks [0, 1] at model.py:10 forward, for"
    )
    assert "rank 1 waits in all_reduce float32[8] over dp ranks [0, 1] at model.py:11 forward" in hang
    assert problems[1].places == {0: "model.py:10 forward", 1: "model.py:11 forward"}
    free = [
        [replace(e, asynchronous=True, handle=n) for n, e in enumerate(own)] for own in ([one, other], [other, one])
    ]
    (only,) = match(records(*([*own, wait(0), wait(1)] for own in free))).problems
    assert only.text == order


def test_a_send_without_its_receive_and_the_reverse_are_named():
    assert "rank 1 does not receive it" in problem([message("send", 1)], []).text
    assert "rank 0 sends nothing" in problem([], [message("receive", 0)]).text
    other = message("receive", 0, 44, bytes=32, shape=(8, 2))
    found = problem([message("send", 1)], [other])
    assert found.text.startswith(
        "different sizes meet: rank 0 asks for isend bfloat16[4, 2] over pp ranks [0, 1] with rank 1"
    )
    assert found.places == {0: "pipe.py:20 exchange", 1: "pipe.py:44 exchange"}


def test_two_ranks_that_both_send_first_hang_and_in_one_exchange_they_do_not():
    def rank(peer, lines):
        first, second = message("send", peer, lines[0], handle=1), message("receive", peer, lines[1], handle=2)
        return [first, second, wait(1), wait(2)]

    together, apart = [rank(1, (20, 20)), rank(0, (20, 20))], [rank(1, (20, 21)), rank(0, (20, 21))]
    assert match(records(*together, stages=[0, 1])).problems == []
    found = problem(*apart, stages=[0, 1])
    assert found.text.startswith("a hang: rank 0 waits in isend")


@functools.cache
def line_of(text, function):
    """The line of megatron-core that begins an exchange in one direction: as a record names it."""
    import inspect

    from megatron.core.pipeline_parallel import p2p_communication

    lines, start = inspect.getsourcelines(getattr(p2p_communication, function))
    return f"{P2P}:{start + next(i for i, line in enumerate(lines) if text in line)} {function}"


def test_an_interleaved_exchange_that_is_crossed_at_two_stages_is_found():
    """Both neighbours are one rank, and what crosses has one size: megatron-core's lines name the direction."""
    lines = {way: line_of(f"{way}_req = ", "_p2p_ops") for way in ("send_next", "recv_prev", "send_prev", "recv_next")}
    assert {way: direction(line) for way, line in lines.items()} == {way: way[-4:] for way in lines}
    assert direction("pipe.py:20 exchange") == ""

    def rank(peer, order):
        asked = [
            message("send" if way.startswith("send") else "receive", peer, handle=n, where=lines[way])
            for n, way in enumerate(order)
        ]
        return [*asked, *(wait(n) for n in range(len(order)))]

    straight = [rank(1, ("send_next", "send_prev")), rank(0, ("recv_prev", "recv_next"))]
    assert match(records(*straight, stages=[0, 1])).problems == []
    crossed = [rank(1, ("send_prev", "send_next")), rank(0, ("recv_prev", "recv_next"))]
    found = problem(*crossed, stages=[0, 1])
    assert (
        "an exchange is crossed: what is sent to the previous stage is taken for what the previous stage sent"
        in found.text
    )
    assert found.places == {0: lines["send_prev"], 1: lines["recv_prev"]}


def test_a_hang_over_two_groups_and_a_message_is_found():
    """Rank 0 waits for a message of rank 2, which waits in a reduction for rank 3, which waits for rank 1, and so on."""
    tp = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
    receive = [message("receive", 2, 21, group=(0, 2)), message("receive", 3, 21, group=(1, 3))]
    send = [message("send", 0, 22, group=(0, 2)), message("send", 1, 22, group=(1, 3))]
    good = [[receive[0], reduction(tp[0])], [receive[1], reduction(tp[1])], [send[0], reduction(tp[2])]]
    assert match(records(*good, [send[1], reduction(tp[3])], stages=[0, 0, 1, 1])).problems == []
    found = problem(
        [receive[0], reduction(tp[0])],
        [reduction(tp[1]), receive[1]],
        [reduction(tp[2]), send[0]],
        [send[1], reduction(tp[3])],
        stages=[0, 0, 1, 1],
    )
    assert found.text.startswith("a hang: ")
    assert set(found.places) == {0, 1, 2, 3}


def test_one_record_of_each_stage_stands_for_all_of_it():
    """Sixteen ranks: tp 2, dp 4, pp 2."""
    first = [reduction((0, 1)), message("send", 8, group=(0, 8)), reduction((0, 2, 4, 6), 12, name="dp")]
    last = [message("receive", 3, group=(3, 11)), reduction((10, 11)), reduction((9, 11, 13, 15), 12, name="dp")]
    both = [RankRecord(0, 16, first, [0], 0), RankRecord(11, 16, last, [0], 1)]
    matched = match(both)
    assert matched.problems == []
    assert len(matched.meetings[0][1].ends) == 2
    with pytest.raises(DataError, match="no record of stage 0"):
        match(both[1:])
    with pytest.raises(DataError, match="a rank has two records"):
        match([both[0], both[0]])
    with pytest.raises(DataError, match="runs of 8, 16 ranks"):
        match([both[0], RankRecord(1, 8)])
    tied = [replace(reduction((0, 8), 40, name="embedding"))]
    assert "rank 11 does not take part" in match([replace_events(both[0], [*first, *tied]), both[1]]).problems[0].text


def replace_events(record, events):
    return RankRecord(record.rank, record.world_size, events, record.step_starts, record.stage)
