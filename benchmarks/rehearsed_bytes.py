"""The planner's bytes beside a rehearsal's, by component, for published models: `python -m benchmarks.rehearsed_bytes`.

Each model keeps its width, layout and world. A step has as many micro-batches as it has pipeline stages, because more of them
change no peak. `lost` is what the allocator holds and cannot use, of what a step makes: with its default settings, and where
its segments grow.

    python -m benchmarks.rehearsed_bytes [NAME]... [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from flagscale_like.cluster import GIB, parse_cluster
from flagscale_like.config import load_config
from flagscale_like.planner.memory import CONTEXT_BYTES
from flagscale_like.recipes.rehearse import rehearse, rehearsed_kind
from flagscale_like.rehearsal.report import planned_row, rehearsed_row

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Example -> devices; the world is all of them.
ROWS = {
    "aquila2/7b": "12x8xA800",
    "aquila2/34b": "64x8xA100-40",
    "aquila2/70b": "96x8xA800",
    "baichuan/13b": "128x8xA800",
    "llama3/8b": "8x8xH100",
    "llama3/405b": "2048x8xH100",
    "moe/mixtral-8x7b": "8x8xH100",
    "moe/qwen3-30b-a3b": "4x8xH100",
    "qwen/qwen3-8b": "4x8xH100",
    "long_context/aquila2-34b-16k": "8x8xA800",
    "sft/aquilachat2-34b-16k": "8x8xA100-80",
}
TITLES = (
    *("model", "stage", "states", "activations", "logits", "temporaries", "tensors: planned is", "lost"),
    *("total", "planned is", "lost where segments grow", "planned is"),
)
NAMES = ("weights", "gradients", "optimizer", "activations", "logits", "temporaries", "overhead")


def rows_of(name: str) -> Iterator[dict]:
    """A row for one stage of each kind, in bytes."""
    cluster = parse_cluster(ROWS[name])
    config = load_config(EXAMPLES / f"{name}.yaml", ("train.ramp_up=null",))
    par, micro = config.parallel, config.train.micro_batch_size
    batch = micro * par.pp * (cluster.devices // par.model_parallel_size)
    config = load_config(EXAMPLES / f"{name}.yaml", ("train.ramp_up=null", f"train.global_batch_size={batch}"))
    for found in rehearse(config, cluster, rehearsed_kind("cuda"), world_size=cluster.devices):
        yield {
            "name": name,
            "stage": found.stage,
            "seconds": found.seconds,
            "rehearsed": rehearsed_row(found),
            "planned": planned_row(found),
            "growing": found.placed.expandable + CONTEXT_BYTES,
            "alive": [list(one) for one in found.memory.alive],
        }


def describe(row: dict) -> str:
    """A line of the table: rehearsed / planned of each component in GiB, what the allocator loses, how far totals differ."""
    ours, theirs = row["rehearsed"], row["planned"]
    states = [sum(side.get(n, 0) for n in NAMES[:3]) / GIB for side in (ours, theirs)]
    cells = [row["name"], str(row["stage"]), f"{states[0]:.2f} / {states[1]:.2f}"]
    cells += [f"{ours.get(n, 0) / GIB:.2f} / {theirs.get(n, 0) / GIB:.2f}" for n in NAMES[3:-1]]
    tensors, planned = (sum(side.values()) - side["overhead"] for side in (ours, theirs))
    whole, expected = sum(ours.values()), sum(theirs.values())
    made = tensors - states[0] * GIB
    lost = [(bytes_ - CONTEXT_BYTES - tensors) / made for bytes_ in (whole, row["growing"])]
    cells += [f"{planned / tensors - 1:+.1%}", f"{lost[0]:.1%}", f"{whole / GIB:.2f} / {expected / GIB:.2f}"]
    cells += [f"{expected / whole - 1:+.1%}", f"{lost[1]:.1%}", f"{expected / row['growing'] - 1:+.1%}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ROWS)}; all without any")
    parser.add_argument("--out", type=Path, help="JSON file of all rows, with the largest tensors at each peak")
    options = parser.parse_args()
    found = []
    print(f"| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}")
    for name in options.names or ROWS:
        for row in rows_of(name):
            found.append(row)
            print(describe(row), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
