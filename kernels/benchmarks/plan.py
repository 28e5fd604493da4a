"""The rows of the benchmark in the order of their worth, and how one is computed."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import config_times
import goals
import peers
import torch
import variant
import variants
import workloads

MAY_HANG_SECONDS = 45.0  # of a row that no GPU has run yet


@dataclass(frozen=True)
class Row:
    """A step of the benchmark. `compute(device)` yields the results, each a dict that fits into one line of JSON.

    `for_goals`: the goals are judged by it, or it measures what the goals relate to.
    """

    key: str
    compute: object
    seconds: float = 90.0  # a row that takes longer is ended with its process
    for_goals: bool = False


def _check(variant):
    def compute(device):
        device.attempt(lambda: variant.check(device.name))
        yield {"kind": "check", "name": variant.name, "passed": True}

    return compute


def _rates(device):
    yield {"kind": "card", "device": device.describe(), **device.rates()}


def passes(workload, provider):
    """{"forward": call, "backward": call} of a provider, and "both" for a loss. The forward runs without autograd."""
    tensors = workload.tensors()
    call = provider(workload)

    def forward():
        with torch.no_grad():
            return call(*tensors)

    leaves = [t.requires_grad_() if t.is_floating_point() and i in workload.differentiable else t
              for i, t in enumerate(tensors)]  # fmt: skip
    wanted = [t for t in leaves if t.requires_grad]

    def outputs():
        out = call(*leaves)
        return [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]

    out = outputs()
    # A loss gets the gradient 1, as in training: Liger's multiplies its gradient by any other.
    grads = [torch.ones_like(o) if o.dim() == 0 else torch.randn_like(o) for o in out]

    def backward():
        return torch.autograd.grad(out, wanted, grads, retain_graph=True)

    calls = {"forward": forward, "backward": backward}
    if all(o.dim() == 0 for o in out):
        calls["both"] = lambda: torch.autograd.grad(outputs(), wanted, grads)
    return calls


def _times(workload, name, provider):
    def compute(device):
        with contextlib.ExitStack() as variables:
            for variable, value in peers.ENVIRONMENT.get(name, {}).items():
                variables.enter_context(variant.environment(variable, value))
            yield from _measured(workload, name, provider, device)

    return compute


def _measured(workload, name, provider, device):
    work = workload.flops or workload.traffic_bytes
    for direction, call in passes(workload, provider).items():
        times = device.times(call)
        amount = work["forward"] + work["backward"] if direction == "both" else work[direction]
        row = {"kind": "time", "operator": workload.operator, "shape": workload.shape, "provider": name,
               "direction": direction, **times}  # fmt: skip
        tiles = _tiles(workload) if name.startswith(peers.OURS) else {}
        time_ms = times["milliseconds"]
        rate = {"tflop_per_s": amount / time_ms / 1e9} if workload.flops else {"gb_per_s": amount / time_ms / 1e6}
        yield row | rate | ({"tiles": tiles} if tiles else {})


def _tiles(workload):
    """{kernel: config} of the newest launches of the operator's kernels, which are those of the call that was measured."""
    kernels = getattr(sys.modules.get(f"flagscale_kernels.{workload.operator}"), "KERNELS", ())
    found = {kernel.name.strip("_"): asdict(kernel.last) for kernel in kernels if kernel.last}
    for kernel in kernels:
        kernel.last = None
    return found


def checks(tiny: bool, parts: list[str]) -> Iterator[Row]:
    """A row for each variant of each operator."""
    for one in variants.variants(tiny):
        if not parts or any(part in one.name for part in parts):
            yield Row(f"check {one.name}", _check(one), MAY_HANG_SECONDS if one.may_hang else 90.0)


def timings(device_name: str, tiny: bool, parts: list[str]) -> Iterator[Row]:
    """The card's own rates, ours where there is a goal and where the code is other, the peers at goals, and the rest."""
    yield Row("card", _rates, for_goals=True)
    found = [w for w in workloads.workloads(device_name, tiny) if not parts or any(p in w.operator for p in parts)]
    with_goal = [w for w in found if goals.is_goal(w.operator, w.shape)]
    other_code = [w for w in found if w.other_code]
    rest = [w for w in found if w not in with_goal and not w.other_code]
    for part, ours in (
        (with_goal, True),
        (other_code, True),
        (with_goal, False),
        (rest, True),
        (rest, False),
        (other_code, False),
    ):
        for workload in part:
            for name, provider in peers.providers(workload).items():
                if name.startswith(peers.OURS) == ours:
                    row = Row(f"time {workload.operator} {workload.shape} {name}", _times(workload, name, provider))
                    row = replace(row, for_goals=ours and part is with_goal)
                    long = name in (peers.OURS, peers.ADDED) or "compile" in name
                    yield replace(row, seconds=180.0) if long else row


def configs(device_name: str, tiny: bool, parts: list[str], wide: bool) -> Iterator[Row]:
    """The card's own rates, and every listed config of the attention kernels at the shapes that count."""
    yield Row("card", _rates)
    found = [w for w in workloads.workloads(device_name, tiny) if w.operator in config_times.OPERATORS]
    for workload in sorted(found, key=lambda w: not goals.is_goal(w.operator, w.shape)):
        if not parts or any(p in workload.operator for p in parts):
            yield Row(
                f"configs {workload.operator} {workload.shape}",
                lambda device, w=workload: config_times.rows(w, device, wide),
                600.0,
            )
