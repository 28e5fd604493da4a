"""What stands behind a predicted step time: the published row that is nearest to it, and where it leaves the rows' range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flagscale_like.cluster import ClusterSpec
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.published import (
    AQUILA2_34B,
    BAICHUAN_7B,
    EXPERTS_H100,
    FITTED,
    LLAMA3_H100,
    LLAMA3_PRODUCTION,
    Row,
)
from flagscale_like.planner.search import Goal, Plan

# What rows are compared by: the name, and the number of a model, its layout and its sequences.
Number = Callable[[Shape, Layout, int], float]
NUMBERS: dict[str, Number] = {
    "matrix parameters": lambda shape, layout, seq_length: shape.matrix_parameters,
    "devices": lambda shape, layout, seq_length: layout.world_size,
    "tp": lambda shape, layout, seq_length: layout.tp,
    "pp": lambda shape, layout, seq_length: layout.pp,
    "tokens a micro-batch": lambda shape, layout, seq_length: layout.rows(seq_length),
    "tokens a sequence": lambda shape, layout, seq_length: seq_length,
}


def describe_evidence(plan: Plan, goal: Goal, cluster: ClusterSpec) -> str:
    """One or two lines: the nearest published row, and in what the plan is outside of the range of the fitted rows.

    Fitted rows are those that the constants of the device's kind were chosen by.
    """
    kind = cluster.device.efficiency
    fitted = [row for row in FITTED if row.efficiency == kind]
    if not fitted:
        return f"evidence: none; no step time is published that the constants of {cluster.device.name} were chosen by"
    shape = goal.shape(plan.layout.tp)
    known = [
        row
        for row in (*FITTED, BAICHUAN_7B, AQUILA2_34B, *EXPERTS_H100, *LLAMA3_H100, *LLAMA3_PRODUCTION)
        if row.efficiency == kind
    ]
    nearest = min(known, key=lambda row: distance(row, shape, plan.layout, goal.seq_length))
    lines = [
        f"evidence: the nearest of {len(known)} published rows is {nearest.describe()}: MFU {nearest.mfu:.1%}, planned "
        f"{nearest.plan().mfu:.1%}"
    ]
    if outside := outside_of(fitted, plan, shape, goal.seq_length):
        lines.append(
            f"outside of the {len(fitted)} fitted rows: {'; '.join(outside)}. The planned time is an extrapolation, and "
            "rather too short than too long"
        )
    return "\n".join(lines)


def distance(row: Row, shape: Shape, layout: Layout, seq_length: int) -> float:
    """How far a row is from a plan: the doublings of each number, and 4 more for attention of another kind and for experts
    in one of the two, 2 for another recompute.
    """
    doublings = (
        math.log2(number(shape, layout, seq_length) / number(row.shape, row.layout, row.seq_length))
        for number in NUMBERS.values()
    )
    other = 4 * (row.shape.flash != shape.flash) + 4 * (row.shape.has_experts != shape.has_experts)
    other += 2 * (row.layout.recompute != layout.recompute)
    return sum(map(abs, doublings)) + other


def outside_of(rows: Sequence[Row], plan: Plan, shape: Shape, seq_length: int) -> list[str]:
    """In what a plan is outside of the range of the rows, in words; empty where it is inside."""
    found = []
    best = max(rows, key=lambda row: row.mfu)
    if plan.time.mfu > best.mfu:
        found.append(f"MFU {plan.time.mfu:.1%} (the highest published is {best.mfu:.1%}, {best.name})")
    for name, number in NUMBERS.items():
        own = number(shape, plan.layout, seq_length)
        low, high = (end(number(row.shape, row.layout, row.seq_length) for row in rows) for end in (min, max))
        if not low <= own <= high:
            span = _readable(low) + (f" to {_readable(high)}" if high > low else "")
            found.append(f"{name} {_readable(own)} ({span})")
    layout = plan.layout
    kinds = {
        "context parallelism": layout.cp > 1,
        "offload": bool(layout.offload),
        "experts": shape.has_experts,
        "LoRA": bool(shape.adapters),
        f"recompute {layout.recompute}": all(row.layout.recompute != layout.recompute for row in rows),
    }
    return found + [f"{name} (in no row)" for name, is_new in kinds.items() if is_new]


def _readable(value: float) -> str:
    """1.7 B, 350 M, or 4,096."""
    for unit, name in ((1e9, " B"), (1e6, " M")):
        if value >= unit:
            return f"{value / unit:,.3g}{name}" if value < 1e3 * unit else f"{value / unit:,.0f}{name}"
    return f"{value:,.0f}"
