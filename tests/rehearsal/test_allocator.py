"""The model of torch's caching allocator: its sizes, pools, splitting and joining, and what breaks a device that is full."""

import random

from flagscale_like.errors import required
from flagscale_like.rehearsal.allocator import MIB, CachingAllocator
from flagscale_like.rehearsal.memory import Allocation, Memory
from flagscale_like.rehearsal.snapshot import place


def test_small_tensors_share_segments_of_2_mib():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(1) for _ in range(4096)]
    assert {block.size for block in blocks} == {512}
    assert allocator.reserved == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved == 4 * MIB


def test_large_tensors_take_20_mib_or_a_segment_of_their_own():
    allocator = CachingAllocator()
    first, second = allocator.allocate(3 * MIB), allocator.allocate(9 * MIB)
    assert first.segment is second.segment
    assert allocator.reserved == 20 * MIB
    own = allocator.allocate(33 * MIB)
    assert own.segment.size == 34 * MIB
    assert own.size == 34 * MIB  # 1 MiB and less is not split off


def test_what_is_freed_is_joined_and_used_again_and_the_best_fit_is_taken():
    allocator = CachingAllocator()
    blocks = [required(allocator.allocate(5 * MIB), "memory") for _ in range(4)]
    assert allocator.reserved == 20 * MIB
    allocator.release(blocks[0])
    allocator.release(blocks[2])
    allocator.release(blocks[1])
    again = allocator.allocate(15 * MIB)
    assert again.address == blocks[0].address
    assert allocator.reserved == 20 * MIB


def test_holes_cost_memory_until_the_device_is_full():
    allocator = CachingAllocator(limit=60 * MIB)
    blocks = [required(allocator.allocate(20 * MIB), "memory") for _ in range(3)]
    allocator.release(blocks[0])
    allocator.release(blocks[2])
    found = allocator.allocate(40 * MIB)  # two whole segments are given back for it
    assert found is not None
    assert allocator.reserved == 60 * MIB
    assert allocator.allocate(2 * MIB) is None


def test_blocks_fill_their_segments_whatever_is_asked():
    draw, allocator, held = random.Random(1), CachingAllocator(), []
    for _ in range(3000):
        if held and draw.random() < 0.5:
            allocator.release(held.pop(draw.randrange(len(held))))
        else:
            held.append(allocator.allocate(int(2 ** draw.uniform(4, 26))))
        assert allocator.allocated == sum(block.size for block in held)
    for segment in allocator.segments.values():
        blocks = segment.blocks()
        assert sum(block.size for block in blocks) == segment.size
        assert all(not (a.free and b.free) for a, b in zip(blocks, blocks[1:], strict=False))
    for block in held:
        allocator.release(block)
    assert allocator.give_back() == allocator.peak_reserved or allocator.reserved == 0
    assert allocator.reserved == 0


def test_the_allocation_that_breaks_a_device_is_named():
    memory = Memory()
    for number, (born, died) in enumerate([(0, None), (1, 3), (2, None), (4, None)]):
        memory.allocations.append(Allocation(24 * MIB, born, "op", f"some.py:{number} f", "step", died=died))
    placed = place(memory, limit=72 * MIB)
    assert placed.broke is None
    placed = place(memory, limit=48 * MIB)
    assert placed.broke is memory.allocations[2]
    assert placed.in_use == 48 * MIB
