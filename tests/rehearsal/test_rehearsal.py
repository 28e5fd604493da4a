"""Ranks that are not there take real steps: on every kind of layout, with the bytes that the planner and a real run have."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch.cuda._memory_viz as memory_viz

from flagscale_like.cluster import parse_cluster
from flagscale_like.errors import ConfigError, DoesNotFitError, RehearsalError
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.recipes.rehearse import rehearsal_config, rehearse, rehearsed_kind
from flagscale_like.rehearsal.choice import chosen_ranks
from flagscale_like.rehearsal.components import STATES, report
from flagscale_like.rehearsal.memory import Memory
from flagscale_like.rehearsal.record import RankRecord
from flagscale_like.rehearsal.recorder import Recorder
from flagscale_like.rehearsal.rehearse import Steps, group_names
from flagscale_like.rehearsal.report import as_json, describe, write
from flagscale_like.runtime.parallel import parallel_context
from tests.commands import command
from tests.harness import run_ranks, tiny_config, write_yaml

EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 48, "shared_ffn_hidden_size": 32}
TWICE = {"tp": 2, "sp": True, "pp": 2}
WIDE = {
    "model__hidden_size": 4096,
    "model__ffn_hidden_size": 14336,
    "model__num_attention_heads": 32,
    "train__seq_length": 4096,
    "train__precision": "bf16",
}
# name -> (changes of the tiny configuration, ranks of the world, the rank, kind of device)
CASES = {
    "first stage": ({"parallel": TWICE, "train__precision": "bf16"}, 8, 0),
    "last stage": ({"parallel": TWICE, "train__precision": "bf16"}, 8, 7),
    "interleaved, recomputed": (
        {"parallel": {"tp": 2, "pp": 2, "vpp": 2}, "train__recompute": "full", "train__precision": "bf16"},
        4,
        2,
    ),
    "selective": ({"train__recompute": "selective", "train__precision": "fp16"}, 2, 1),
    "context parallel, offloaded": (
        {
            "parallel": {"cp": 2, "pp": 2},
            "offload": {"share": 0.5, "min_tensor_bytes": 256},
            "train__precision": "bf16",
        },
        4,
        1,
    ),
    "all to all": ({"parallel": {"cp": 2, "cp_kind": "a2a"}, "train__precision": "bf16"}, 2, 1),
    "experts": ({"model__experts": EXPERTS, "parallel": {"ep": 2}, "train__precision": "bf16"}, 4, 3),
    "experts and tp": (
        {
            "model__experts": EXPERTS,
            "parallel": {"tp": 2, "sp": True, "ep": 2},
            "train__seq_length": 512,  # a map of more elements than are known one by one
            "train__precision": "bf16",
        },
        4,
        0,
    ),
    "adapters": ({"lora": {"rank": 4}, "train__precision": "bf16"}, 2, 0),
    "large vocabulary": (  # the output layer has a bucket to itself, whose all-gather overlaps the forward pass
        {
            "model__vocab_size": 128_000,
            "model__hidden_size": 512,
            "train__seq_length": 2048,
            "train__precision": "bf16",
        },
        2,
        0,
    ),
    # As wide as models are, so that tensors of the layers weigh more than what comes with a rank.
    "wide": ({**WIDE, "parallel": TWICE}, 8, 0),
    "wide, recomputed": ({**WIDE, "parallel": TWICE, "train__recompute": "full"}, 8, 0),
    "wide, rows cut, attention recomputed": (
        {**WIDE, "parallel": {"tp": 2, "sp": True, "cp": 2}, "train__recompute": "selective"},
        4,
        0,
    ),
    "wide experts": (
        {**WIDE, "model__experts": EXPERTS | {"ffn_hidden_size": 7168}, "parallel": {"ep": 2, "pp": 2}},
        4,
        0,
    ),
    "tied": ({"model__tie_embeddings": True, "parallel": {"pp": 2}, "train__precision": "bf16"}, 2, 1),
}


def config_of(changes: dict, folder: Path):
    layers = {} if "pp" in changes.get("parallel", {}) else {"model__num_layers": 2}
    rows = 4 if changes.get("parallel") == TWICE or "model__experts" in changes else 2
    return tiny_config(folder, **{"train__global_batch_size": rows, "checkpoint__interval": 0, **layers, **changes})


def rehearse_cases(folder: str, names: list[str]) -> dict:
    """Each case in one process; what is asked of it."""
    place_, kind, found = parse_cluster("1x8xA100-40"), rehearsed_kind("cuda"), {}
    for name in names:
        changes, world, rank = CASES[name]
        (one,) = rehearse(config_of(changes, Path(folder)), place_, kind, world_size=world, ranks=str(rank))
        events = one.record.step(-1)
        found[name] = {
            "json": as_json(one),
            "text": describe(one),
            "kinds": Counter(event.kind for event in events),
            "ops": Counter(event.op for event in events),
            "groups": {(event.op, event.group_name, event.group) for event in events if event.group},
            "parts": {event.part for event in events},
            "waits": dict(one.waits()),
            "unwaited": _unwaited(events),
            "given_back": one.timeline.given_back,
            "began": one.timeline.steps[0],
        }
        if name == "last stage":
            found[name]["files"] = [str(path) for path in write(one, Path(folder) / "out")]
    return found


def _unwaited(events) -> set:
    handles = {event.handle for event in events if event.asynchronous and event.handle}
    return handles - {event.handle for event in events if event.kind == "wait"}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("rehearsals")
    (found,) = run_ranks(1, rehearse_cases, str(folder), list(CASES), timeout_s=400)
    return found


@pytest.mark.parametrize("name", CASES)
def test_states_are_the_planners_to_the_byte(rehearsed, name):
    found = rehearsed[name]["json"]
    for component in STATES:
        assert found["after"][component] == found["planned"][component], component


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("wide")])
def test_all_tensors_at_the_peak_are_planned_within_2_percent(rehearsed, name):
    found = rehearsed[name]["json"]
    planned = sum(value for part, value in found["planned"].items() if part not in ("overhead", "host"))
    assert planned == pytest.approx(found["peak"]["total"], rel=0.02)


def test_what_building_leaves_free_is_given_back_before_the_first_step(rehearsed):
    for found in rehearsed.values():
        (tick,) = found["given_back"]
        assert 0 < tick <= found["began"]


def test_a_fused_loss_holds_what_the_planner_says(rehearsed):
    """Of two chunks: the logits of both for a moment, and the gradient of the matrix in fp32."""
    found = rehearsed["large vocabulary"]["json"]
    assert found["planned"]["logits"] == pytest.approx(found["peak"]["bytes"]["logits"], rel=0.03)


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_once_a_step_where_only_our_own_code_runs(rehearsed, name):
    ours = {where: count for (where, _), count in rehearsed[name]["waits"].items() if not where.startswith("megatron/")}
    # The sums of the step; where it is logged, the times of the copies out and in.
    allowed = {"flagscale_like/runtime/parallel.py": 1, "flagscale_like/runtime/copies.py": 2}
    for where, count in ours.items():
        assert count <= allowed.get(where.split(":")[0], 0), ours
    if (
        "experts" not in name and name != "selective"
    ):  # the counts of their tokens are read, and whether fp16 overflowed
        assert ours.keys() == {where for where, _ in rehearsed[name]["waits"]}


def test_parts_and_places_are_named(rehearsed):
    found = rehearsed["last stage"]
    assert {"layer 3 forward", "layer 4 backward", "optimizer", "loss"} <= found["parts"]
    assert not any(part.startswith("layer 1 ") for part in found["parts"])
    assert "layer 2 recompute" in rehearsed["interleaved, recomputed"]["parts"]
    assert found["ops"]["flagscale_kernels::flash_attention"]  # what runs on CUDA, and not what a CPU runs
    assert ("reduce_scatter_tensor", "dp_cp", (5, 7)) in {(op, name, group) for op, name, group in found["groups"]}
    assert found["kinds"]["send"] == found["kinds"]["receive"] == 2 * 1


def test_every_asynchronous_operation_is_waited_for(rehearsed):
    assert all(not found["unwaited"] for found in rehearsed.values())


def test_experts_get_their_even_share(rehearsed):
    """32 tokens of 2 experts each, over 2 ranks: each sends half of its 64 rows, and gets as many."""
    assert rehearsed["experts"]["ops"]["all_to_all_single"]
    assert rehearsed["experts"]["json"]["peak"]["total"] > 0


def test_offloaded_activations_leave_the_device(rehearsed):
    assert rehearsed["context parallel, offloaded"]["ops"]["copy to the host"]
    assert rehearsed["context parallel, offloaded"]["kinds"]["mark"]


def test_files_load_where_they_are_made_for(rehearsed):
    values, events, snapshot, drawing = (Path(path) for path in rehearsed["last stage"]["files"])
    assert json.loads(values.read_text())["stage"] == 1
    assert RankRecord.read(events).step(1)
    data = pickle.loads(snapshot.read_bytes())
    assert "7f0000" in memory_viz.segsum(data) or memory_viz.segsum(data)
    assert "<script" in memory_viz.trace_plot(data)
    assert drawing.read_bytes().startswith(b"\x89PNG")


def record_real(folder: str, changes: dict) -> tuple:
    """A real run of this rank under the recorder, on the CPU."""
    config = rehearsal_config(config_of(changes, Path(folder)), folder)
    with parallel_context(config.parallel) as ctx:
        record, memory = RankRecord(ctx.rank, ctx.world_size), Memory()
        with Recorder(record, device="cpu", memory=memory) as recorder:
            recorder.name_groups(group_names(ctx))
            pretrain(config, ctx, parts=lambda engine: [Steps(recorder, memory, engine)])
        return _traffic(record), report(memory).after, report(memory).peak.bytes


def rehearse_as_cpu(folder: str, changes: dict, world: int) -> list[tuple]:
    config = config_of(changes, Path(folder))
    found = rehearse(config, parse_cluster("1x8xA100-40"), rehearsed_kind("cpu"), world_size=world, ranks="all")
    return [(_traffic(one.record), one.memory.after, one.memory.peak.bytes) for one in found]


def _traffic(record: RankRecord) -> list:
    """The traffic of both steps. Objects that the ranks exchange, as at the first sum of a run, are not rehearsed."""
    kinds, objects = ("collective", "send", "receive", "wait"), "all_gather"
    return [
        [
            (e.kind, e.op, e.where, e.group, e.group_name, e.peer, e.dtype, e.shape, e.bytes)
            for e in step
            if e.kind in kinds and e.op != objects
        ]
        for step in (record.step(0), record.step(1))
    ]


def test_a_rehearsal_is_what_a_real_run_does(tmp_path):
    """Two gloo ranks, and the same two rehearsed: the same traffic in the same order, and the same bytes alive."""
    # Attention with positions that are slopes is our operator on a CPU as well, and not torch's own kernel.
    changes = {"parallel": {"pp": 2}, "train__precision": "bf16", "model__position": {"kind": "alibi"}}
    real = run_ranks(2, record_real, str(tmp_path / "real"), changes)
    (rehearsed,) = run_ranks(1, rehearse_as_cpu, str(tmp_path / "rehearsed"), changes, 2)
    for (traffic, after, peak), (traffic_r, after_r, peak_r) in zip(real, rehearsed, strict=True):
        for step, step_r in zip(traffic, traffic_r, strict=True):
            for place, (one, other) in enumerate(zip(step, step_r, strict=False)):
                assert one == other, f"event {place} of {len(step)} and {len(step_r)}"
            assert len(step) == len(step_r)
        for component in (*STATES, "activations"):
            assert after.get(component) == after_r.get(component), component
            assert peak.get(component) == peak_r.get(component), component


def test_what_does_not_fit_is_said_with_a_way_out(tmp_path):
    changes = {
        "model__hidden_size": 8192, "model__ffn_hidden_size": 28672, "model__num_attention_heads": 64,
        "model__num_query_groups": 8, "model__num_layers": 4, "train__seq_length": 8192, "train__precision": "bf16",
        "parallel": {"tp": 2, "sp": True}, "train__micro_batch_size": 4, "train__global_batch_size": 4,
    }  # fmt: skip
    path = write_yaml(config_of(changes, tmp_path), tmp_path / "big.yaml")
    done = command("rehearse", str(path), "--world-size", "2", "--cluster", "1x2xA100-40", apart=True)
    assert done.returncode == DoesNotFitError.exit_code, done.stderr
    assert "stage 0 (rank 0) does not fit A100-40: " in done.stderr
    assert "the nearest change that fits: train." in done.stderr
    assert "(rehearsed: fits, " in done.stderr
    assert "rehearsing train." in done.stdout  # a change is tried before it is proposed


def test_bad_input(tmp_path):
    config = tiny_config(tmp_path, parallel__tp=2)
    for asked, words in {"0,9": "no rank 9 among 8", "first": "write auto"}.items():
        with pytest.raises(ConfigError, match=words):
            chosen_ranks(config, 8, asked)
    with pytest.raises(ConfigError, match="world size"):
        chosen_ranks(config, 7)
    with pytest.raises(ConfigError, match="no platform is called so"):
        rehearsed_kind("gpux")


def operators_without_fakes() -> list[str]:
    """What is said of an operator that has no implementation without data, and of one whose output's shape is data."""
    import torch

    from flagscale_like.rehearsal.device import DEVICE, RehearsedPlatform
    from flagscale_like.rehearsal.world import rehearsed_rank

    @torch.library.custom_op("tests::without_fake", mutates_args=())
    def without_fake(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    cluster, said = parse_cluster("1x8xA100-40"), []
    platform = RehearsedPlatform(rehearsed_kind("cuda"), cluster.device)
    config = tiny_config("unused")
    with rehearsed_rank(platform, config.parallel, 0, 1), Recorder(RankRecord(0, 1), device=DEVICE):
        x = torch.ones(4, device=DEVICE)
        for function in (without_fake, torch.nonzero):
            try:
                function(x)
            except RehearsalError as error:
                said.append(str(error))
    return said


def test_operators_that_cannot_be_rehearsed_are_named():
    (said,) = run_ranks(1, operators_without_fakes)
    assert "tests.without_fake" in said[0]
    assert "register_fake" in said[0]
    assert "nonzero" in said[1]
    assert "values decide the shape" in said[1]
