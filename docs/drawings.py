"""The drawings of the documentation: `python docs/drawings.py` writes docs/images/*.svg. The schedules are simulated."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
INK, SOFT, LINE = "#24292f", "#6b7075", "#c9ced4"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563a8", "#c2571a", "#0f766e", "#7b3fa0", "#e9ecef"


class Drawing:
    """SVG on a white ground, so that it reads on a dark page too."""

    def __init__(self, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="system-ui, DejaVu Sans, sans-serif">',
            f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>',
        ]

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, text: str = "", *, ink: str = "#fff", size: int = 13
    ) -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}"/>')
        if text:
            self.text(x + w / 2, y + h / 2 + size * 0.36, text, ink=ink, size=size, anchor="middle")

    def frame(self, x: float, y: float, w: float, h: float, dash: str = "5 4") -> None:
        shape = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8"'
        self.parts.append(f'<rect {shape} fill="none" stroke="{LINE}" stroke-width="1.5" stroke-dasharray="{dash}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        ink: str = INK,
        size: int = 13,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{ink}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}{weight}>{text}</text>")

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, ink: str = SOFT) -> None:
        flat = y1 == y2
        sign = 1 if (x2 > x1 if flat else y2 > y1) else -1
        head = f"l{-6 * sign} -4v8z" if flat else f"l-4 {-6 * sign}h8z"
        self.parts.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{ink}" stroke-width="1.5" fill="none"/>')
        self.parts.append(f'<path d="M{x2:g} {y2:g}{head}" fill="{ink}"/>')

    def done(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def ranks() -> str:
    """Where the eight ranks of tp 2, dp 2, pp 2 lie."""
    d = Drawing(760, 300)
    d.text(24, 34, "tp 2 x dp 2 x pp 2 on eight ranks, four layers", size=16, bold=True)
    for copy in range(2):
        left = 150 + 310 * copy
        d.frame(left - 16, 62, 286, 192)
        d.text(left + 127, 280, f"data-parallel copy {copy}: its own half of the batch", ink=SOFT, anchor="middle")
        for stage in range(2):
            for t in range(2):
                rank = stage * 4 + copy * 2 + t
                d.box(left + 132 * t, 76 + 92 * stage, 120, 66, (BLUE, GREEN)[stage], f"rank {rank}", size=15)
                place = (left + 132 * t + 60, 76 + 92 * stage + 56)
                d.text(*place, f"half {t} of each matrix", ink="#fff", size=10, anchor="middle")
        d.arrow(left + 126, 143, left + 126, 166)
    for stage in range(2):
        d.text(24, 106 + 92 * stage, f"stage {stage}", bold=True)
        d.text(24, 124 + 92 * stage, f"layers {2 * stage}-{2 * stage + 1}", ink=SOFT)
    return d.done()


def tensor_parallel() -> str:
    """The two matrices of an MLP, cut over two ranks, and what goes between them with and without sequence parallelism."""
    d = Drawing(860, 330)
    d.text(
        24, 34, "Tensor parallelism cuts every matrix; sequence parallelism cuts what lies between", size=16, bold=True
    )
    stages = (
        (30, 90, "norm", GREY, "s/tp tokens"),
        (180, 110, "", LINE, "s tokens"),
        (310, 130, "gate, up", BLUE, "columns / tp"),
        (470, 130, "down", BLUE, "rows / tp"),
        (620, 110, "", LINE, "sum, cut"),
        (750, 80, "+ residual", GREY, "s/tp tokens"),
    )
    for rank in range(2):
        y = 76 + 104 * rank
        d.text(24, y - 8, f"rank {rank}", ink=SOFT, size=12)
        for x, w, name, fill, note in stages:
            if name:
                ink = INK if fill == GREY else "#fff"
                d.box(x, y, w, 56, fill, f"{name}, half {rank}" if fill == BLUE else name, ink=ink)
            d.text(x + w / 2, y + 74, note, ink=SOFT, size=11, anchor="middle") if rank else None
        for x, end in ((124, 176), (292, 308), (442, 468), (602, 618), (732, 748)):
            d.arrow(x, y + 28, end, y + 28)
    for x, name in ((180, "all-gather"), (620, "reduce-scatter")):
        d.box(x, 76, 110, 160, "#fdf0e7", name, ink=ORANGE)
    under = (
        "Without sp, one all-reduce after `down` takes the place of both, and each rank normalises all s tokens.",
        "The same holds for attention: QKV by heads, then the output projection.",
    )
    for line, text in enumerate(under):
        d.text(24, 290 + 19 * line, text, ink=SOFT)
    return d.done()


Task = tuple[str, int, int]  # F or B, micro-batch, chunk


def orders(pp: int, vpp: int, m: int) -> list[list[Task]]:
    """What each stage runs, in order: warm-up forwards, then one forward and one backward in turn (Narayanan et al. 2021)."""

    def virtual(kind: str) -> list[Task]:
        # groups of pp micro-batches pass chunk by chunk
        found = []
        for group in range(0, m, pp):
            batch = range(group, min(group + pp, m))
            for chunk in range(vpp) if kind == "F" else reversed(range(vpp)):
                found += [(kind, n, chunk) for n in batch]
        return found

    forwards, backwards = virtual("F"), virtual("B")
    found = []
    for stage in range(pp):
        warm = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
        warm = min(warm, len(forwards))
        order = forwards[:warm]
        for n in range(len(forwards) - warm):
            order += [forwards[warm + n], backwards[n]]
        found.append(order + backwards[len(forwards) - warm :])
    return found


def schedule(pp: int, vpp: int, m: int) -> list[list[tuple[Task, float, float]]]:
    """Begin and end of every task of every stage; a forward takes 1 / vpp, a backward twice that."""
    todo, ended = orders(pp, vpp, m), {}
    free, found = [0.0] * pp, [[] for _ in range(pp)]
    at = [0] * pp
    while any(at[s] < len(todo[s]) for s in range(pp)):
        moved = False
        for stage in range(pp):
            while at[stage] < len(todo[stage]):
                kind, n, chunk = task = todo[stage][at[stage]]
                before = _before(kind, n, chunk, stage, pp, vpp)
                if before is not None and before not in ended:
                    break
                begin = max(free[stage], ended.get(before, 0.0))
                free[stage] = ended[kind, n, chunk, stage] = begin + (1 if kind == "F" else 2) / vpp
                found[stage].append((task, begin, free[stage]))
                at[stage] += 1
                moved = True
        assert moved, "the schedule waits for itself"
    return found


def _before(kind: str, n: int, chunk: int, stage: int, pp: int, vpp: int) -> tuple | None:
    """The task whose result this one needs."""
    if kind == "F":
        if stage:
            return "F", n, chunk, stage - 1
        return ("F", n, chunk - 1, pp - 1) if chunk else None
    if stage < pp - 1:
        return "B", n, chunk, stage + 1
    return ("B", n, chunk + 1, 0) if chunk < vpp - 1 else ("F", n, chunk, stage)


def bubble(pp: int, vpp: int, m: int) -> float:
    """Idle time over the ideal time, of a simulated schedule."""
    end = max(row[-1][2] for row in schedule(pp, vpp, m))
    return end / (3.0 * m) - 1.0


def pipeline() -> str:
    """1F1B and interleaved 1F1B, four stages, eight micro-batches."""
    pp, m = 4, 8
    d = Drawing(900, 404)
    d.text(24, 34, "A step of a pipeline: four stages, eight micro-batches", size=16, bold=True)
    longest = max(row[-1][2] for row in schedule(pp, 1, m))
    unit = 780 / longest
    for top, vpp, name in ((66, 1, "1F1B"), (236, 2, "interleaved, vpp 2: each stage holds two chunks of layers")):
        d.text(24, top - 6, f"{name}; bubble {bubble(pp, vpp, m):.1%}", bold=True)
        for stage, row in enumerate(schedule(pp, vpp, m)):
            y = top + 8 + 30 * stage
            d.text(24, y + 17, f"stage {stage}", ink=SOFT, size=12)
            d.box(90, y, longest * unit, 26, GREY)
            for (kind, n, chunk), begin, end in row:
                fill = {("F", 0): BLUE, ("F", 1): "#6d9fd4", ("B", 0): GREEN, ("B", 1): "#5fb3a8"}[kind, chunk]
                d.box(90 + begin * unit, y, (end - begin) * unit - 1, 26, fill, str(n + 1), size=12 if vpp == 1 else 10)
    for x, fill, name in ((90, BLUE, "forward"), (190, GREEN, "backward"), (300, GREY, "idle: the bubble")):
        d.box(x, 376, 14, 14, fill)
        d.text(x + 20, 388, name, ink=SOFT, size=12)
    d.text(470, 388, "lighter: the second chunk of a stage's layers", ink=SOFT, size=12)
    return d.done()


def data_parallel() -> str:
    """ZeRO-1: what each of two data-parallel ranks holds and when."""
    d = Drawing(860, 290)
    d.text(24, 34, "Data parallelism with a sharded optimizer (ZeRO-1), two copies", size=16, bold=True)
    columns = (
        (30, 150, "forward, backward", "all weights, own samples"),
        (210, 140, "reduce-scatter", "gradients, fp32"),
        (380, 210, "update", "own half: master weights, moments"),
        (620, 120, "all-gather", "weights"),
        (750, 90, "next step", ""),
    )
    for x, w, name, note in columns:
        d.text(x + w / 2, 66, name, anchor="middle", bold=True, size=12)
        d.text(x + w / 2, 252, note, anchor="middle", ink=SOFT, size=11)
    for rank in range(2):
        y = 84 + 80 * rank
        d.box(30, y, 150, 54, BLUE, f"copy {rank}: all weights", size=12)
        for half in range(2):
            mine = half == rank
            d.box(380 + 106 * half, y, 104, 54, GREEN if mine else GREY, f"half {half}" if mine else "", size=12)
        d.box(750, y, 90, 54, BLUE, "all weights", size=12)
        for x in (186, 356, 596, 726):
            d.arrow(x, y + 27, x + 18, y + 27)
    for x, w in ((210, 140), (620, 100)):
        d.box(x, 84, w, 134, "#fdf0e7", "both ranks", ink=ORANGE, size=12)
    return d.done()


def step() -> str:
    """One training step: what each of the three nouns does, in time from left to right."""
    d = Drawing(980, 396)
    d.text(24, 34, "One step of the training loop", size=16, bold=True)
    rows = {"plan": 62, "engine": 122, "objective": 182, "parts": 242, "guard": 302}
    words = {
        "plan": "StepPlan",
        "engine": "Engine",
        "objective": "Objective",
        "parts": "Parts",
        "guard": "loop, guard",
    }
    for name, y in rows.items():
        d.text(24, y + 27, words[name], bold=True)
    left = 134
    d.frame(left + 96, 52, 560, 300)
    d.text(left + 376, 374, "step time: only what is inside is counted", ink=SOFT, anchor="middle")
    d.box(left, rows["plan"], 84, 42, GREY, "next_step", ink=INK)
    d.box(left, rows["parts"], 84, 42, PURPLE, "before")
    d.box(left + 108, rows["engine"], 188, 42, BLUE, "forward_backward")
    d.box(left + 108, rows["objective"], 90, 42, GREEN, "inputs")
    d.box(left + 206, rows["objective"], 90, 42, GREEN, "loss")
    d.box(left + 304, rows["parts"], 92, 42, PURPLE, "contribute")
    d.box(left + 304, rows["guard"], 92, 42, ORANGE, "one all-reduce", size=11)
    d.box(left + 404, rows["parts"], 70, 42, PURPLE, "judge")
    d.box(left + 404, rows["guard"], 70, 42, ORANGE, "verdict")
    d.box(left + 482, rows["parts"], 92, 42, PURPLE, "before_update", size=11)
    d.box(left + 582, rows["engine"], 66, 42, BLUE, "update")
    d.box(left + 668, rows["parts"], 66, 42, PURPLE, "after")
    d.box(left + 742, rows["guard"], 92, 42, ORANGE, "settle")
    d.text(left + 834, rows["guard"] + 60, "rewind, evaluate, save", ink=SOFT, size=11, anchor="end")
    d.arrow(left + 84, rows["plan"] + 21, left + 94, rows["plan"] + 21)
    d.arrow(left + 350, rows["parts"] + 42, left + 350, rows["guard"] - 2)
    d.arrow(left + 439, rows["guard"], left + 439, rows["parts"] + 44)
    d.arrow(left + 296, rows["engine"] + 21, left + 580, rows["engine"] + 21)
    d.text(left + 438, rows["engine"] + 12, "if the verdict is UPDATE", ink=SOFT, size=11, anchor="middle")
    return d.done()


DRAWINGS = {
    "ranks.svg": ranks,
    "tensor_parallel.svg": tensor_parallel,
    "pipeline.svg": pipeline,
    "data_parallel.svg": data_parallel,
    "step.svg": step,
}


def main(arguments: Iterable[str]) -> None:
    for name, draw in DRAWINGS.items():
        if "--check" not in arguments:
            (IMAGES / name).write_text(draw(), encoding="utf-8")
        elif (IMAGES / name).read_text(encoding="utf-8") != draw():
            sys.exit(f"{IMAGES / name} is not what docs/drawings.py draws")


if __name__ == "__main__":
    main(sys.argv[1:])
