"""The charts and drawings of a run's report, as SVG text. Shapes have CSS classes, which the style sheet colours."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 620, 236
LEFT, RIGHT, TOP, BOTTOM = 78, 22, 34, 28  # room for the larger letters of a narrow screen
MAX_POINTS = 1200

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: its name in the legend.
        points: (step, value).
        style: the CSS class: `main`, `second`, or `given-up` for steps that a rewind discarded.
        dots: draw a dot at each point.
    """

    name: str
    points: Sequence[Point]
    style: str = "main"
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An event at a step, which the charts mark with a vertical line. `kind` is its CSS class, `text` its tooltip."""

    step: float
    kind: str
    text: str


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Reduce a curve to about `most` points. Of each group of neighbours, the lowest and the highest stay, so spikes stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for f in (1, 2, 5, 10) if (step := f * power) >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def powers_of_ten(low: float, high: float) -> list[float]:
    """The ticks of a logarithmic axis: powers of ten; also 2 and 5 times these if high / low is at most 300."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 300 else (1, 2, 5)
    return [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]


def short(value: float) -> str:
    """Format a number for an axis: 1.2M, 45k, 2,000, 0.003, 2e-5."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def chart(key: str, title: str, curves: Sequence[Curve], marks: Sequence[Mark], *, last_step: float) -> str:
    """Draw a chart over the steps. The y axis is logarithmic if the largest value exceeds 40 times the smallest.

    Args:
        key: the name by which the report's script finds the chart, to move a line to the step under the pointer.
        title: text above the chart.
        curves: the curves to draw.
        marks: the events to mark.
        last_step: right end of the x axis.
    """
    curves = [Curve(name=c.name, points=thinned(c.points), style=c.style, dots=c.dots) for c in curves if c.points]
    values = [y for c in curves for _, y in c.points]
    if not values:
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}"><text x="12" y="22" class="title">{title}</text></svg>'
        )
    low, high = min(values), max(values)
    log = low > 0 and high / low > 40
    if not log:
        if low > 0 and low < 0.35 * high:
            low = 0.0
        pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (low if low == 0 else low - pad), high + pad
    span = math.log(high / low) if log else high - low

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last_step, 1)

    def y(value: float) -> float:
        share = (math.log(value / low) if log else value - low) / (span or 1.0)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    out = [f'<svg class="chart" data-key="{key}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">']
    out.append(f'<text x="{LEFT}" y="16" class="title">{title}{" (log)" if log else ""}</text>')
    for tick in powers_of_ten(low, high) if log else ticks(low, high, 4):
        at = f"{y(tick):.1f}"
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y(tick) + 4:.1f}">{short(tick)}</text>')
    for tick in ticks(0, last_step, 6):
        place = f'x="{x(tick):.1f}" y="{HEIGHT - 8}"'
        out.append(f'<text class="tick" text-anchor="middle" {place}>{short(tick)}</text>')
    for mark in marks:
        at = f"{x(mark.step):.1f}"
        out.append(f'<g class="mark {mark.kind}"><title>{html.escape(mark.text)}</title>')
        out.append(f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<circle cx="{at}" cy="{TOP}" r="4"/></g>')
    for curve in curves:
        places = [(x(step), y(value)) for step, value in curve.points]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        out.append(f'<path class="curve {curve.style}" data-name="{html.escape(curve.name)}" d="{path}"/>')
        if curve.dots or len(places) == 1:
            out += [f'<circle class="dot {curve.style}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in places]
    out.append(f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>')
    names = {c.name: c.style for c in curves}  # several stretches were given up: one name
    if len(names) > 1:
        words = "".join(f'<tspan class="legend {style}" dx="12">{name}</tspan>' for name, style in names.items())
        out.append(f'<text text-anchor="end" x="{WIDTH - RIGHT}" y="16">{words}</text>')
    return "\n".join([*out, "</svg>"])


def layout_drawing(chunks: Sequence[Sequence[Sequence[int]]], *, tp: int, dp: int, sp: bool, cp: int = 1) -> str:
    """Draw the ranks of one copy of the model: one row for each pipeline stage, one box for each of its ranks.

    Args:
        chunks: for each stage, the layers of each of its model chunks.
        tp, dp, cp: tensor-, data- and context-parallel degree.
        sp: whether sequence parallelism is on.
    """
    stages, boxes = len(chunks), min(tp * cp, 8)
    box, gap, row, left, top = 76, 8, 58, 132, 42
    width = max(left + boxes * (box + gap) + 170, 482)  # the line below the drawing is about 430 long
    height = top + stages * row + 26
    out = [f'<svg class="layout" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img">']
    out.append(f'<text class="title" x="{left}" y="18">one copy of the model: {tp * cp * stages} ranks</text>')
    for stage, held in enumerate(chunks):
        at = top + stage * row
        out.append(f'<text x="0" y="{at + 20}">stage {stage}</text>')
        spans = [f"{c[0]}-{c[-1]}" if len(c) > 1 else str(c[0]) for c in held if c]
        words = "layers " + (", ".join(spans) if len(spans) <= 3 else f"{spans[0]}, {spans[1]}, ... {spans[-1]}")
        out.append(f'<text class="small" x="0" y="{at + 36}">{words if spans else "no layers"}</text>')
        for n in range(boxes):
            rank = stage * tp * cp * dp + n
            place = f'x="{left + n * (box + gap)}" y="{at}"'
            out.append(f'<rect class="rank" {place} width="{box}" height="{row - 16}" rx="6"/>')
            middle = f'text-anchor="middle" x="{left + n * (box + gap) + box / 2}"'
            out.append(f'<text {middle} y="{at + 19}">rank {rank}</text>')
            out.append(
                f'<text class="small" {middle} y="{at + 34}">tp {n % tp}{f" cp {n // tp}" if cp > 1 else ""}</text>'
            )
        if stage + 1 < stages:
            middle = left + boxes * (box + gap) / 2
            out.append(f'<path class="arrow" d="M{middle} {at + row - 15}v9m-4 -5l4 5l4 -5"/>')
    side = left + boxes * (box + gap) + 10
    out += [f'<text class="small" x="{side}" y="{top + 20}">... {tp * cp} in all</text>'] if tp * cp > boxes else []
    words = f"x {dp} data-parallel copies" if dp > 1 else "one copy"
    out.append(f'<text x="{side}" y="{top + 38}">{words}</text>')
    under = f"each layer's matrices are cut over {tp} ranks" + (", its sequence too (sp)" if sp else "")
    notes = [under] if tp > 1 else []
    notes += [f"each sequence is cut over {cp} ranks (cp)"] if cp > 1 else []
    out.append(f'<text class="small" x="0" y="{height - 6}">{"; ".join(notes)}</text>')
    return "\n".join([*out, "</svg>"])


# A component of memory has the same colour in every report: the number of its CSS class.
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits", "working", "offload buffers", "measured")


def memory_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Draw one horizontal bar for each row, all on the same scale.

    Args:
        rows: (label, parts); a part is (one of COMPONENTS, bytes).
    """
    most = max((sum(size for _, size in parts) for _, parts in rows), default=0.0) or 1.0
    names = list(dict.fromkeys(name for _, parts in rows for name, size in parts if size))
    left, row, width, line = 130, 32, 600, 18
    keys, across, down = [], float(left), len(rows) * row + 18
    for name in names:
        long = 30 + 6.6 * len(name)
        if across + long > width and across > left:
            across, down = float(left), down + line
        keys.append((name, across, down))
        across += long
    out = [f'<svg class="bars" viewBox="0 0 {width} {down + 12}" role="img">']
    for n, (label, parts) in enumerate(rows):
        at, place = 4 + n * row, float(left)
        out.append(f'<text x="0" y="{at + 16}">{html.escape(label)}</text>')
        for name, size in parts:
            if size:
                long = (width - left - 80) * size / most
                title = f"<title>{html.escape(name)}: {readable(size)}</title>"
                shape = f'x="{place:.1f}" y="{at}" width="{max(long - 1, 0.5):.1f}" height="22" rx="2"'
                out.append(f'<rect class="part p{COMPONENTS.index(name)}" {shape}>{title}</rect>')
                place += long
        out.append(f'<text x="{place + 8:.1f}" y="{at + 16}">{readable(sum(size for _, size in parts))}</text>')
    for name, place, at in keys:
        out.append(
            f'<rect class="part p{COMPONENTS.index(name)}" x="{place:.0f}" y="{at - 9}" width="10" height="10" rx="2"/>'
        )
        out.append(f'<text class="small" x="{place + 14:.0f}" y="{at}">{html.escape(name)}</text>')
    return "\n".join([*out, "</svg>"])


def readable(size: float) -> str:
    """Format a number of bytes as GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
