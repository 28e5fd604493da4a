"""Plans as text: a table of ranked layouts, and the memory and time of one layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from flagscale_like.cluster import GIB, ClusterSpec
from flagscale_like.config import Offload, RunConfig
from flagscale_like.planner.layout import Layout
from flagscale_like.planner.memory import FRAGMENTATION, FRAGMENTATIONS, RankMemory
from flagscale_like.planner.search import PARTS, Plan, Ranking

COLUMNS = (
    "#",
    "tp",
    "pp",
    "vpp",
    "cp",
    "ep",
    "dp",
    "sp",
    "mbs",
    "recompute",
    "offload",
    "tokens/s/dev",
    "MFU",
    "step s",
    "bubble",
    "GiB",
    "why",
)


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows of equal length as aligned text.

    Args:
        right: columns that are aligned to the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def distinct(plans: Sequence[Plan]) -> list[Plan]:
    """Of the plans that differ only in vpp, the ends' layers, sp, recompute or cp_kind, the first one; in the given order."""
    seen, kept = set(), []
    for plan in plans:
        layout = plan.layout
        key = (layout.tp, layout.pp, layout.cp, layout.ep, layout.micro_batch_size)
        if key not in seen:
            seen.add(key)
            kept.append(plan)
    return kept


def ranking_rows(ranking: Ranking, plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """One row of cells for each plan, in the order of COLUMNS."""
    places = {id(plan): str(place) for place, plan in enumerate(ranking.plans, 1)}
    rows = []
    for plan in plans:
        layout, time = plan.layout, plan.time
        rows.append(
            (
                places.get(id(plan), "-"),
                str(layout.tp),
                _stages(layout),
                str(layout.vpp),
                f"{layout.cp}{' a2a' if layout.cp_kind == 'a2a' else ''}" if layout.cp > 1 else "",
                str(layout.ep) if layout.ep > 1 else "",
                str(layout.dp),
                "yes" if layout.sp else "",
                str(layout.micro_batch_size),
                layout.recompute if layout.recompute != "none" else "",
                f"{max(layout.offload):.0%}" if layout.offload else "",
                f"{time.tokens_per_s_per_device:,.0f}",
                f"{time.mfu:.1%}",
                f"{time.seconds:.2f}",
                f"{time.bubble / time.seconds:.1%}",
                f"{plan.peak_bytes / GIB:.1f}",
                ranking.why(plan),
            )
        )
    return rows


def _stages(layout: Layout) -> str:
    """How many stages there are, and the layers of the first and the last one where they differ from the others'."""
    ends = (layout.first_stage_layers, layout.last_stage_layers)
    return f"{layout.pp} ({'/'.join(str(end or '-') for end in ends)})" if any(ends) else str(layout.pp)


def describe_ranking(ranking: Ranking, cluster: ClusterSpec, *, top: int) -> str:
    """The table of the `top` fastest distinct layouts, and the closest that do not fit."""
    plans = [*distinct(ranking.plans)[:top], *ranking.misfits]
    rows = [COLUMNS, *ranking_rows(ranking, plans)]
    used = {name: any(getattr(plan.layout, name) > 1 for plan in plans) for name in ("cp", "ep")}
    columns = [i for i, name in enumerate(COLUMNS) if used.get(name, True)]
    right = [i for i, column in enumerate(columns) if COLUMNS[column] not in ("sp", "recompute", "why")]
    found = (
        f"{len(ranking.plans)} layouts fit {cluster.describe()} ({ranking.budget_bytes / GIB:.1f} GiB usable a device);"
    )
    return f"{found} of those that differ in vpp, ends, sp or recompute alone, the fastest:\n" + table(
        [[row[column] for column in columns] for row in rows], right=right
    )


def describe_memory(memory: Sequence[RankMemory]) -> str:
    """A table with a row for each stage and a column for each component, in GiB or MiB."""
    unit, name = (GIB, "GiB") if max(m.total for m in memory) > GIB else (1 << 20, "MiB")
    components = [f.name for f in fields(RankMemory) if any(getattr(m, f.name) for m in memory)]
    rows: list[tuple[str, ...]] = [(f"stage ({name})", *components, "total")]
    for stage, m in enumerate(memory):
        rows.append((str(stage), *(f"{getattr(m, c) / unit:.2f}" for c in components), f"{m.total / unit:.2f}"))
    text = table(rows, right=range(1, len(components) + 2))
    most = max(memory, key=lambda one: one.total)
    if not most.overhead:
        return text
    low, high = (most.total + (share - FRAGMENTATION) * most.dynamic for share in FRAGMENTATIONS)
    return (
        f"{text}\nthe fullest takes {low / unit:.2f} to {high / unit:.2f} {name}: the allocator loses "
        f"{FRAGMENTATIONS[0]:.1%} to {FRAGMENTATIONS[1]:.0%} of what a step makes ({FRAGMENTATION:.0%} planned; `rehearse` "
        "places the tensors)"
    )


def describe_time(plan: Plan) -> str:
    """Seconds of a step, throughput, and the share of each part of the step."""
    time = plan.time
    parts = ", ".join(
        f"{label} {getattr(time, part) / time.seconds:.1%}"
        for part, label in PARTS.items()
        if getattr(time, part) > 0.0005 * time.seconds
    )
    return (
        f"{time.seconds:.3g} s a step, {time.tokens_per_s_per_device:,.0f} tokens/s/device, "
        f"{time.flops_per_s_per_device / 1e12:.3g} TFLOP/s/device, MFU {time.mfu:.1%} of {time.peak_flops / 1e12:.3g} "
        f"TFLOP/s; {parts}"
    )


def updated_config(config: RunConfig, layout: Layout) -> RunConfig:
    """The configuration with its layout replaced by a planned one."""
    parallel = config.parallel.model_copy(
        update={
            "tp": layout.tp,
            "pp": layout.pp,
            "vpp": layout.vpp,
            "sp": layout.sp,
            "cp": layout.cp,
            "cp_kind": layout.cp_kind,
            "ep": layout.ep,
            "first_stage_layers": layout.first_stage_layers,
            "last_stage_layers": layout.last_stage_layers,
        }
    )
    train = config.train.model_copy(update={"micro_batch_size": layout.micro_batch_size, "recompute": layout.recompute})
    offload = Offload(share=[round(share, 3) for share in layout.offload]) if layout.offload else None
    return RunConfig.model_validate(
        config.model_copy(update={"parallel": parallel, "train": train, "offload": offload}).model_dump(mode="json")
    )
