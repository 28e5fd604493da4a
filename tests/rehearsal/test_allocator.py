"""The model of torch's caching allocator: its sizes, pools, splitting and joining, and what breaks a device that is full."""

import random
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from flagscale_like.cluster import GIB
from flagscale_like.errors import required
from flagscale_like.rehearsal.allocator import MIB, CachingAllocator, ExpandableSegments
from flagscale_like.rehearsal.memory import Allocation, Memory
from flagscale_like.rehearsal.rehearse import Rehearsed, growing_segments
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


def test_segments_that_grow_leave_holes_of_less_than_a_page():
    """Holes of 36 MiB that no tensor of 40 fits: the default keeps them, and pages of a growing segment go elsewhere."""
    memory = Memory()

    def allocation(nbytes: int, born: int, died: int | None = None) -> None:
        memory.allocations.append(Allocation(nbytes * MIB, born, "op", "some.py:1 f", "step", died=died))

    for number in range(8):
        allocation(76, number, died=10 + number)
    for number in range(8):
        allocation(40, 20 + number)
    found = place(memory)
    assert found.needed == 8 * 76 * MIB
    assert found.expandable == 8 * 76 // 20 * 20 * MIB + 20 * MIB  # the pages of the first eight, rounded up
    memory.given_back.append(19)
    found = place(memory)
    assert found.needed == 8 * 76 * MIB  # before the step
    assert found.allocator.reserved == 8 * 40 * MIB


def test_segments_that_grow_are_the_first_way_out_where_they_are_enough():
    def over(limit: int) -> Rehearsed:
        held: dict[str, Any] = {field.name: None for field in fields(Rehearsed)}
        held |= {"limit": limit * GIB, "placed": SimpleNamespace(expandable=38 * GIB)}
        return Rehearsed(**held)

    way_out = (
        "with segments that grow it fits (39.5 GiB): start all ranks with PYTORCH_ALLOC_CONF=expandable_segments:True"
    )
    assert growing_segments([over(39), over(38)]) == way_out
    assert growing_segments([over(39), over(37)]) == ""


def test_pages_are_those_of_what_is_in_use():
    draw, segments, held = random.Random(2), ExpandableSegments(), []
    for _ in range(3000):
        if held and draw.random() < 0.5:
            segments.release(held.pop(draw.randrange(len(held))))
        else:
            held.append(segments.allocate(int(2 ** draw.uniform(4, 26))))
        taken = {0: set(), 1: set()}
        for pool, address, size in held:
            page = (2 * MIB, 20 * MIB)[pool]
            taken[pool].update(range(address // page, (address + size - 1) // page + 1))
        assert segments.needed == len(taken[0]) * 2 * MIB + len(taken[1]) * 20 * MIB
    spans = sorted((pool, address, address + size) for pool, address, size in held)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in zip(spans, spans[1:], strict=False))
