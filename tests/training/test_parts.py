"""Parts: what a checkpoint says of them is put back, or refused with the part's name."""

import gc
from types import SimpleNamespace
from typing import cast

import pytest

from flagscale_like.config import Monitors
from flagscale_like.errors import CheckpointError
from flagscale_like.training.guard import Guard
from flagscale_like.training.parts import Parts, Report, Step
from flagscale_like.training.standard_parts import GarbageCollection

ODD = (None, [], 1, "x", {}, {"windows": 3}, {"spikes": None}, [[]])


@pytest.mark.parametrize("state", ODD, ids=repr)
def test_an_odd_state_of_a_part_is_refused_by_the_parts_name(state):
    guard = Guard(Monitors(loss={}), rewinds=0)
    saved, parts = guard.state(), Parts([guard])
    with pytest.raises(CheckpointError, match=f"no state of `{guard.name}` that can be read"):
        parts.load({guard.name: state})
    parts.load({guard.name: saved})
    assert guard.state() == saved


@pytest.mark.parametrize("frozen", [False, True], ids=["nothing", "what is loaded"])
def test_a_run_leaves_frozen_what_was_frozen_before_it(frozen):
    assert gc.get_freeze_count() == 0
    part, report = GarbageCollection(5), cast(Report, None)  # it says nothing
    first = cast(Step, SimpleNamespace(plan=SimpleNamespace(first=True, step=1)))
    try:
        if frozen:
            gc.freeze()
        before = gc.get_freeze_count()
        part.after(first, report)
        held = gc.get_freeze_count()
        assert 0 < held <= before if frozen else held > 0  # what nobody refers to any more leaves
        assert not gc.isenabled()
        part.close(None)
        assert (gc.get_freeze_count() > 0) == frozen
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
