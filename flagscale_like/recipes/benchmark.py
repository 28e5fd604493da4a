"""Throughput one can trust: the real training loop on synthetic tokens, and transformers on the same shape beside it.

    MFU = model FLOPs of a step / (median seconds x devices x dense peak of a device)

Model FLOPs are ModelArch.flops_per_token, without recompute, with attention counted in full (Narayanan et al. 2021). The peak
is the data sheet's dense bf16 figure; on a CPU, or a GPU we do not know, it is the matrix-product rate that the same
processes reach at the same time: the higher of two measurements, before the first step and after the last.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flagscale_like.cluster import ClusterSpec, DeviceSpec
from flagscale_like.config import RunConfig
from flagscale_like.data.blend import is_packed
from flagscale_like.data.pretrain import build_datasets, micro_batches
from flagscale_like.data.synthetic import like_the_data
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError
from flagscale_like.families import find_family
from flagscale_like.families.features import features
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.choice import objective_of
from flagscale_like.planner.efficiency import MEASURED, Efficiency
from flagscale_like.planner.search import Goal, configured_layout, evaluate
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.precision import DTYPES
from flagscale_like.runtime.reduction import NamedSum
from flagscale_like.runtime.roofline import gemm_flops, measure_device
from flagscale_like.training.metrics import read_metrics


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one configuration reached. Times in seconds, memory in bytes of the rank that used most.

    Attributes:
        step_s: median step; step_low_s and step_high_s the second smallest and second largest where there are five or more.
        peak_source: where peak_flops is from.
        states: weights, gradients and optimizer states as built, of the largest rank; planned_states beside them.
        dynamic: peak above the states, in allocated bytes; None on a CPU, where nobody counts a process's tensors.
        checkpoint_stall_s: how long the loop waited for the save after the last step; None where none was asked for.
        planned_step_s: the planner's, with the measured roofline on a CPU.
        offload: rank 0's counts over the measured steps.
    """

    layout: str
    devices: int
    device: str
    precision: str
    tokens_per_step: int
    steps: int
    step_s: float
    step_low_s: float
    step_high_s: float
    tokens_per_s_per_device: float
    flops_per_s_per_device: float
    peak_flops: float
    peak_source: str
    mfu: float
    states: int
    planned_states: float
    dynamic: int | None
    planned_dynamic: float
    planned_step_s: float
    data_wait_share: float
    loss: float
    checkpoint_stall_s: float | None
    offload: dict[str, float] | None


def measure(
    config: RunConfig, ctx: ParallelContext, *, steps: int, warmup: int, checkpoint: bool = False
) -> Point | None:
    """Train `warmup` + `steps` steps of `config` on synthetic tokens in a temporary folder, and time the last `steps`.

    Returns:
        The point, on rank 0; None on the others.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-bench-") as folder:
        config = benchmark_config(config, ctx.broadcast(folder), warmup + steps, checkpoint=checkpoint)
        peak, source = peak_flops(config, ctx)
        states = _built_states(config, ctx)
        pretrain(config, ctx)
        dynamic = ctx.platform.peak_memory_bytes() - states if ctx.platform.counts_device_memory else 0
        peak = max(peak, peak_flops(config, ctx)[0])  # a measured one is lower while others use the machine
        records = read_metrics(Path(config.run_dir)) if ctx.is_main else []
        largest = [max(values) for values in zip(*ctx.gather((states, dynamic)), strict=True)]
        ctx.barrier()
        return _point(config, ctx, records, warmup, peak, source, *largest) if ctx.is_main else None


def benchmark_config(config: RunConfig, folder: str, steps: int, *, checkpoint: bool) -> RunConfig:
    """The same run, on synthetic tokens, with a record of every step, and nothing beside training."""
    values = config.model_dump(mode="json")
    values["run_dir"] = folder
    if config.task == "train":
        values["data"] = {"synthetic": like_the_data(config)[0]}
    values["train"] |= {"steps": steps, "log_interval": 1, "eval_interval": 0, "ramp_up": None, "exit_at_step": None}
    values["optimizer"] |= {"warmup_steps": 0, "schedule": "constant", "decay_steps": None}
    values["logging"] = {}
    values["checkpoint"] = {"interval": steps if checkpoint else 0, "keep": 1}
    return RunConfig.model_validate(values)


def peak_flops(config: RunConfig, ctx: ParallelContext) -> tuple[float, str]:
    """A device's dense peak, and where it is from."""
    spec = ctx.platform.data_sheet()
    if spec is not None:
        return spec.bf16_flops, f"{spec.name} data sheet, dense bf16"
    ctx.barrier()  # all ranks multiply at once: they share cores and memory, as in training
    rate = gemm_flops(ctx.platform, config.train.precision, budget_s=1.0)
    unknown = f"{ctx.platform.describe()} is not a known device, " if ctx.platform.counts_device_memory else ""
    source = f"{unknown}measured: {config.train.precision} matrix product, all ranks at once"
    return ctx.sum([rate])[0] / ctx.world_size, source


def _built_states(config: RunConfig, ctx: ParallelContext) -> int:
    """Bytes of this rank's weights, gradients and optimizer states, of a model that is built for this and dropped."""
    total = Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer).state_bytes()
    gc.collect()
    ctx.platform.reset_peak_memory()
    return total


def _point(
    config: RunConfig,
    ctx: ParallelContext,
    records: list[dict[str, Any]],
    warmup: int,
    peak: float,
    source: str,
    states: int,
    dynamic: int,
) -> Point:
    own_memory = ctx.platform.counts_device_memory
    device = measure_device(ctx.platform, config.train.precision, processes=1)
    goal = Goal.of(config, cuda=ctx.platform.triton)
    layout = configured_layout(config, ctx.world_size, goal, device.hbm_bytes if own_memory else None)
    plan = evaluate(goal, layout, *_cluster(device, peak, ctx), overhead=own_memory)
    steps = [r for r in records if "iteration-time" in r and r["step"] > warmup]
    times = sorted(r["iteration-time"] for r in steps)
    median = statistics.median(times)
    outer = 1 if len(times) >= 5 else 0
    tokens = config.train.global_batch_size * config.train.seq_length
    flops = config.flops_per_token() * tokens / median / ctx.world_size
    stalls = [r["checkpoint/stall_s"] for r in records if "checkpoint/stall_s" in r]
    moved = [r for r in records if "offload/bytes_out" in r and r["step"] > warmup]
    names = [name for name in moved[0] if name.startswith("offload/")] if moved else []
    heaviest, metric = max(plan.memory, key=lambda m: m.total), config.objective.metric
    return Point(
        layout=layout.describe(),
        devices=ctx.world_size,
        device=ctx.platform.describe(),
        precision=config.train.precision,
        tokens_per_step=tokens,
        steps=len(times),
        step_s=median,
        step_low_s=times[outer],
        step_high_s=times[-1 - outer],
        tokens_per_s_per_device=tokens / median / ctx.world_size,
        flops_per_s_per_device=flops,
        peak_flops=peak,
        peak_source=source,
        mfu=flops / peak,
        states=states,
        planned_states=max(m.states for m in plan.memory),
        dynamic=dynamic if own_memory else None,
        planned_dynamic=heaviest.total - heaviest.states - heaviest.overhead,
        planned_step_s=plan.time.seconds,
        data_wait_share=statistics.median(r["data-wait-share"] for r in steps),
        loss=steps[-1][metric] if steps[-1][metric] is not None else math.nan,
        checkpoint_stall_s=max(stalls) if stalls else None,
        offload={n.removeprefix("offload/"): statistics.mean(r[n] for r in moved) for n in names} or None,
    )


def _cluster(device: DeviceSpec, peak: float, ctx: ParallelContext) -> tuple[ClusterSpec, Efficiency | None]:
    """The planner's cluster of this launch, and its efficiencies: a measured peak is reached by large products."""
    spec = replace(device, bf16_flops=peak)
    cluster = ClusterSpec(nodes=1, devices_per_node=ctx.world_size, device=spec, network_gb_per_s=spec.link_gb_per_s)
    return cluster, MEASURED if ctx.platform.ranks_share_device else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Steps of ours and of transformers, in turn in one process; `ratio` is the median of neighbours' theirs / ours."""

    ours_s: float
    theirs_s: float
    ratio: float
    tokens_per_step: int
    rounds: int
    note: str


def compare_with_transformers(config: RunConfig, ctx: ParallelContext, *, rounds: int, warmup: int) -> Comparison:
    """One training step of ours and one of transformers' model of the same shape, in turn.

    transformers runs its own model class with SDPA attention, autograd's cross-entropy, gradient clipping, and torch's
    fused AdamW. In bf16 its weights, gradients and moments are bf16, so it moves less memory than we do, with our fp32
    gradients and master weights; in fp32 both do the same work.

    Raises:
        ConfigError: the objective is not next-token prediction, or transformers has no such model.
    """
    if config.objective.reads != "text":
        raise ConfigError(
            f"--compare: transformers' step predicts the next token, objective.kind is {config.objective.kind}: leave the "
            "group objective out"
        )
    with tempfile.TemporaryDirectory(prefix="flagscale-bench-") as folder:
        config = benchmark_config(config, folder, rounds + warmup + 1, checkpoint=False)
        ours, theirs = our_steps(config, ctx), _their_steps(config, ctx)
        times: list[tuple[float, float]] = []
        for turn in range(warmup + rounds):
            pair = _timed(ctx, ours), _timed(ctx, theirs)
            if turn >= warmup:
                times.append(pair)
    ours_s, theirs_s = (statistics.median(side) for side in zip(*times, strict=True))
    return Comparison(
        ours_s=ours_s,
        theirs_s=theirs_s,
        ratio=statistics.median(b / a for a, b in times),
        tokens_per_step=config.train.global_batch_size * config.train.seq_length,
        rounds=rounds,
        note="states in fp32 on both sides"
        if config.train.precision == "fp32"
        else f"transformers' states all in {config.train.precision}, our gradients, moments and master weights in fp32",
    )


def _timed(ctx: ParallelContext, steps: Iterator[object]) -> float:
    ctx.platform.synchronize()
    began = time.perf_counter()
    next(steps)
    ctx.platform.synchronize()
    return time.perf_counter() - began


def our_steps(config: RunConfig, ctx: ParallelContext) -> Iterator[float]:
    """Training steps of ours, without anything beside them; each gives its loss."""
    engine = Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer)
    data, _ = build_datasets(config, ctx, train_samples=config.train.total_samples(), valid_samples=0)
    batches = micro_batches(data, config, ctx)
    objective = objective_of(config, packed=is_packed(data))
    add_up, dp = NamedSum(ctx), ctx.dp
    count = config.train.global_batch_size // (config.train.micro_batch_size * dp)
    while True:
        outputs = engine.forward_backward(batches, objective, count)
        sums = add_up({"grad-square": outputs.grad_square, **outputs.sums})
        engine.update(clip=config.optimizer.clip_grad, grad_norm=math.sqrt(sums["grad-square"]))
        yield sums["total"] / sums["count"]


def _their_steps(config: RunConfig, ctx: ParallelContext) -> Iterator[object]:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM  # seconds to import; only on request

    options = config.optimizer
    candidates = [find_family(config.model.family), find_family("llama")]  # most families are Llama's maths
    family = next(
        (f for f in candidates if f.model_type in CONFIG_MAPPING and features(config.model) <= f.supports), None
    )
    if family is None:
        raise ConfigError(f"--compare: transformers has no model of {config.model.family}'s shape without custom code")
    shape = AutoConfig.for_model(family.model_type, **family.write(config.model))
    dtype = DTYPES[config.train.precision]
    with torch.device(ctx.platform.device):
        model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", dtype=dtype)
    if config.train.recompute == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(options.beta1, options.beta2), fused=True)
    data, _ = build_datasets(config, ctx, train_samples=config.train.total_samples(), valid_samples=0)
    batches = micro_batches(data, config, ctx)
    count = config.train.global_batch_size // config.train.micro_batch_size
    while True:
        optimizer.zero_grad()
        for batch in itertools.islice(batches, count):
            logits = model(input_ids=batch.tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
            (loss / count).backward()
        if options.clip_grad > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()
        yield loss


COLUMNS = (
    "point",
    "layout",
    "step s",
    "spread",
    "tokens/s/dev",
    "TFLOP/s/dev",
    "MFU",
    "states MiB (planned)",
    "activations MiB (planned)",
    "planned step s",
    "stall s",
)


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line a point under COLUMNS; a point that failed has its reason instead of figures."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    mib = 1 << 20
    for result in results:
        name = result["point"] or "as configured"
        if "error" in result:
            lines.append((name, result["error"], *[""] * (len(COLUMNS) - 2)))
            continue
        p = result["measured"]
        dynamic = "-" if p["dynamic"] is None else f"{p['dynamic'] / mib:,.0f}"
        lines.append(
            (
                name,
                p["layout"],
                f"{p['step_s']:.4g}",
                f"{p['step_low_s']:.4g} to {p['step_high_s']:.4g}",
                f"{p['tokens_per_s_per_device']:,.0f}",
                f"{p['flops_per_s_per_device'] / 1e12:.3g}",
                f"{p['mfu']:.1%}",
                f"{p['states'] / mib:,.1f} ({p['planned_states'] / mib:,.1f})",
                f"{dynamic} ({p['planned_dynamic'] / mib:,.0f})",
                f"{p['planned_step_s']:.3g}",
                "-" if p["checkpoint_stall_s"] is None else f"{p['checkpoint_stall_s']:.3f}",
            )
        )
    return lines


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens a second a device of every point, with the spread of its steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [r for r in results if "measured" in r]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.4 * len(good)), layout="constrained")
    for place, result in enumerate(good):
        p = result["measured"]
        value = p["tokens_per_s_per_device"]
        low, high = (p["tokens_per_step"] / p[key] / p["devices"] for key in ("step_high_s", "step_low_s"))
        axes.barh(place, value, xerr=[[value - low], [high - value]], color="tab:blue", capsize=3)
        axes.text(max(value, high), place, f"  MFU {p['mfu']:.1%}", va="center", fontsize=8)
    axes.set_yticks(range(len(good)), [r["point"] or "as configured" for r in good], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * axes.dataLim.x1)  # room for the words behind the longest bar
    axes.set_xlabel("tokens/s/device: median,\nand second slowest to second fastest step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sweep_points(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of `key=value,value` sweeps, as overrides.

    Raises:
        ConfigError: a sweep is not written so.
    """
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not key or not equals or not all(value.strip() for value in values.split(",")):
            raise ConfigError(f"sweep {sweep!r}: write it as key.path=value,value, train.micro_batch_size=1,2,4 say")
        axes.append([f"{key}={value.strip()}" for value in values.split(",")])
    return list(itertools.product(*axes))
