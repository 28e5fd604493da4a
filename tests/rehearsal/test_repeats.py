"""Passes that are run once and written down again give the record of a whole rehearsal."""

import pytest

from flagscale_like.cluster import parse_cluster
from flagscale_like.recipes.rehearse import record, rehearse, rehearsed_kind
from tests.harness import run_ranks, tiny_config

LAYOUTS = {
    "pp, recomputed": {"parallel": {"tp": 2, "sp": True, "pp": 2}, "train__recompute": "full"},
    "interleaved": {"parallel": {"pp": 2, "vpp": 2, "cp": 2}},
    "experts": {
        "parallel": {"ep": 2},
        "model__experts": {"count": 4, "top_k": 2, "ffn_hidden_size": 48},
        "model__num_layers": 1,
        "train__global_batch_size": 16,
    },
}


def all_records(configs, *, whole):
    """The records of all configurations: of whole rehearsals, or short ones."""
    place, kind, found = parse_cluster("1x4xA100-80"), rehearsed_kind("cuda"), []
    for config in configs:
        if whole:
            own = [one.record for one in rehearse(config, place, kind, world_size=4, ranks="stages")]
        else:
            own = record(config, place, kind, world_size=4)
        found.append([(one.rank, one.stage, one.step_starts, one.events) for one in own])
    return found


def whole_records(configs):
    return all_records(configs, whole=True)


def short_records(configs):
    return all_records(configs, whole=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repeats")
    configs = [
        tiny_config(folder / str(i), train__precision="bf16", checkpoint__interval=0, **changes)
        for i, changes in enumerate(LAYOUTS.values())
    ]
    (whole,), (short,) = (run_ranks(1, work, configs) for work in (whole_records, short_records))
    return dict(zip(LAYOUTS, zip(whole, short, strict=True), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_short_record_is_the_whole_one(found, name):
    for whole, short in zip(*found[name], strict=True):
        assert short[:3] == whole[:3]
        for place, (ours, theirs) in enumerate(zip(short[3], whole[3], strict=True)):
            assert ours == theirs, place
