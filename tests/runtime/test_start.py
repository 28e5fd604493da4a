"""How the ranks of one start find each other in a store that torchrun keeps over restarts."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from flagscale_like.errors import PlatformError
from flagscale_like.runtime.parallel import agree_on_a_launch


def start(store, world, *, timeout_s=20.0):
    """The names that the ranks of a start come to, each in a thread of its own."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: agree_on_a_launch(store, rank, world, timeout_s), range(world)))


def test_each_start_agrees_on_a_name_that_no_start_before_it_had():
    store = dist.HashStore()
    names = [start(store, 3) for _ in range(4)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == 4


def test_what_a_dead_rank_left_in_the_store_confirms_nothing():
    store = dist.HashStore()
    store.set("meet/1", "of a rank that died before rank 0 came")
    store.set("meet/an old name/2", "here")
    names = start(store, 3)
    assert len(set(names)) == 1
    assert names[0] != "an old name"


def test_a_rank_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set("meet/2", "dead")
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(agree_on_a_launch, store, 1, 3, 1.0)
        with pytest.raises(PlatformError, match=r"ranks \[2\] of 3 did not come within 1 s"):
            agree_on_a_launch(store, 0, 3, 1.0)
        other.result(timeout=60)
