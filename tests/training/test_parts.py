"""Parts: what a checkpoint says of them is put back, or refused with the part's name."""

import pytest

from flagscale_like.config import Monitors
from flagscale_like.errors import CheckpointError
from flagscale_like.training.guard import Guard
from flagscale_like.training.parts import Parts

ODD = (None, [], 1, "x", {}, {"windows": 3}, {"spikes": None}, [[]])


@pytest.mark.parametrize("state", ODD, ids=repr)
def test_an_odd_state_of_a_part_is_refused_by_the_parts_name(state):
    guard = Guard(Monitors(loss={}), rewinds=0)
    saved, parts = guard.state(), Parts([guard])
    with pytest.raises(CheckpointError, match=f"no state of `{guard.name}` that can be read"):
        parts.load({guard.name: state})
    parts.load({guard.name: saved})
    assert guard.state() == saved
