"""Replays published runs: the step our software would take on their clusters, beside the formulas and what was published.

    python -m benchmarks.replay_published [ROW]... [--list] [--keep FOLDER] [--out FILE.json]

Each row's stages are rehearsed in a process of its own, without memory. --keep leaves the record of each stage in a
folder, and takes it from there where it is: a row can be made in pieces, and replaying with other constants takes
seconds. The rows are those of planner/published.py whose models can be built. GPT's MLP is built gated, of 8/3 h in the
place of one of 4 h, which has the same products.

What software of the time did otherwise than ours is added by the planner's formulas: attention with its scores in memory, and
data-parallel traffic beside which nothing is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.planner.report import AQUILA2, markdown
from flagscale_like.arch import ModelArch
from flagscale_like.cluster import parse_cluster
from flagscale_like.config import RunConfig
from flagscale_like.planner import published as rows
from flagscale_like.planner.layout import Shape
from flagscale_like.planner.published import Row

RESULTS = Path(__file__).parent / "results" / "replay_published.json"


def gpt(shape: Shape) -> ModelArch:
    """A GPT whose MLP is gated, with channels that 8 ranks divide."""
    return ModelArch(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=round(shape.hidden / 3) * 8,
        vocab_size=shape.vocab,
    )


BAICHUAN = ModelArch(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=64000)
MODELS: list[tuple[Row, ModelArch]] = [
    (rows.BAICHUAN_7B, BAICHUAN),
    (rows.AQUILA2_34B, AQUILA2["34B"]),
    *((row, gpt(row.shape)) for row in rows.GPT3_H100),
    *((row, rows.LLAMA3_70B if "70B" in row.name else rows.LLAMA3_405B) for row in rows.LLAMA3_H100),
    *((row, rows.LLAMA3_405B) for row in rows.LLAMA3_PRODUCTION),
    (rows.EXPERTS_H100[0], rows.MIXTRAL_8X7B),
    *((row, gpt(row.shape)) for row in (*rows.NARAYANAN_2021, *rows.KORTHIKANTI_2022)),
]


def config_of(row: Row, arch: ModelArch) -> RunConfig:
    """The run of a row, whose logits are computed once. A last stage with fewer layers has as many as the others."""
    layout = row.layout
    if layout.vpp > 1 and layout.first_stage_layers:  # stages are of one length where they have chunks
        layout = replace(layout, first_stage_layers=None, last_stage_layers=None)
        each = layout.pp * layout.vpp
        arch = arch.model_copy(update={"num_layers": -(-arch.num_layers // each) * each})
    names = ("tp", "pp", "vpp", "cp", "ep", "sp", "first_stage_layers", "last_stage_layers")
    parallel = {name: value for name in names if (value := getattr(layout, name)) is not None}
    batch = layout.dp * layout.num_microbatches * layout.micro_batch_size
    train: dict[str, Any] = {"steps": 2, "micro_batch_size": layout.micro_batch_size, "global_batch_size": batch}
    train |= {"seq_length": row.seq_length, "precision": "bf16", "recompute": layout.recompute}
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "model": arch.model_dump() | {"max_position_embeddings": row.seq_length},
            "parallel": parallel,
            "train": train,
            "optimizer": {"lr": 1e-4, "warmup_steps": 0},
            "data": {"synthetic": True},
            "kernels": {"linear_cross_entropy": "off"},
        }
    )


def published_seconds(row: Row) -> float:
    """Seconds of the published step."""
    return row.figure if row.unit == "seconds" else row.plan().seconds * row.ours() / row.figure


def of_its_time(row: Row) -> dict[str, float]:
    """Seconds of a step that the row's software took longer than ours does, by the formulas."""
    fused = replace(row, shape=replace(row.shape, flash=True, dropout=False))
    today = replace(fused, today=True)
    found = {"scores in memory": (row, fused), "traffic of its time": (fused, today)}
    return {name: more.plan().seconds - less.plan().seconds for name, (more, less) in found.items() if more != less}


def records_of(row: Row, arch: ModelArch, number: int, keep: Path | None) -> tuple[list[Any], float]:
    """A record of each stage, and the seconds that the rehearsals took."""
    from flagscale_like.recipes.rehearse import record, rehearsed_kind
    from flagscale_like.rehearsal.choice import chosen_ranks

    config, cluster = config_of(row, arch), parse_cluster(row.cluster)
    found, seconds = [], 0.0
    for rank in chosen_ranks(config, cluster.devices, "stages"):
        file = keep / f"{number}_{rank}.pickle" if keep is not None else None
        if file is not None and file.exists():
            own, took = pickle.loads(file.read_bytes())
        else:
            began = time.process_time()
            kind = rehearsed_kind("cuda")
            (own,) = record(config, cluster, kind, world_size=cluster.devices, ranks=str(rank))
            took = time.process_time() - began
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(pickle.dumps((own, took)))
        found.append(own)
        seconds += took
    return found, seconds


def replayed(number: int, keep: Path | None, network_gb_per_s: float | None = None) -> dict[str, Any]:
    """A row's replay, in this process.

    Args:
        number: of the row in MODELS.
        keep: folder of the records.
        network_gb_per_s: of a device's port, where it is not the planner's.
    """
    os.environ["FLAGSCALE_LIKE_DEVICE"] = "cpu"
    from flagscale_like.rehearsal.costs import Costs
    from flagscale_like.rehearsal.timing import time_step

    row, arch = MODELS[number]
    config, cluster = config_of(row, arch), parse_cluster(row.cluster, network_gb_per_s=network_gb_per_s)
    records, rehearsal_s = records_of(row, arch, number, keep)
    began = time.process_time()
    costs = Costs.of(cluster)
    alone = time_step(records, config, cluster, costs=costs)
    timed = time_step(records, config, cluster, costs=replace(costs, fused_gradients=True))
    line = timed.timeline
    parts: Counter[str] = Counter()
    for own in line.parts.values():
        parts.update({name: seconds / len(line.parts) for name, seconds in own.items()})
    kernels: defaultdict[str, float] = defaultdict(float)
    for own in line.kernels.values():
        for name, seconds in own.items():
            words = name.split()
            kernels[" ".join(words[2:]) if words[0] == "layer" else name] += seconds / len(line.kernels)
    return {
        "row": row.name,
        "cluster": row.cluster,
        "layout": row.layout.describe(),
        "replayed_s": line.seconds,
        "formula_s": row.plan().seconds,
        "of_its_time_s": of_its_time(row),
        "ours_s": alone.timeline.seconds,
        "ours_formula_s": alone.planned_s,
        "published_s": published_seconds(row),
        "mfu": timed.mfu,
        "parts_s": dict(parts),
        "kernels_s": dict(sorted(kernels.items(), key=lambda item: item[1], reverse=True)),
        "events": sum(len(record.step(-1)) for record in records),
        "rehearsal_s": rehearsal_s,
        "replay_s": time.process_time() - began,
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row."""
    lines = []
    for one in found:
        ours, theirs, old = one["replayed_s"], one["published_s"], sum(one.get("of_its_time_s", {}).values())
        parts = sorted(one["parts_s"].items(), key=lambda part: -part[1])
        shares = ", ".join(f"{name} {seconds / ours:.0%}" for name, seconds in parts if seconds > 0.015 * ours)
        lines.append(
            (
                one["row"],
                f"{ours:.2f}" + (f" + {old:.2f}" if old > 0.005 * ours else ""),
                f"{one['formula_s']:.2f}",
                f"{theirs:.2f}",
                f"{theirs / (ours + old) - 1:+.1%}",
                f"{theirs / one['formula_s'] - 1:+.1%}",
                shares,
            )
        )
    header = (
        "model",
        "replayed, s",
        "formula, s",
        "published, s",
        "replayed speed",
        "formula's",
        "of the replayed step",
    )
    return markdown(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="numbers of rows, see --list; all without")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--network-gb-per-s", type=float, help="replay with other ports, and write no JSON")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.list:
        for number, (row, _) in enumerate(MODELS):
            print(number, row.describe())
        return 0
    if given.one is not None:
        print(json.dumps(replayed(given.one, given.keep, given.network_gb_per_s)))
        return 0
    found = {one["row"]: one for one in json.loads(given.out.read_text())} if given.out.exists() else {}
    for number in map(int, given.rows or range(len(MODELS))):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.replay_published", "--one", str(number)]
        command += ["--keep", str(given.keep)] if given.keep else []
        command += ["--network-gb-per-s", str(given.network_gb_per_s)] if given.network_gb_per_s else []
        own = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        found[own["row"]] = own
        print(f"{own['row']}: rehearsed in {own['rehearsal_s']:.0f} s, {own['events']:,} events", flush=True)
    ordered = [found[row.name] for row, _ in MODELS if row.name in found]
    if given.network_gb_per_s is None:
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(ordered, indent=1) + "\n")
    print(table(ordered))
    return 0


if __name__ == "__main__":
    sys.exit(main())
