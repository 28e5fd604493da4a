"""What `plan` says of its own prediction: the nearest published row, and where the plan leaves the range of the rows."""

from dataclasses import replace

import pytest

from flagscale_like.arch import ModelArch
from flagscale_like.cluster import parse_cluster
from flagscale_like.planner.evidence import describe_evidence, distance
from flagscale_like.planner.layout import Layout
from flagscale_like.planner.published import AQUILA2_34B, BAICHUAN_7B, KORTHIKANTI_2022, NARAYANAN_2021
from flagscale_like.planner.search import Goal, evaluate
from tests.commands import invoke
from tests.harness import REPOSITORY

BAICHUAN_13B = ModelArch(
    num_layers=40, hidden_size=5120, num_attention_heads=40, ffn_hidden_size=13696, vocab_size=64000
)
A100 = parse_cluster("1x8xA100-80")


def evidence(layout, cluster=A100, arch=BAICHUAN_13B, seq_length=4096, batch=1024):
    goal = Goal(arch=arch, seq_length=seq_length, global_batch_size=batch)
    return describe_evidence(evaluate(goal, layout, cluster), goal, cluster).splitlines()


def test_an_mfu_above_all_that_is_published_is_said_with_the_row_that_is_highest():
    nearest, outside = evidence(Layout(tp=2, dp=4, sp=True, num_microbatches=256))
    assert nearest.startswith("evidence: the nearest of 20 published rows is Baichuan-7B on 126x8xA800")
    assert "MFU 58.3%" in nearest
    assert outside.startswith("outside of the 18 fitted rows: MFU 6")
    assert "(the highest published is 56.3%, 1T, sp + selective)" in outside
    assert "extrapolation" in outside


def test_a_plan_inside_the_rows_has_its_nearest_row_and_no_more():
    arch = BAICHUAN_13B.model_copy(update={"num_layers": 60, "hidden_size": 6144, "num_attention_heads": 48})
    cluster = parse_cluster("64x8xA100-40")
    line, outside = evidence(AQUILA2_34B.layout, cluster, arch)
    assert "Aquila2-34B" in line
    assert "MFU 46.2%" in line
    assert "recompute none (in no row)" in outside
    inside = replace(AQUILA2_34B.layout, recompute="selective")
    assert len(evidence(inside, cluster, arch, seq_length=2048)) == 1


@pytest.mark.parametrize(
    ("layout", "seq_length", "part"),
    [
        (Layout(tp=2, cp=2, dp=2, sp=True, num_microbatches=512), 4096, "context parallelism (in no row)"),
        (Layout(tp=8, num_microbatches=1024, offload=(0.5,)), 4096, "offload (in no row)"),
        (Layout(tp=8, num_microbatches=1024), 8192, "tokens a sequence 8,192 (2,048)"),
    ],
    ids=["context parallelism", "offload", "long sequences"],
)
def test_what_no_row_has_is_named(layout, seq_length, part):
    assert part in evidence(layout, seq_length=seq_length)[-1]


def test_devices_without_a_published_row_have_no_evidence():
    unknown = replace(A100, device=replace(A100.device, name="some card", efficiency="unknown"))
    (line,) = evidence(Layout(tp=8, num_microbatches=1024), unknown)
    assert line.startswith("evidence: none; no step time is published")


@pytest.mark.parametrize(
    "row", [*NARAYANAN_2021, *KORTHIKANTI_2022, BAICHUAN_7B, AQUILA2_34B], ids=lambda row: row.name
)
def test_a_row_is_nearest_to_itself_and_its_published_mfu_follows_from_its_figure(row):
    assert distance(row, row.shape, row.layout, row.seq_length) == 0
    assert row.mfu / row.plan().mfu == pytest.approx(
        row.ours() / row.figure if row.unit == "seconds" else row.figure / row.ours()
    )


def test_published_figures_are_the_papers():
    """Korthikanti et al. 2022, table 5: model FLOPs utilisation of 175B and 1T; Baichuan-7B's card: 58.3 %."""
    found = {row.name: row.mfu for row in [*KORTHIKANTI_2022, BAICHUAN_7B]}
    assert found["175B, sp + selective"] == pytest.approx(0.514, abs=0.002)
    assert found["1T, sp + selective"] == pytest.approx(0.563, abs=0.002)
    assert found["Baichuan-7B"] == pytest.approx(0.583, abs=0.001)


def test_plan_prints_it():
    found = invoke(["plan", str(REPOSITORY / "examples/baichuan/13b.yaml"), "--cluster", "1x8xA100-80", "--top", "1"])
    assert found.exit_code == 0, found.error
    assert "evidence: the nearest of 20 published rows" in found.printed
    assert "outside of the 18 fitted rows: MFU" in found.printed
