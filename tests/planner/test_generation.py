"""The planner's line on memory while rollouts are drawn: on the layout of training, and with a whole copy on each rank."""

from dataclasses import dataclass

from flagscale_like.planner.generation import describe_generation, generation_memory
from flagscale_like.planner.layout import Layout
from tests.harness import tiny_config


@dataclass
class Rank:
    weights: float
    gradients: float = 3.0
    optimizer: float = 4.0


def test_a_whole_copy_takes_the_weights_and_the_cache_of_the_whole_model():
    arch, size = tiny_config("x").model, {"precision": "fp32", "rows": 2, "room": 100}
    cut = generation_memory(arch, Layout(tp=2, pp=2), [Rank(10.0), Rank(12.0)], **size)
    whole = generation_memory(arch, Layout(tp=2, pp=2), [Rank(10.0), Rank(12.0)], **size, whole=True)
    places = 128  # rows grow by 64
    assert [own.cache for own in whole] == [4 * 2 * 2 * 2 * places * 16 * 4] * 2  # layers, k and v, rows, heads, places
    assert [own.cache for own in cut] == [whole[0].cache / 4] * 2  # half of the layers and of the heads
    copy = 4 * arch.parameter_count(arch.padded_vocab_size())
    assert [own.weights for own in whole] == [copy + 10.0, copy + 12.0]
    assert [own.training for own in whole] == [7.0, 7.0]
    assert "generating 2 texts of 100 tokens at a time: weights" in describe_generation(whole, rows=2, room=100)
