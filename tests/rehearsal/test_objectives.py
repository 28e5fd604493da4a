"""Objectives that read pairs, groups and conversations rehearse as they run: traffic, bytes, the passes before the step."""

from pathlib import Path

import pytest

from flagscale_like.cluster import parse_cluster
from flagscale_like.data.synthetic import ROWS, like_the_data, synthetic_dataset
from flagscale_like.recipes.rehearse import rehearse, rehearsed_kind
from flagscale_like.rehearsal.components import STATES
from flagscale_like.rehearsal.matching import match
from tests.harness import run_ranks, tiny_config
from tests.rehearsal.test_rehearsal import config_of, record_real, rehearse_as_cpu

EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 48}
GROUPS = {"objective": {"kind": "contrastive", "passages": 3}, "train__seq_length": 64}
RL = {
    "task": "rl",
    "data": {"prompts": ["not/there.jsonl"], "tokenizer": "not/there"},
    "train__global_batch_size": 8,
    "train__seq_length": 64,
    "rl": {
        "algorithm": "ppo",
        "rollout": {"samples": 4, "max_new_tokens": 16},
        "reward": {"kind": "function", "function": "x.py:f"},
        "kl": {"coefficient": 0.05, "into": "reward"},
        "critic": {"lr": 1e-3},
    },
}
# name -> (changes, ranks of the world)
CASES = {
    "dpo, adapters off": (
        {"objective": {"kind": "dpo"}, "lora": {"rank": 4}, "parallel": {"tp": 2, "sp": True, "pp": 2}},
        4,
    ),
    "dpo of experts": (
        {"objective": {"kind": "dpo"}, "model__experts": EXPERTS, "parallel": {"ep": 2}, "train__precision": "fp32"},
        2,
    ),
    "reward, interleaved": ({"objective": {"kind": "reward", "heads": 2}, "parallel": {"pp": 2, "vpp": 2}}, 2),
    "reward, adapters": ({"objective": {"kind": "reward"}, "lora": {"rank": 4}, "parallel": {"cp": 2}}, 2),
    "groups": ({**GROUPS, "parallel": {"pp": 2}}, 4),
    "task rl, with a critic": ({**RL, "parallel": {"pp": 2}}, 2),
    "packs": ({"data": {"synthetic": "conversations"}, "parallel": {"cp": 2, "pp": 2, "first_stage_layers": 1}}, 4),
}


def rehearse_objectives(folder: str) -> dict:
    """Each case in one process; what is asked of it."""
    found, cluster = {}, parse_cluster("1x8xA100-40")
    for name, (changes, world) in CASES.items():
        config = config_of({"train__precision": "bf16", "train__global_batch_size": 4, **changes}, Path(folder))
        ranks = list(rehearse(config, cluster, rehearsed_kind("cuda"), world_size=world, ranks="stages"))
        found[name] = {
            "problems": [problem.text for problem in match([one.record for one in ranks]).problems],
            "states": [({n: one.memory.after.get(n) for n in STATES}, one.planned) for one in ranks],
            "before": [{event.part for event in one.record.events[: one.record.step_starts[0]]} for one in ranks],
            "traffic": [{(e.op, e.group_name) for e in one.record.step(1) if e.group} for one in ranks],
            "forwards": [sum(_is_attention(e) for e in one.record.step(1)) for one in ranks],
        }
    return found


def _is_attention(event) -> bool:
    return event.part == "layer 4 forward" and event.op == "flagscale_kernels::flash_attention"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict:
    (found,) = run_ranks(1, rehearse_objectives, str(tmp_path_factory.mktemp("objectives")), timeout_s=400)
    return found


@pytest.mark.parametrize("name", CASES)
def test_ranks_meet_and_states_are_the_planners_to_the_byte(rehearsed, name):
    assert rehearsed[name]["problems"] == []
    for after, planned in rehearsed[name]["states"]:
        assert after == {component: getattr(planned, component) for component in STATES}


def test_the_reference_of_dpo_is_asked_before_the_first_step(rehearsed):
    assert any("layer 4 forward" in parts for parts in rehearsed["dpo, adapters off"]["before"])
    assert not any("layer 4 forward" in parts for parts in rehearsed["reward, interleaved"]["before"])


def test_groups_make_the_passes_of_the_gradient_cache_and_share_their_vectors(rehearsed):
    assert ("all_gather_into_tensor", "dp") in rehearsed["groups"]["traffic"][-1]
    assert rehearsed["groups"]["forwards"][-1] == 1 + 2  # all but the first of two micro-batches, and both again
    assert rehearsed["reward, interleaved"]["forwards"][-1] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"kind": "dpo"}, "parallel": {"pp": 2}},
        GROUPS,
    ],
    ids=["dpo", "groups"],
)
def test_a_rehearsed_objective_does_what_a_real_run_does(changes, tmp_path):
    """Two gloo ranks, and the same two rehearsed: the same traffic in the same order, and the same states."""
    changes = {"train__precision": "bf16", "model__position": {"kind": "alibi"}, **changes}
    real = run_ranks(2, record_real, str(tmp_path / "real"), changes)
    (found,) = run_ranks(1, rehearse_as_cpu, str(tmp_path / "rehearsed"), changes, 2)
    for (traffic, after, _), (traffic_r, after_r, _) in zip(real, found, strict=True):
        for step, step_r in zip(traffic, traffic_r, strict=True):
            assert step == step_r
        assert {n: after.get(n) for n in STATES} == {n: after_r.get(n) for n in STATES}


@pytest.mark.parametrize("kind", ROWS)
def test_made_up_rows_are_full_and_what_their_objective_reads(kind, tmp_path):
    objective = {"pairs": {"kind": "dpo"}, "groups": {"kind": "contrastive", "passages": 3}}.get(kind)
    changes = {"data": {"synthetic": "conversations" if kind == "conversations" else True}}
    config = tiny_config(tmp_path, **changes, **({"objective": objective} if objective else {}))
    data = synthetic_dataset(config, 3, 1)
    row, again = data[2], synthetic_dataset(config, 3, 1)[2]
    assert len(row["tokens"]) == config.train.seq_length
    assert all(row["tokens"] == again["tokens"])
    if kind != "text":
        assert len(row["documents"]) > 2
        assert row["documents"][-1] == config.train.seq_length
    if "lengths" in row:
        assert row["lengths"].sum() == config.train.seq_length  # no padding


def test_what_is_assumed_of_a_run_s_data_is_said(tmp_path):
    sources = {"data": {"sources": [{"path": str(tmp_path / "no/chat")}], "tokenizer": "x"}}
    value, line = like_the_data(tiny_config(tmp_path, **sources))
    assert value is True
    assert "no/chat is not here: its rows are taken to be text" in line
    assert like_the_data(tiny_config(tmp_path, data={"synthetic": "conversations"})) == ("conversations", "")
