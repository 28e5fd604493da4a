"""Fragments: any division of a tensor into flat ranges of boxes loads into any other."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale_like.checkpoint.fragments import Fragment, copy_overlap, elements_within


@st.composite
def shapes(draw):
    return tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))


@st.composite
def divisions(draw, shape):
    """The tensor cut into shards along one dimension, and each shard into flat ranges."""
    dim = draw(st.integers(0, len(shape) - 1))
    parts = draw(st.sampled_from([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]))
    size = shape[dim] // parts
    fragments = []
    for part in range(parts):
        box = tuple(size if d == dim else n for d, n in enumerate(shape))
        offset = tuple(part * size if d == dim else 0 for d in range(len(shape)))
        cuts = sorted(draw(st.lists(st.integers(0, prod(box)), max_size=3)))
        edges = [0, *cuts, prod(box)]
        fragments += [Fragment("w", shape, offset, box, a, b) for a, b in zip(edges, edges[1:], strict=False)]
    return fragments


def elements(tensor, fragment):
    box = tensor[tuple(slice(o, o + s) for o, s in zip(fragment.offset, fragment.shape, strict=True))]
    return box.reshape(-1)[fragment.start : fragment.stop]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_division_loads_into_any_other(data):
    shape = data.draw(shapes())
    tensor = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    saved = [(f, elements(tensor, f).clone()) for f in data.draw(divisions(shape))]
    for target in data.draw(divisions(shape)):
        out = torch.full((target.numel,), -1.0)
        copied = sum(copy_overlap(source, flat, target, out) for source, flat in saved)
        assert copied == target.numel
        assert torch.equal(out, elements(tensor, target))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_boxes_cover_a_range_once_and_in_order(data):
    shape = data.draw(shapes())
    for fragment in data.draw(divisions(shape)):
        boxes = sorted(fragment.boxes(), key=lambda box: box.flat)
        assert sum(prod(box.shape) for box in boxes) == fragment.numel
        end = 0
        for box in boxes:
            assert box.flat == end
            end += prod(box.shape)


@pytest.mark.parametrize(("rows", "inside"), [(8, 12), (3, 7), (1, 1), (0, 0)])
def test_elements_beyond_a_smaller_padded_vocabulary_are_known(rows, inside):
    fragment = Fragment("w", (8, 3), (0, 0), (8, 3), 2, 14)  # rows 0 (last element) to 4 (first two)
    assert elements_within(fragment, (rows, 3)) == inside
