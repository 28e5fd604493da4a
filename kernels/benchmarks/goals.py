"""What the kernels are to reach on an H100 or A100, and whether the rows say that they do."""

from dataclasses import dataclass

FLASH_SHAPE = "b2 n16/16 s8192 d128 causal"
PIECEWISE_SHAPE = f"{FLASH_SHAPE} threshold 4096"


@dataclass(frozen=True)
class Goal:
    """`unit` of our kernel's `direction` at `shape` is at least `least`, or at most `most`.

    The units: "of_copy", the share of the card's own copy bandwidth; "milliseconds"; "tflop_per_s"; "of_flash", the rate
    over that of our own flash attention. `chips` are parts of cards' names.
    """

    operator: str
    shape: str
    direction: str
    unit: str
    least: float | None = None
    most: float | None = None
    chips: tuple[str, ...] = ("A100", "H100", "H200")

    def text(self) -> str:
        bound = f">= {self.least}" if self.least is not None else f"<= {self.most}"
        return f"{self.operator} {self.shape} {self.direction}: {self.unit} {bound}"


HOPPER = ("H100", "H200")
GOALS = [
    Goal("flash_attention", FLASH_SHAPE, "forward", "tflop_per_s", least=480, chips=HOPPER),
    Goal("flash_attention", FLASH_SHAPE, "backward", "tflop_per_s", least=380, chips=HOPPER),
    Goal("flash_attention", FLASH_SHAPE, "forward", "tflop_per_s", least=660, chips=HOPPER),
    Goal("flash_attention", FLASH_SHAPE, "backward", "tflop_per_s", least=540, chips=HOPPER),
    Goal("flash_attention", FLASH_SHAPE, "forward", "tflop_per_s", least=190, chips=("A100",)),
    Goal("flash_attention", FLASH_SHAPE, "backward", "tflop_per_s", least=150, chips=("A100",)),
    Goal("piecewise_attention", PIECEWISE_SHAPE, "forward", "of_flash", least=0.93),
    Goal("piecewise_attention", PIECEWISE_SHAPE, "backward", "of_flash", least=0.93),
    Goal("cross_entropy", "8192x131072", "both", "milliseconds", most=2.4, chips=HOPPER),
    Goal("swiglu", "8192x32768", "forward", "of_copy", least=0.95),
    Goal("swiglu", "8192x32768", "backward", "of_copy", least=0.92),
    Goal("swiglu", "8192x32768", "forward and backward", "milliseconds", most=1.55, chips=HOPPER),
    Goal("rms_norm", "4096x8192", "forward", "of_copy", least=0.92),
    Goal("rms_norm", "4096x8192", "backward", "of_copy", least=0.88),
    Goal("rms_norm", "4096x8192", "backward", "milliseconds", most=0.080, chips=HOPPER),
    Goal("rms_norm_residual", "4096x8192", "forward", "of_copy", least=0.92),
    Goal("rms_norm_residual", "4096x8192", "backward", "of_copy", least=0.88),
    Goal("rope", "s8192 b1 n32/32 d128", "forward", "of_copy", least=0.92),
    Goal("rope", "s8192 b1 n32/32 d128", "backward", "of_copy", least=0.92),
]


def is_goal(operator: str, shape: str) -> bool:
    return any((goal.operator, goal.shape) == (operator, shape) for goal in GOALS)


def judged(rows: list[dict], device: str, provider: str) -> list[dict]:
    """A row for each goal of `device`: the goal, what was measured (None where nothing was), and whether it is reached."""
    times = {(r["operator"], r["shape"], r["direction"]): r for r in rows if r.get("kind") == "time" and
             r["provider"] == provider}  # fmt: skip
    return [_judge(goal, times) for goal in GOALS if any(c in device for c in goal.chips)]


def _measured(goal, times):
    row = times.get((goal.operator, goal.shape, goal.direction))
    if goal.direction == "forward and backward":
        parts = [times.get((goal.operator, goal.shape, direction)) for direction in ("forward", "backward")]
        return None if None in parts else sum(part[goal.unit] for part in parts)
    if row is None or goal.unit != "of_flash":
        return None if row is None else row.get(goal.unit)
    flash = times.get(("flash_attention", FLASH_SHAPE, goal.direction))
    return None if flash is None else row["tflop_per_s"] / flash["tflop_per_s"]


def _judge(goal, times):
    measured = _measured(goal, times)
    reached = None
    if measured is not None:
        reached = measured >= goal.least if goal.least is not None else measured <= goal.most
    return {"kind": "goal", "goal": goal.text(), "measured": measured, "reached": reached}
