"""Copies to host memory see what was enqueued before them, and nothing of what comes after."""

import pytest
import torch

from flagscale_like.runtime.host_copy import HostCopies
from flagscale_like.runtime.platforms.cpu import CpuPlatform
from flagscale_like.runtime.platforms.cuda import CudaPlatform

CUDA = pytest.param(CudaPlatform(), marks=pytest.mark.gpu, id="cuda")


@pytest.mark.parametrize("platform", [pytest.param(CpuPlatform(), id="cpu"), CUDA])
def test_a_round_of_copies_is_not_torn_by_the_update_that_follows_and_reuses_its_buffers(platform):
    copies = HostCopies(platform)
    source = torch.zeros(4_000_003, device=platform.device)
    addresses = set()
    for round_ in range(1, 4):
        source.fill_(round_)
        copies.begin()
        copied = copies.copy("weights", source)
        copies.end()
        copies.hold_compute()
        source.fill_(-1.0)  # the update
        copies.wait()
        assert torch.equal(copied, torch.full((4_000_003,), float(round_)))
        assert copied.is_pinned() == platform.pins_memory
        addresses.add(copied.data_ptr())
    assert len(addresses) == 1


def test_another_shape_gets_another_buffer():
    copies = HostCopies(CpuPlatform())
    first = copies.copy("weights", torch.ones(3))
    second = copies.copy("weights", torch.ones(2, 2))
    assert first.tolist() == [1, 1, 1]
    assert second.shape == (2, 2)
