"""Write the measured-against-published tables of docs/planner.md, and its plots.

    python -m benchmarks.planner.report [--check]

The text between the marks `<!-- tables -->` and `<!-- end -->` is replaced. --check writes nothing, and fails if the page
differs from what the code computes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flagscale_like.arch import ModelArch
from flagscale_like.cluster import GIB, parse_cluster, with_devices
from flagscale_like.errors import ConfigError
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.published import (
    AQUILA2_34B,
    BAICHUAN_7B,
    EXPERTS_H100,
    GPT3_H100,
    KORTHIKANTI_2022,
    LLAMA3_H100,
    LLAMA3_PRODUCTION,
    NARAYANAN_2021,
    Row,
)
from flagscale_like.planner.saved import FUSED, Operators, layer_bytes
from flagscale_like.planner.search import Goal, Ranking, evaluate, rank_layouts

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- tables -->", "<!-- end -->"

AQUILA2 = {
    "7B": ModelArch(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=100008),
    "34B": ModelArch(
        num_layers=60,
        hidden_size=6144,
        num_attention_heads=48,
        num_query_groups=8,
        ffn_hidden_size=24576,
        vocab_size=100008,
    ),
    "70B": ModelArch(
        num_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        vocab_size=100008,
    ),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def activation_table() -> str:
    """Korthikanti et al. 2022, table 2: bytes a layer in units of s b h, for their 22B, 175B, 530B and 1T models."""
    models = {"22B": (6144, 64, 4), "175B": (12288, 96, 1), "530B": (20480, 128, 1), "1T": (25600, 160, 1)}
    s, t, rows = 2048, 8, []
    for name, (h, a, b) in models.items():
        share = 5 * a * s / h
        for label, sp, recompute, formula in (
            ("tensor parallel", False, "none", 10 + 24 / t + share / t),
            ("+ sequence parallel", True, "none", (34 + share) / t),
            ("+ selective recompute", False, "selective", 10 + 24 / t),
            ("+ both", True, "selective", 34 / t),
            ("full recompute", False, "full", 2.0),
        ):
            shape = Shape.gpt(layers=1, hidden=h, heads=a)
            layout = Layout(tp=t, sp=sp, micro_batch_size=b, recompute=recompute)
            ours = layer_bytes(shape, layout, s, 2, FUSED) / (s * b * h)
            rows.append((name, label, f"{formula:.3f}", f"{ours:.3f}"))
    return markdown(("model", "", "theirs, bytes / sbh", "ours"), rows)


def throughput_table(rows: Sequence[Row], unit: str, digits: int) -> str:
    scale = 100 if unit == "MFU %" else 1
    lines = []
    for row in rows:
        ours, theirs = row.ours() * scale, row.figure * scale
        lines.append(
            (
                row.name,
                row.layout.describe(),
                row.cluster,
                f"{theirs:.{digits}f}",
                f"{ours:.{digits}f}",
                f"{ours / theirs - 1:+.1%}",
            )
        )
    return markdown(("model", "layout", "cluster", f"published, {unit}", "planned", "difference"), lines)


def experts_table() -> str:
    """Mixtures of experts on H100, TFLOP/s of Mixtral and tokens/s of the others."""
    lines = []
    for row in EXPERTS_H100:
        time, unit = row.plan(), "TFLOP/s" if row.unit == "model flops" else "tokens/s"
        lines.append(
            (
                row.name,
                row.precision,
                row.layout.describe(),
                row.cluster,
                f"{row.figure:,.0f} {unit}",
                f"{row.ours():,.0f}",
                f"{row.ours() / row.figure - 1:+.0%}",
                f"{time.ep / time.seconds:.0%}",
            )
        )
    header = ("model", "precision", "layout", "cluster", "published, a GPU", "planned", "difference", "ep, of the step")
    return markdown(header, lines)


def aquila_table(size: str, cluster: str, batch: int, published: tuple[int, int, int], max_vpp: int | None) -> str:
    """The five fastest layouts, one a (tp, pp, micro-batch), and the published one with its place."""
    goal = Goal(arch=AQUILA2[size], seq_length=4096, global_batch_size=batch)
    ranking: Ranking = rank_layouts(goal, parse_cluster(cluster), max_vpp=max_vpp)
    seen, lines = set(), []
    for plan in ranking.plans:
        layout = plan.layout
        if layout.last_stage_layers:  # the published layouts have equal stages, and are compared with such
            continue
        key = (layout.tp, layout.pp, layout.micro_batch_size)
        if key in seen:
            continue
        seen.add(key)
        is_published = key == published
        if len(seen) > 5 and not is_published:
            continue
        lines.append(
            (
                f"{len(seen)}" + (" (published)" if is_published else ""),
                layout.describe(),
                f"{plan.time.tokens_per_s_per_device:,.0f}",
                f"{plan.time.mfu:.1%}",
                f"{plan.peak_bytes / GIB:.1f}",
                ranking.why(plan),
            )
        )
    return markdown(("place", "layout", "tokens/s/GPU", "MFU", "GiB", "why"), lines)


def unfused_memory(size: str, cluster: str, layout: Layout) -> str:
    """What a layout needs with operators that save what plain autograd saves."""
    goal = Goal(arch=AQUILA2[size], seq_length=4096, global_batch_size=1, ops=Operators())
    return f"{evaluate(goal, layout, parse_cluster(cluster)).peak_bytes / GIB:.1f} GiB"


def tables() -> str:
    seventy = Layout(tp=4, pp=2, dp=96, sp=True, num_microbatches=11)
    return "\n\n".join(
        [
            "### Activation memory (Korthikanti et al. 2022, table 2)\n\n" + activation_table(),
            "### Throughput of GPT models on A100-80 (Narayanan et al. 2021, table 1), fitted\n\n"
            + throughput_table(NARAYANAN_2021, "TFLOP/s/GPU", 0),
            "### Step time on A100-80 (Korthikanti et al. 2022, table 5), fitted\n\n"
            + throughput_table(KORTHIKANTI_2022, "s", 2),
            "### Models with fused attention on A800 and A100-40, not fitted\n\n"
            + throughput_table([BAICHUAN_7B], "TFLOP/s/GPU", 0)
            + "\n\n"
            + throughput_table([AQUILA2_34B], "tokens/s/GPU", 0),
            "### GPT-3 175B on H100 (Megatron-LM's README)\n\n" + throughput_table(GPT3_H100, "MFU %", 1),
            "### Llama 3 on H100 with context parallelism (NVIDIA's dgxc-benchmarking), not fitted\n\n"
            + throughput_table(LLAMA3_H100, "s", 2),
            "### Llama 3's production run (Dubey et al. 2024, table 4), not fitted\n\n"
            + throughput_table(LLAMA3_PRODUCTION, "TFLOP/s/GPU", 0),
            "### Mixtures of experts on H100, not fitted\n\n" + experts_table(),
            "### Aquila2-34B on 512 A100-40, batch 1024, without interleaving\n\n"
            + aquila_table("34B", "64x8xA100-40", 1024, (4, 4, 1), 1),
            "### The same with interleaving\n\n" + aquila_table("34B", "64x8xA100-40", 1024, (4, 4, 1), None),
            "### Aquila2-70B on 768 A800, batch 1056, without interleaving\n\n"
            + aquila_table("70B", "96x8xA800", 1056, (8, 4, 2), 1)
            + f"\n\nThe first of these needs {unfused_memory('70B', '96x8xA800', seventy)} with operators that save what "
            + "plain autograd saves (`Operators()`), of 77.6 usable.",
        ]
    )


def plots() -> None:
    """Tokens/s a GPU, and the best layouts' MFU, from 8 to 16,384 H100."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    base = parse_cluster("1x8xH100")
    for name, arch in AQUILA2.items():
        goal = Goal(arch=arch, seq_length=4096, global_batch_size=4096)
        points = []
        for power in range(3, 15):
            try:
                best = rank_layouts(goal, with_devices(base, 1 << power), misfits=0).plans[0]
            except ConfigError:
                continue  # too few devices for the model
            points.append((1 << power, best.time.tokens_per_s_per_device, best.time.mfu * 100))
        gpus, tokens, mfu = zip(*points, strict=True)
        axes[0].plot(gpus, tokens, "o-", label=f"Aquila2-{name}", markersize=4)
        axes[1].plot(gpus, mfu, "o-", label=f"Aquila2-{name}", markersize=4)
    for axis, label in zip(axes, ("tokens/s/GPU", "MFU, %"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("H100 GPUs, 4096 sequences of 4096 tokens a step")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    (DOCS / "images").mkdir(exist_ok=True)
    figure.savefig(DOCS / "images" / "planned_scaling.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    page = DOCS / "planner.md"
    old = page.read_text(encoding="utf-8")
    head, _, rest = old.partition(BEGIN)
    tail = rest.partition(END)[2]
    new = f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"
    if check:
        sys.exit(None if new == old else f"{page} is not what the code gives: run python -m benchmarks.planner.report")
    page.write_text(new, encoding="utf-8")
    plots()


if __name__ == "__main__":
    main()
