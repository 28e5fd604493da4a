"""The replay against times that are known by hand: kernels, overlap, bubbles, waits, links; and its trace."""

import json
from dataclasses import replace
from typing import Any

import pytest

from flagscale_like.cluster import parse_cluster
from flagscale_like.errors import DataError
from flagscale_like.rehearsal.chrome_trace import write_trace
from flagscale_like.rehearsal.costs import Costs, with_constants
from flagscale_like.rehearsal.matching import match
from flagscale_like.rehearsal.record import Event, RankRecord
from flagscale_like.rehearsal.replay import BUBBLE, CALLS, SKEW, replay
from tests.commands import command, invoke
from tests.harness import tiny_config, write_yaml

CLUSTER = parse_cluster("2x8xA100-80")
# Round numbers: 1e12 bytes/s of memory, 1e11 of links, 1e10 of the network; nothing else takes time.
DEVICE = replace(CLUSTER.device, hbm_gb_per_s=1000, link_gb_per_s=100, bf16_flops=1e14, host_gb_per_s=10)
ROUND = {"kernel_s": 0.0, "memory": 1.0, "link": 1.0, "network": 1.0, "latency_s": 0.0, "gemm_k": 0.0, "gemm_mn": 0.0}
COSTS = with_constants(Costs.of(replace(CLUSTER, device=DEVICE, network_gb_per_s=10)), gemm=1.0, attention=0.5, **ROUND)
MS = 1e-3


def kernel(ms, part="layer 1 forward", stream="compute"):
    return Event("compute", "aten::add", "model.py:1 forward", bytes=int(ms * 1e9), part=part, stream=stream)


def reduction(ms, group, name="tp", handle=None):
    """On links of one node: 2 (n - 1) / n of its bytes go to the neighbour."""
    nbytes = int(ms * 1e8 * len(group) / (2 * (len(group) - 1)))
    more: dict[str, Any] = {"asynchronous": handle is not None, "handle": handle, "dtype": "float32"}
    return Event("collective", "all_reduce", "model.py:2 forward", group, name, bytes=nbytes, **more)


def message(kind, ms, peer, group=(0, 1)):
    return Event(kind, f"i{kind}", "pipe.py:3 exchange", group, "pp", peer, "bfloat16", bytes=int(ms * 1e8))


def wait(handle, stream="compute"):
    return Event("wait", "wait", "model.py:4 backward", handle=handle, stream=stream)


def timeline(*events, **more):
    records = [RankRecord(rank, len(events), list(own), [0]) for rank, own in enumerate(events)]
    return replay(match(records), COSTS, **more)


def test_a_kernel_takes_the_longer_of_its_products_and_its_traffic():
    product = Event("compute", "aten::mm", "", dtype="bfloat16", shape=(1000, 1000), bytes=10**6, flops=2 * 10**9)
    assert COSTS.compute(product) == pytest.approx(2e-5)
    assert COSTS.compute(replace(product, bytes=10**9)) == pytest.approx(1e-3)
    assert COSTS.compute(replace(product, dtype="float32")) == pytest.approx(16 * 2e-5)
    assert COSTS.compute(replace(product, op="flagscale_kernels::flash_attention")) == pytest.approx(4e-5)
    assert COSTS.compute(replace(product, flops=0)) == pytest.approx(1e-6)


def test_links_are_those_of_the_ranks_that_take_part():
    inside, outside = (replace(reduction(1, (0, 1)), group=group) for group in ((0, 7), (0, 8)))
    assert COSTS.meeting(inside, 0) == pytest.approx(1 * MS)
    assert COSTS.meeting(outside, 0) == pytest.approx(10 * MS)
    gather = replace(inside, op="all_gather_into_tensor", bytes=10**8)
    assert COSTS.meeting(gather, 0) == pytest.approx(1 * MS)
    assert COSTS.meeting(message("send", 2, 8), 0) == pytest.approx(20 * MS)
    tokens = replace(inside, op="all_to_all_single", group=tuple(range(16)), bytes=16 * 10**7)
    assert COSTS.meeting(tokens, 0) == pytest.approx(8 * MS)  # half of it goes to the other node


def test_ranks_of_a_group_in_one_node_send_over_a_port_each():
    two = replace(reduction(1, (0, 8)), op="all_gather_into_tensor", bytes=10**8)
    four = replace(two, group=(0, 4, 8, 12))
    assert COSTS.meeting(two, 0) == pytest.approx(10 * MS)
    assert COSTS.meeting(four, 0) == pytest.approx(30 * MS / 2)  # 3 of 4 parts pass each node's border, over two ports


def test_a_gradient_is_added_up_by_its_product_with_apex_alone():
    where = "megatron/core/distributed/distributed_data_parallel.py:440 hook"
    adds = Event("compute", "aten::add_", where, dtype="float32", shape=(1000, 1000), bytes=10**7)
    fused = with_constants(COSTS, fused_gradients=True)
    assert COSTS.compute(adds) == pytest.approx(1e-5)
    assert fused.compute(adds) == 0
    for other in (replace(adds, shape=(1000,)), replace(adds, where="model.py:1 forward")):
        assert fused.compute(other) == COSTS.compute(other)


def test_ranks_that_share_cores_compute_slower_and_do_the_work_of_their_calls():
    calls = {("all_reduce", 2): [(0, 1 * MS), (2e8, 3 * MS)], ("message", 2): [(0, 2 * MS), (1, 2 * MS)]}
    shared = with_constants(COSTS, crowd=2.0, calls=calls)
    hidden = [kernel(1), reduction(4, (0, 1), handle=1), kernel(3), wait(1)]
    records = [RankRecord(rank, 2, hidden, [0]) for rank in (0, 1)]
    found = replay(match(records), shared)
    assert found.seconds == pytest.approx((2 + 1 + 4 + 6) * MS)  # nothing runs beside the call of 4e8 bytes
    assert found.parts[0] == {"compute": pytest.approx(8 * MS), CALLS: pytest.approx(5 * MS)}
    first, last = [kernel(5), message("send", 1, 1)], [message("receive", 1, 0), kernel(5)]
    records = [RankRecord(rank, 2, own, [0]) for rank, own in enumerate((first, last))]
    assert replay(match(records), shared).seconds == pytest.approx((10 + 2 + 10) * MS)


def test_what_is_asked_for_asynchronously_hides_behind_kernels():
    own = [kernel(1), reduction(4, (0, 1), handle=1), kernel(3), wait(1)]
    found = timeline(own, own)
    assert found.seconds == pytest.approx(5 * MS)
    assert found.parts[0]["compute"] == pytest.approx(4 * MS)
    assert found.parts[0]["tp"] == pytest.approx(1 * MS)
    blocking = [kernel(1), reduction(4, (0, 1)), kernel(3)]
    assert timeline(blocking, blocking).seconds == pytest.approx(8 * MS)


def test_collectives_of_one_group_follow_one_another_and_those_of_two_do_not():
    for other, ms in (("tp", 8), ("dp", 4)):
        own = [reduction(4, (0, 1), handle=1), reduction(4, (0, 1), other, handle=2), wait(1), wait(2)]
        assert timeline(own, own).seconds == pytest.approx(ms * MS)


def test_transfers_to_other_nodes_at_the_same_time_share_a_ranks_port():
    gather = replace(reduction(1, (0, 8), "dp", handle=1), op="all_gather_into_tensor", bytes=10**8)  # 10 ms alone
    other = replace(gather, group_name="cp", handle=2)
    late = kernel(5)
    own = [gather, late, other, wait(1), wait(2)]
    # From 5 ms on both run at half the speed: the first needs 5 ms more for its second half.
    found = replay(match([RankRecord(rank, 16, own if rank in (0, 8) else [], [0]) for rank in range(16)]), COSTS)
    assert found.seconds == pytest.approx(20 * MS)
    send, receive = (message(kind, 10, 8, (0, 8)) for kind in ("send", "receive"))
    ends = (
        [replace(send, bytes=10**8), replace(receive, bytes=10**8)],
        [replace(e, peer=0, bytes=10**8) for e in (receive, send)],
    )
    exchange = [RankRecord(rank, 16, ends[rank // 8] if rank in (0, 8) else [], [0]) for rank in range(16)]
    assert replay(match(exchange), COSTS).seconds == pytest.approx(10 * MS)  # a port sends and receives at once
    near = [replace(event, group=(0, 1)) if event.group else event for event in own]
    found = replay(match([RankRecord(rank, 2, near, [0]) for rank in range(2)]), COSTS)
    assert found.seconds == pytest.approx(6 * MS)  # links inside a node: 1 ms each


def test_a_pipeline_has_its_bubble_and_a_group_waits_for_its_slowest_rank():
    first, last = [kernel(5), message("send", 1, 1)], [message("receive", 1, 0), kernel(5)]
    found = timeline(first, last)
    assert found.seconds == pytest.approx(11 * MS)
    assert found.parts[1] == {
        "pp": pytest.approx(1 * MS),
        BUBBLE: pytest.approx(5 * MS),
        "compute": pytest.approx(5 * MS),
    }
    uneven = timeline([kernel(2), reduction(1, (0, 1))], [kernel(5), reduction(1, (0, 1))])
    assert uneven.parts[0][SKEW] == pytest.approx(3 * MS)
    assert uneven.seconds == pytest.approx(6 * MS)
    assert uneven.share("tp") == pytest.approx(1 / 6)


def test_streams_run_side_by_side_and_a_host_that_waits_holds_all_of_them_up():
    copy = Event("copy", "copy to the host", "", bytes=4 * 10**7, stream="side 1")  # 4 ms
    mark = Event("mark", "record event", "", stream="side 1", handle=9)
    assert timeline([copy, kernel(3)]).seconds == pytest.approx(4 * MS)
    assert timeline([copy, mark, wait(9), kernel(3)]).seconds == pytest.approx(7 * MS)
    assert timeline([copy, Event("host_wait", "synchronize", ""), kernel(3)]).seconds == pytest.approx(7 * MS)


def test_records_that_do_not_fit_are_not_replayed():
    with pytest.raises(DataError, match="different sizes meet"):
        timeline([reduction(1, (0, 1))], [reduction(2, (0, 1))])


def test_a_trace_has_a_process_for_each_stage_and_joins_the_kernels_of_a_part(tmp_path):
    own = [kernel(1), kernel(2), kernel(1, "layer 2 forward"), reduction(1, (0, 1))]
    found = timeline(own, own, keep_slices=True)
    assert write_trace(tmp_path / "t.json", found, {0: 0, 1: 1}) == 6
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"stage 0 (rank 0)", "stage 1 (rank 1)"}
    slices = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["pid"] == 0 and e["tid"] == 0]
    assert slices == [
        ("layer 1 forward", 0, pytest.approx(3000)),
        ("layer 2 forward", pytest.approx(3000), pytest.approx(1000)),
    ]
    assert write_trace(tmp_path / "t.json.gz", found, {0: 0, 1: 1}, kernels=True) == 8


def test_the_command_matches_and_replays_a_rank_of_each_stage(tmp_path):
    parallel = {"tp": 2, "pp": 2, "vpp": 2, "sp": True}
    file = write_yaml(tiny_config(tmp_path / "run", parallel=parallel, train__precision="bf16"), tmp_path / "x.yaml")
    arguments = ["rehearse", str(file), "--world-size", "8", "--cluster", "1x8xH100"]
    found = command(*arguments, "--ranks", "stages", "--trace", str(tmp_path / "step.json"), apart=True)
    assert found.returncode == 0, found.stderr
    assert "all operations meet; replayed on 1x8xH100: " in found.stdout
    assert "tokens/s/device, MFU" in found.stdout
    assert "bubble" in found.stdout
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 4}
    assert "the host may be too slow for it" in found.stdout  # for a model of 64 channels
    short = command(*arguments, "--ranks", "stages", "--time-only", apart=True)
    assert short.returncode == 0, short.stderr
    lines, words = found.stdout.splitlines(), short.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("all operations meet"))
    assert words[:4] == lines[first : first + 4]
    assert words[-1] == "memory was not followed (--time-only)"
    wrong = invoke([*arguments, "--time-only"])
    assert wrong.exit_code == 10
    assert "--time-only" in wrong.error
    wrong = invoke([*arguments, "--trace", str(tmp_path / "other.json")])
    assert wrong.exit_code == 10
    assert "--trace" in wrong.error
    assert "give --ranks stages (it is auto)" in wrong.error
