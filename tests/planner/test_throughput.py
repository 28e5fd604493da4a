"""The planner's time of a step against published rows, and part by part."""

from dataclasses import replace

import pytest

from flagscale_like.arch import ModelArch
from flagscale_like.cluster import parse_cluster
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.published import BAICHUAN_7B, GPT3_H100, KORTHIKANTI_2022, NARAYANAN_2021
from flagscale_like.planner.throughput import AMPERE, PARTS_OF_STEP, Software, gemm_seconds, step_time

ROWS = [*NARAYANAN_2021, *KORTHIKANTI_2022, BAICHUAN_7B, *GPT3_H100]
CLUSTER = parse_cluster("2x8xA100-80")
SHAPE = Shape.gpt(layers=24, hidden=2048, heads=16)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_published_rows_are_reproduced_within_10_percent(row):
    assert row.ours() == pytest.approx(row.figure, rel=0.10)


def test_flops_a_token_are_the_archs_own():
    arch = ModelArch(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
        vocab_size=250,
    )
    assert Shape.of(arch).model_flops(10, 32) == pytest.approx(10 * arch.flops_per_token(32))


def test_narayanans_flops_formula_is_the_models_with_layers_counted_twice_forward():
    """Their equation 3: 96 B s l h² (1 + s/6h + V/16lh)."""
    layers, h, v, s, b = 96, 12288, 51200, 2048, 1536
    formula = 96 * b * s * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))
    shape = Shape.gpt(layers=layers, hidden=h, heads=96)
    assert shape.model_flops(b * s, s, recompute_layers=True) == pytest.approx(formula)


def test_the_parts_of_a_step_add_up():
    time = step_time(SHAPE, Layout(tp=2, pp=4, dp=2, num_microbatches=8), CLUSTER, seq_length=1024)
    assert sum(getattr(time, part) for part in PARTS_OF_STEP) == pytest.approx(time.seconds)
    assert time.tokens == 2 * 8 * 1024


def test_context_parallelism_shares_the_work_and_adds_its_traffic():
    layout = Layout(dp=2, num_microbatches=4)
    plain = step_time(SHAPE, layout, CLUSTER, seq_length=16384)
    gather = step_time(SHAPE, replace(layout, cp=2), CLUSTER, seq_length=16384)
    a2a = step_time(SHAPE, replace(layout, cp=2, cp_kind="a2a"), CLUSTER, seq_length=16384)
    assert gather.compute == pytest.approx(plain.compute / 2, rel=0.1)
    assert gather.compute == a2a.compute
    assert (plain.cp, plain.tokens) == (0.0, gather.tokens)
    assert 0 < a2a.cp < gather.seconds
    assert sum(getattr(gather, part) for part in PARTS_OF_STEP) == pytest.approx(gather.seconds)
    # The keys and values of 8 ranks, and of 2: a rank receives the more, and computes a quarter.
    wide = step_time(SHAPE, replace(layout, cp=8), CLUSTER, seq_length=16384)
    assert gather.cp < wide.cp < 2.5 * gather.cp
    again = step_time(SHAPE, replace(layout, cp=2, recompute="full"), CLUSTER, seq_length=16384)
    assert again.cp + again.recompute - plain.compute / 2 / 4 > 0


def test_the_bubble_is_the_ideal_share_and_interleaving_divides_it():
    plain = step_time(SHAPE, Layout(pp=4, num_microbatches=8), CLUSTER, seq_length=1024)
    half = step_time(SHAPE, Layout(pp=4, vpp=2, num_microbatches=8), CLUSTER, seq_length=1024)
    assert half.bubble == pytest.approx(plain.bubble / 2)
    even = replace(SHAPE, vocab=1e-9)  # nothing but layers
    alone = step_time(even, Layout(pp=4, num_microbatches=8), CLUSTER, seq_length=1024)
    assert alone.bubble / (alone.compute + alone.tp) == pytest.approx(3 / 8, rel=0.01)


def test_recompute_costs_a_forward_pass_and_offload_only_what_does_not_hide():
    layout = Layout(num_microbatches=4)
    plain = step_time(SHAPE, layout, CLUSTER, seq_length=1024)
    full = step_time(SHAPE, replace(layout, recompute="full"), CLUSTER, seq_length=1024)
    assert 0.25 < full.recompute / plain.compute < 0.4
    second = CLUSTER.device.host_gb_per_s * 1e9
    one_pass = (plain.compute + plain.tp) / 4
    hidden = step_time(SHAPE, layout, CLUSTER, seq_length=1024, offloaded_bytes=(0.9 * one_pass * second,))
    shown = step_time(SHAPE, layout, CLUSTER, seq_length=1024, offloaded_bytes=(1.5 * one_pass * second,))
    assert hidden.offload == 0
    assert shown.offload == pytest.approx(4 * 0.5 * one_pass)


def test_traffic_over_a_slower_network_takes_longer():
    layout = Layout(tp=1, dp=16)
    fast = step_time(SHAPE, layout, CLUSTER, seq_length=1024, software=Software(overlap_dp=False))
    slow = step_time(
        SHAPE, layout, replace(CLUSTER, network_gb_per_s=2.5), seq_length=1024, software=Software(overlap_dp=False)
    )
    assert slow.dp == pytest.approx(10 * fast.dp, rel=0.05)


def test_a_sliding_window_saves_the_attention_that_lies_outside_it():
    b, s, w, n, d, layers, m = 2, 8192, 2048, 32, 128, 4, 3
    whole = Shape(layers=layers, hidden=4096, heads=n, groups=8, head_dim=d, ffn=11008, vocab=32000)
    layout = Layout(micro_batch_size=b, num_microbatches=m)
    times = [step_time(replace(whole, window=window), layout, CLUSTER, seq_length=s) for window in (None, w, s, 2 * s)]
    # A query sees at most w keys: w (w + 1) / 2 pairs of the first w queries, and w of each of the others. A forward pass
    # has two products of 2 d FLOPs a pair, a backward pass five.
    pairs = n * b * ((s * s) / 2 - (w * w / 2 + (s - w) * w))
    saved = layers * m * (4 + 10) * d * pairs / (312e12 * AMPERE.attention)
    assert times[0].compute - times[1].compute == pytest.approx(saved, rel=1e-9)
    assert times[0].seconds == times[2].seconds == times[3].seconds


def test_logits_that_are_computed_twice_cost_one_more_product():
    layout = Layout(micro_batch_size=2, num_microbatches=3)
    once, twice = (
        step_time(SHAPE, layout, CLUSTER, seq_length=1024, software=Software(logits_twice=logits_twice))
        for logits_twice in (False, True)
    )
    product = gemm_seconds(2048, SHAPE.vocab, SHAPE.hidden, CLUSTER.device, AMPERE)
    assert twice.compute - once.compute == pytest.approx(3 * product)
