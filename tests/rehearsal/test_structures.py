"""The collectives, sends and receives of every example's ranks meet, and those of every layout that other tests train on.

The layers are narrow and few, the rows short (tests/rehearsal/layouts.py): what ranks ask of each other stays.
"""

import gc

import pytest

from flagscale_like.cluster import parse_cluster
from flagscale_like.config import RunConfig
from flagscale_like.recipes.rehearse import rehearse, rehearsed_kind
from flagscale_like.rehearsal.matching import match
from tests.harness import run_ranks
from tests.rehearsal.layouts import example, examples, in_tables, small, stated_world, tiny

# One of each kind of example, and one layout of each kind of exchange, on every change; the rest with `make soak`.
SOON = (
    "aquila2/34b.yaml",  # tp, sp, pp
    "long_context/aquila2-34b-16k.yaml",  # interleaved, cp
    "sft/aquilachat2-34b-16k.yaml",  # full recompute, offload
    "moe/mixtral-8x7b.yaml",  # interleaved, ep
    "embed/tiny.yaml",
    "preferences/dpo.yaml",
    "rl/poem/rounds.yaml",  # a reward model that each round names, guarded
)

PARTS = 8  # of the layouts in the tests' tables, so that each part ends within ten minutes


def problems_of(cases: list[tuple[str, RunConfig, int, str]]) -> dict[str, list[str]]:
    """What does not fit of each configuration on its world, with a record of the ranks asked for; all in one process."""
    gc.freeze()  # what is imported is not looked through after each rank
    found = {}
    for name, config, world, ranks in cases:
        cluster = parse_cluster(f"{-(-world // 8)}x{min(world, 8)}xA100-40")
        records = [
            one.record
            for one in rehearse(config, cluster, rehearsed_kind("cuda"), world_size=world, ranks=ranks, steps=1)
        ]
        assert all(record.events for record in records)
        found[name] = [problem.text for problem in match(records).problems]
    return found


def check(cases: list[tuple[str, RunConfig, int, str]], timeout_s: float) -> None:
    (found,) = run_ranks(1, problems_of, cases, timeout_s=timeout_s)
    assert len(found) == len(cases)
    assert {name: problems for name, problems in found.items() if problems} == {}


def smallest(name: str, config: RunConfig) -> tuple[str, RunConfig, int, str]:
    made = small(config)
    return name, made, made.parallel.smallest_world, "stages"


def test_one_example_of_each_kind_meets():
    check([smallest(name, example(examples()[name])) for name in SOON], 300)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", examples())
def test_an_example_meets_on_its_smallest_world(name):
    check([smallest(name, example(examples()[name]))], 590)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name, path in examples().items() if (world := stated_world(path)) is not None]
)
def test_an_example_meets_on_the_world_that_it_states(name, world):
    """With all chunks of its stages, and a record of each stage."""
    config = example(examples()[name])
    check([(name, small(config, world, config.parallel.vpp), world, "stages")], 590)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_layout_of_the_tests_meets_with_a_record_of_every_rank(part):
    layouts = list(in_tables())
    assert len(layouts) > 60
    configs = {name: tiny(changes) for name, changes in layouts[part::PARTS]}
    check([(name, config, config.parallel.smallest_world, "all") for name, config in configs.items()], 590)
